"""The side of a row: test, validation or train. It is a function of the row alone, so that no other row moves it.

Rows of one group share a side. The group is the row's value in the domain's `group_by` column. Without one, it is the
answer, because paraphrases of a question share theirs: a long one but for its numbers and quoted values, in which
questions made from one template differ. An answer of a few words is a label, shared by rows that have nothing else in
common: such a row stands alone.
"""

import re
from collections.abc import Sequence

from moa.base.encoding import Message
from moa.core import digests
from moa.core.config import Domain, PrepareParams
from moa.data.corpus import Split

ANSWER_WORDS = 4     # fewest words of an answer that make rows a group
TEMPLATE_WORDS = 8   # fewest words of an answer, its values aside, that do
ORDER: tuple[Split, ...] = ("test", "validation", "train")   # of two near-duplicates the one further ahead stays
_WORDS = {count: re.compile(rf"\w+(?:\W+\w+){{{count - 1}}}") for count in (ANSWER_WORDS, TEMPLATE_WORDS)}
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\d+(?:[.,]\d+)*")


def group_position(row_id: str, messages: Sequence[Message], group: str | None, domain: Domain) -> float:
    """The place of the row's group between 0 and 1, uniform by digest. `group` is its value in the group_by column."""
    if group is not None:
        key = f"group:{group}"
    elif domain.group_by == "none":
        key = row_id
    else:
        key = _answer(messages) or row_id
    return int(digests.of_bytes(f"split:{key}".encode())[:13], 16) / 16**13


def _answer(messages: Sequence[Message]) -> str | None:
    """The assistant's texts, without case, white space and, if long, values; None for a label."""
    text = " ".join([message["content"] for message in messages if message["role"] == "assistant"]).lower()
    text = " ".join(text.split())
    template = _VALUE.sub("#", text)
    if _WORDS[TEMPLATE_WORDS].search(template):
        return template
    return text if _WORDS[ANSWER_WORDS].search(text) else None


def split_bounds(params: PrepareParams) -> tuple[float, float]:
    """Places below the first are test, below the second validation, all others train."""
    return params.test, params.test + params.validation

"""The split of a row: test, validation or train. It depends on the row alone, so that new rows never move old ones.

Rows of one group are in one split. The group is the row's value in the domain's `group_by` column. Without such a
column, rows with the same answer are a group, because paraphrases of a question share their answer. Numbers and quoted
values in a long answer do not count, because rows that were made from one template differ in these. An answer of a few
words is a label that unrelated rows share, so a row with a short answer is a group of its own.
"""

import re
from collections.abc import Sequence

from moa.base.encoding import Message
from moa.core import digests
from moa.core.config import Domain, PrepareParams
from moa.data.corpus import Split

ANSWER_WORDS = 4     # fewest words of an answer that makes its rows a group
TEMPLATE_WORDS = 8   # fewest words, without numbers and quoted values, of an answer that is compared without these
ORDER: tuple[Split, ...] = ("test", "validation", "train")   # of near-duplicates, the one in the earlier split stays
_WORDS = {count: re.compile(rf"\w+(?:\W+\w+){{{count - 1}}}") for count in (ANSWER_WORDS, TEMPLATE_WORDS)}
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\d+(?:[.,]\d+)*")


def group_position(row_id: str, messages: Sequence[Message], group: str | None, domain: Domain) -> float:
    """Position of a row's group between 0 and 1, uniformly distributed, which `split_bounds` maps to a split.

    Args:
        row_id: the row's id.
        messages: the row's messages.
        group: the row's value in the domain's `group_by` column; None without one.
        domain: the row's domain.
    """
    if group is not None:
        key = f"group:{group}"
    elif domain.group_by == "none":
        key = row_id
    else:
        key = _answer_key(messages) or row_id
    return int(digests.of_bytes(f"split:{key}".encode())[:13], 16) / 16**13


def _answer_key(messages: Sequence[Message]) -> str | None:
    """The assistant's texts, without case, white space and, if long, numbers and quoted values; None for a label."""
    text = " ".join([message["content"] for message in messages if message["role"] == "assistant"]).lower()
    text = " ".join(text.split())
    template = _VALUE.sub("#", text)
    if _WORDS[TEMPLATE_WORDS].search(template):
        return template
    return text if _WORDS[ANSWER_WORDS].search(text) else None


def split_bounds(params: PrepareParams) -> tuple[float, float]:
    """Upper bounds of the positions (see `group_position`) of test and of validation rows; higher ones are train."""
    return params.test, params.test + params.validation

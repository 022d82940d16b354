"""The group of a row, and with it the row's side: test, validation or train.

Rows of one group share a side. The group is the row's value in the domain's `group_by` column. Without one, it is the
answer, because paraphrases of a question share theirs: a long one but for its numbers and quoted values, in which
questions made from one template differ. So it is a function of the row alone, and no other row moves it. There are two
exceptions, in which rows that share an answer have nothing else in common, and each row is a group by itself: an answer
of a few words, which is a label, and one that CANNED rows share word for word, which is one of a closed set of replies.
As groups, whole replies of a closed set would be on one side, and some would never be trained on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moa.base.encoding import Message
from moa.core import digests
from moa.core.config import Domain, PrepareParams
from moa.data.corpus import Split

ANSWER_WORDS = 4     # fewest words of an answer that make rows a group
TEMPLATE_WORDS = 8   # fewest words of an answer, its values aside, that do
CANNED = 10          # fewest different rows with one answer, word for word, that make it a reply of a closed set
ORDER: tuple[Split, ...] = ("test", "validation", "train")   # of two near-duplicates the one further ahead stays
_WORDS = {count: re.compile(rf"\w+(?:\W+\w+){{{count - 1}}}") for count in (ANSWER_WORDS, TEMPLATE_WORDS)}
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Group:
    """What decides the group of a row, as 64-bit numbers."""

    digest: int          # of what the row shares with its group
    answer: int | None   # of the answer, word for word, where the answer is what is shared


def group(row_id: str, messages: Sequence[Message], column: str | None, domain: Domain) -> Group:
    """The group of a row as far as the row alone tells. `column` is its value in the group_by column."""
    if column is not None:
        return Group(_digest(f"group:{column}"), None)
    answer = None if domain.group_by == "none" else _answer(messages)
    if answer is None:
        return Group(alone(row_id), None)
    shared, verbatim = answer
    return Group(_digest(shared), _digest(verbatim))


def alone(row_id: str) -> int:
    """The digest of a group that is one row."""
    return _digest(row_id)


def _digest(key: str) -> int:
    return int(digests.of_bytes(f"split:{key}".encode())[:16], 16)


def positions(groups: np.ndarray) -> np.ndarray:
    """Places of groups between 0 and 1, uniform: (N,) float64 from their digests, (N,) uint64."""
    return (groups >> np.uint64(12)) / 2.0**52


def _answer(messages: Sequence[Message]) -> tuple[str, str] | None:
    """The assistant's texts, without case and white space: as what rows of a group share, without values if they are
    long, and word for word. None for a label."""
    text = " ".join([message["content"] for message in messages if message["role"] == "assistant"]).lower()
    text = " ".join(text.split())
    template = _VALUE.sub("#", text)
    if _WORDS[TEMPLATE_WORDS].search(template):
        return template, text
    return (text, text) if _WORDS[ANSWER_WORDS].search(text) else None


def split_bounds(params: PrepareParams) -> tuple[float, float]:
    """Places below the first are test, below the second validation, all others train."""
    return params.test, params.test + params.validation

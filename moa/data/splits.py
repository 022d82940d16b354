"""The group of a row, and with it the split of the row: test, validation or train.

Rows of one group are in one split. The group is the row's value in the domain's `group_by` column. Without such a
column, rows with the same answer are a group, because paraphrases of a question share their answer. Numbers and quoted
values in a long answer do not count, because rows that were made from one template differ in these. So the group
depends on the row alone, and new rows never move old ones.

There are two exceptions, in which unrelated rows share an answer, so that each row is a group of its own: an answer of
a few words, which is a label, and an answer that CANNED rows share word for word, which is a reply of a closed set.
Were it a group, some replies of the set would only be in the test or validation rows, and never be trained on. A query
of SQL is no such reply: the questions that share one are paraphrases, however many there are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moa.base.encoding import Message
from moa.core import digests
from moa.core.config import Domain, PrepareParams
from moa.data.corpus import Split

ANSWER_WORDS = 4     # fewest words of an answer that makes its rows a group
TEMPLATE_WORDS = 8   # fewest words, without numbers and quoted values, of an answer that is compared without these
CANNED = 10          # fewest different rows with one answer, word for word, that make it a reply of a closed set
ORDER: tuple[Split, ...] = ("test", "validation", "train")   # of near-duplicates, the one in the earlier split stays
_WORDS = {count: re.compile(rf"\w+(?:\W+\w+){{{count - 1}}}") for count in (ANSWER_WORDS, TEMPLATE_WORDS)}
_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class Group:
    """What decides the group of a row, as 64-bit numbers."""

    digest: int          # of what the row shares with its group
    answer: int | None   # of the answer, word for word, where rows with this answer are a group


def group(row_id: str, messages: Sequence[Message], column: str | None, domain: Domain) -> Group:
    """The group of a row, as far as the row alone tells.

    Args:
        row_id: the row's id.
        messages: the row's messages.
        column: the row's value in the domain's `group_by` column; None without one.
        domain: the row's domain.
    """
    if column is not None:
        return Group(_digest(f"group:{column}"), None)
    keys = None if domain.group_by == "none" else _answer_keys(messages)
    if keys is None:
        return Group(alone(row_id), None)
    shared, verbatim = keys
    return Group(_digest(shared), None if domain.metric == "sql" else _digest(verbatim))


def alone(row_id: str) -> int:
    """The digest of a group that is one row."""
    return _digest(row_id)


def _digest(key: str) -> int:
    return int(digests.of_bytes(f"split:{key}".encode())[:16], 16)


def positions(groups: np.ndarray) -> np.ndarray:
    """Positions of groups between 0 and 1, uniformly distributed, which `split_bounds` maps to splits.

    Args:
        groups: digests of groups, (N,) uint64.

    Returns:
        (N,) float64.
    """
    return (groups >> np.uint64(12)) / 2.0**52


def _answer_keys(messages: Sequence[Message]) -> tuple[str, str] | None:
    """The assistant's texts without case and white space; None for a label.

    Returns:
        What rows of a group share, which has no numbers and quoted values if it is long, and the whole text.
    """
    text = " ".join([message["content"] for message in messages if message["role"] == "assistant"]).lower()
    text = " ".join(text.split())
    template = _VALUE.sub("#", text)
    if _WORDS[TEMPLATE_WORDS].search(template):
        return template, text
    return (text, text) if _WORDS[ANSWER_WORDS].search(text) else None


def split_bounds(params: PrepareParams) -> tuple[float, float]:
    """Upper bounds of the positions (see `positions`) of test and of validation rows; higher ones are train."""
    return params.test, params.test + params.validation

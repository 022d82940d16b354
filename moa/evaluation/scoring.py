"""Test rows, greedy answers to them and the scores of these answers: what evaluation, comparison and forgetting share.

What a row gets from an expert depends on that row and the expert's weights alone, up to the rounding of a batch. Shapes
of data: `content` is a sequence of (domain, test row), and a pair is (index into `content`, label of the answerer).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from moa.base.encoding import Message
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.data.corpus import Row
from moa.evaluation import metrics

Content = Sequence[tuple[str, Row]]   # (domain, test row)
Pair = tuple[int, str]                # (index of a row, label of the expert that answers it, or "base")
MOST_STEPS = 200   # rows that are looked at for another question: with thousands of rows, all pairs would take long
SPARE_TOKENS = 8   # an answer may be this much longer than the longest one in the corpus


def pinned_rows(workspace: Workspace, config: Config, domains: Iterable[str],
                also: Mapping[str, Set[str]] | None = None) -> list[tuple[str, Row]]:
    """(domain, row) of the first `evaluate.rows` test rows of each domain, and of those whose ids are in `also`.

    A corpus keeps its rows in the order of their digests, so the limit favours no kind of row.
    """
    limit = config.evaluate.rows
    return [(domain, row) for domain in domains
            for place, row in enumerate(corpus.read(workspace.corpus(domain), "test"))
            if limit is None or place < limit or row.id in (also or {}).get(domain, ())]


def with_other_questions(content: Content) -> dict[int, list[Message]]:
    """Conversations of the rows with the last user message, the question, of another row; the answer stays.

    The other row is the next one of the domain, around its end, that belongs to another group and has another question.
    One with another answer is preferred, since rows with equal answers would not tell whether questions help, and then
    one whose question was not used before, so that the pairs depend less on each other.

    Returns:
        By index into `content`; rows without a question, and rows for which there is no other row, are left out.
    """
    by_domain: dict[str, list[int]] = defaultdict(list)
    for index, (domain, row) in enumerate(content):
        if row.question:
            by_domain[domain].append(index)
    exchanged: dict[int, list[Message]] = {}
    for places in by_domain.values():
        used: set[int] = set()
        for place, index in enumerate(places):
            row = content[index][1]
            near = (places[(place + step) % len(places)] for step in range(1, min(len(places), MOST_STEPS)))
            others = [each for each in near if (content[each][1].group or content[each][1].id) != (row.group or row.id)
                      and content[each][1].question != row.question]
            if others:   # `min` takes the nearest of the best
                other = min(others, key=lambda each: (content[each][1].reference == row.reference, each in used))
                used.add(other)
                messages = [dict(message) for message in row.messages]
                asked = max(turn for turn, message in enumerate(messages) if message["role"] == "user")
                messages[asked]["content"] = content[other][1].question
                exchanged[index] = messages
    return exchanged


def answer_limit(workspace: Workspace, config: Config, domain: str) -> int:
    """Most tokens of an answer in `domain`: a little more than the longest one of its training and validation rows.

    A corpus from before `longest_answer` was recorded gives the longest of all rows.
    """
    manifest = read_json(workspace.corpus(domain) / MANIFEST)
    longest = manifest.get("longest_answer", manifest["tokens"]["completion"]["max"])
    return min(config.evaluate.max_new_tokens, int(longest) + SPARE_TOKENS)


def generate_answers(mixture: Any, workspace: Workspace, config: Config, content: Content, pairs: Iterable[Pair],
                     advance: Callable[[int], object] = lambda _: None) -> dict[Pair, str]:
    """Greedy answers by pair, domain by domain in batches of `evaluate.batch_rows`.

    The same pairs make the same batches for any mixture. `advance` is called with the size of each finished batch.
    """
    by_domain: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_domain[content[pair[0]][0]].append(pair)
    answers: dict[Pair, str] = {}
    for domain, of_domain in by_domain.items():
        limit = answer_limit(workspace, config, domain)
        for start in range(0, len(of_domain), config.evaluate.batch_rows):
            batch = of_domain[start:start + config.evaluate.batch_rows]
            generated = mixture.generate([content[index][1].prompt for index, _ in batch], [by for _, by in batch],
                                         max_new_tokens=limit)
            answers.update(zip(batch, (one.answer for one in generated), strict=True))
            advance(len(batch))
    return answers


def score_answers(config: Config, content: Content, answers: Mapping[Pair, str]) -> dict[Pair, float]:
    """The score of each answer by the metric of its row's domain, from 0 to 1. Raises ConfigError for no metric."""
    scores = {}
    for pair, answer in answers.items():
        domain, row = content[pair[0]]
        scores[pair] = metrics.resolve(config.domains[domain].metric)(answer, row.reference, row.question)
    return scores

"""A test question that a build answered better than the base: what `moa run` and `moa demo` suggest to ask."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moa.core.config import Config
from moa.core.paths import Workspace
from moa.data import corpus
from moa.data.corpus import Row


@dataclass(frozen=True)
class SampleQuestion:
    """A question of the test rows, with the answers that the evaluation got."""

    domain: str
    question: str
    answer: str | None = None        # of the mixture; None = no answer of it was better than the base's
    base_answer: str | None = None

    @property
    def shell_word(self) -> str:
        """The question as a word for a shell, with its line breaks."""
        return shlex.quote(self.question)


def sample_question(workspace: Workspace, config: Config) -> SampleQuestion:
    """Choose a question from the test rows of the last evaluation, for whose rows no expert was trained.

    Of the rows of a single question, answered by an expert with a better score than the base's, it is one with the
    highest score, without line breaks if there is one, and of these the shortest. Where there is none, it is the
    shortest test question of the first domain, or "..." without test rows.
    """
    rows = {domain: {row.id: row for row in corpus.read(workspace.corpus(domain), "test")} for domain in config.domains}
    found = [(score, SampleQuestion(domain, rows[domain][row].question, answer, base))
             for domain, row, score, answer, base in _better_answers(workspace)
             if row in rows.get(domain, ()) and _is_single(rows[domain][row])]
    if found:
        best = max(score for score, _ in found)
        return min((each for score, each in found if score == best),
                   key=lambda each: ("\n" in each.question, len(each.question)))
    first = next(iter(config.domains))
    return SampleQuestion(first, min((" ".join(row.question.split()) for row in rows[first].values()), key=len,
                                     default="..."))


def _better_answers(workspace: Workspace) -> list[tuple[str, str, float, str, str]]:
    """Domain, row's id, score, answer and the base's answer of each row that an expert answered better."""
    import pyarrow.parquet as pq

    path = workspace.reports / "rows.parquet"
    if not path.is_file():
        return []
    answers = pq.read_table(path, columns=["domain", "row", "system", "answered_by", "score", "answer"]).to_pylist()
    base = {(each["domain"], each["row"]): each for each in answers if each["system"] == "base"}
    pairs = [(each, base[each["domain"], each["row"]]) for each in answers
             if each["system"] == "routed" and each["answered_by"] != "base"]
    return [(mine["domain"], mine["row"], mine["score"], mine["answer"], others["answer"]) for mine, others in pairs
            if mine["score"] is not None and others["score"] is not None and mine["score"] > others["score"]]


def _is_single(row: Row) -> bool:
    """Whether the row is one question and its answer, as `moa ask` asks it."""
    return [message["role"] for message in row.messages] == ["user", "assistant"]


def answered_text(sample: SampleQuestion, reply: Mapping[str, Any]) -> str:
    """The question as it is asked in a shell, and the answers of the champion and of the base alone.

    `reply` is the result of `moa.release.champion.ask`.
    """
    lines = [f"$ moa ask {sample.shell_word}", reply["answer"].strip(), f"({reply['answered_by']} answered)"]
    if sample.base_answer is not None:
        lines += ["", "The base alone answers:", sample.base_answer.strip()]
    return "\n".join(lines)

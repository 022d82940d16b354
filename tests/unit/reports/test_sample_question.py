"""The question that a build suggests to ask is one that the mixture answered rightly."""

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moa.base.encoding import Message
from moa.core import config
from moa.core.files import write_json
from moa.core.paths import Workspace
from moa.data import corpus
from moa.data.corpus import Row
from moa.reports.sample_question import answered_text, sample_question

SETTINGS = config.Config.model_validate({
    "base": {"source": "path:base"}, "domains": {name: {"metric": "rouge_l"} for name in ("math", "sql")}})
LONG, SHORT, LINES = "How much is two and two and two?", "What is 1 + 1?", "Count\nthem."


def row(name: str, *roles: str, question: str) -> Row:
    texts = {"user": question, "assistant": "the answer", "system": "Be short."}
    return Row(name, tuple(Message(role=role, content=texts[role]) for role in roles), 3, 3)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Two corpora; each domain has rows of one question, and math a row with a system message, too."""
    made = Workspace(tmp_path)
    rows = {"math": [row("long", "user", "assistant", question=LONG), row("short", "user", "assistant", question=SHORT),
                     row("system", "system", "user", "assistant", question="?")],
            "sql": [row("lines", "user", "assistant", question=LINES)]}
    for domain, each in rows.items():
        folder = made.corpus(domain)
        folder.mkdir(parents=True)
        pq.write_table(corpus.table(each), folder / "test.parquet")
        write_json(folder / "manifest.json", {})
    return made


def answered(workspace: Workspace, scores: dict[tuple[str, str], tuple[float | None, float | None]],
             by: str = "expert") -> None:
    """Store an evaluation: scores of the mixture and of the base by domain and row."""
    lines: list[dict[str, Any]] = [
        {"domain": domain, "row": name, "system": system, "answered_by": "base" if system == "base" else by,
         "score": score, "answer": f"{system} says"}
        for (domain, name), pair in scores.items() for system, score in zip(("routed", "base"), pair, strict=True)]
    workspace.reports.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(lines), workspace.reports / "rows.parquet")


@pytest.mark.parametrize(("scores", "chosen"), [
    ({("math", "long"): (1.0, 0.0), ("math", "short"): (0.5, 0.0)}, LONG),              # the highest score
    ({("math", "long"): (1.0, 0.0), ("math", "short"): (1.0, 0.0)}, SHORT),             # then the shortest
    ({("math", "long"): (1.0, 0.0), ("sql", "lines"): (1.0, 0.0)}, LONG),               # no line breaks before that
    ({("math", "long"): (0.4, 0.0), ("math", "short"): (1.0, 1.0)}, LONG),              # better than the base
    ({("math", "long"): (0.4, 0.0), ("math", "system"): (1.0, 0.0)}, LONG),             # a question alone
    ({("sql", "lines"): (1.0, 0.0), ("math", "short"): (None, None)}, LINES),
])
def test_the_question_is_answered_rightly(workspace: Workspace, chosen: str,
                                          scores: dict[tuple[str, str], tuple[float | None, float | None]]) -> None:
    answered(workspace, scores)
    sample = sample_question(workspace, SETTINGS)
    assert (sample.question, sample.answer, sample.base_answer) == (chosen, "routed says", "base says")
    assert shlex.split(sample.shell_word) == [chosen]


def test_without_such_an_answer_it_is_any_test_question(workspace: Workspace) -> None:
    assert sample_question(workspace, SETTINGS).question == "?"   # nothing was evaluated
    answered(workspace, {("math", "long"): (0.0, 0.0), ("sql", "lines"): (1.0, 0.0)}, by="base")
    sample = sample_question(workspace, SETTINGS)
    assert (sample.domain, sample.question, sample.answer) == ("math", "?", None)


def test_the_base_stands_beside_the_champion(workspace: Workspace) -> None:
    answered(workspace, {("math", "short"): (1.0, 0.0)})
    said = answered_text(sample_question(workspace, SETTINGS), {"answer": "2\n", "answered_by": "math"})
    assert said == ("$ moa ask 'What is 1 + 1?'\n2\n(math answered)\n\nThe base alone answers:\nbase says")

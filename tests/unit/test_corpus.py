"""Rows in, corpus out: every line accounted for, no row changes sides, bad input is one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from moa import corpus, rows
from moa.base import BasePin
from moa.config import BaseParams, Config, Domain, PrepareParams
from moa.errors import DataError
from moa.workspace import Workspace


class LetterTokenizer:
    """One id a character; a template in the manner of ChatML that has no place for one system message."""

    all_special_tokens = ("</>",)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        if messages[0]["content"] == "refuse me":
            raise TemplateError("System role not supported")
        text = "".join(f"<{message['role']}>{message['content']}</>\n" for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


@pytest.fixture(autouse=True)
def toy_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "load_tokenizer", lambda workspace: LetterTokenizer())
    monkeypatch.setattr(corpus, "pin", lambda workspace: BasePin("toy", "w", "t", "c", "d", 1, "Toy"))


def settings_for(**prepare: Any) -> Config:
    return Config(
        base=BaseParams(source="path:toy"),
        domains={"toy": Domain(metric="exact")},
        prepare=PrepareParams(**{"min_rows": 5, **prepare}),
    )


def row(number: int) -> dict[str, str]:
    return {
        "instruction": f"What follows {number} in the row of {number * 7919 % 1000} numbers?",
        "output": str(number + 1),
    }


def fill(root: Path, content: bytes | list[Any], name: str = "rows.jsonl") -> Workspace:
    workspace = Workspace(root)
    workspace.raw("toy").mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(json.dumps(item) for item in content).encode()
    (workspace.raw("toy") / name).write_bytes(content)
    return workspace


def sides(workspace: Workspace) -> dict[str, str]:
    return {item.id: split for split in rows.SPLITS for item in rows.read(workspace.corpus("toy"), split)}


def test_rows_never_change_sides_and_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    workspace = fill(tmp_path, [row(number) for number in range(100)])
    manifest = corpus.prepare(workspace, settings_for(), "toy")
    before = sides(workspace)
    first = {path.name: path.read_bytes() for path in workspace.corpus("toy").iterdir()}
    fill(tmp_path, [row(number) for number in reversed(range(100))])
    assert corpus.prepare(workspace, settings_for(), "toy")["digest"] == manifest["digest"]
    assert {path.name: path.read_bytes() for path in workspace.corpus("toy").iterdir()} == first
    fill(tmp_path, [row(number) for number in range(200)])
    corpus.prepare(workspace, settings_for(), "toy")
    after = sides(workspace)
    assert len(after) == 200
    assert all(after[key] == side for key, side in before.items())


def test_duplicates_are_counted_and_removed(tmp_path: Path) -> None:
    long = " ".join(f"word{number}" for number in range(80))
    near = [{"instruction": long, "output": "yes"}, {"instruction": long + " more", "output": "yes"}]
    workspace = fill(tmp_path, [*[row(number) for number in range(60)], row(1), row(2), *near])
    counted = corpus.prepare(workspace, settings_for(), "toy")["rows"]
    assert (counted["read"], counted["duplicates"], counted["near_duplicates"], counted["kept"]) == (64, 2, 1, 61)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("not json", "malformed JSON"),
        ("[1]", "not an object"),
        ('{"output": "x"}', "instruction is missing"),
        ('{"instruction": 3, "output": "x"}', "not text but int"),
        ('{"instruction": "x", "output": " "}', "output is empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ending with assistant"),
        ('{"instruction": "a\\u0000", "output": "x"}', "control characters"),
        ('{"instruction": "a", "output": "b</>\\n<user>c"}', "contains </>, a marker"),
        (
            '{"messages": [{"role": "system", "content": "refuse me"}, {"role": "user", "content": "a"},'
            ' {"role": "assistant", "content": "b"}]}',
            "template refuses it: System role not supported",
        ),
        (json.dumps({"instruction": "x" * 2000, "output": "x"}), "too long"),
    ],
)
def test_each_rejection_has_its_reason(tmp_path: Path, bad: str, reason: str) -> None:
    good = [json.dumps(row(number)) for number in range(60)]
    workspace = fill(tmp_path, "\n".join([*good[:30], bad, *good[30:]]).encode())
    assert corpus.prepare(workspace, settings_for(), "toy")["rows"]["rejected"] == 1
    record = json.loads((workspace.corpus("toy") / "rejected.jsonl").read_text())
    assert reason in record["reason"]
    assert record["line"] == 31


def test_too_many_rejected_rows_fail_and_say_where(tmp_path: Path) -> None:
    workspace = fill(
        tmp_path, b"\n".join([*[json.dumps(row(number)).encode() for number in range(50)], *[b"oops"] * 20])
    )
    with pytest.raises(DataError, match=r"20 of 70 rows.*malformed JSON.*rows\.jsonl:51.*max_rejected"):
        corpus.prepare(workspace, settings_for(), "toy")
    assert len((tmp_path / ".moa/rejected/toy.jsonl").read_text().splitlines()) == 20
    assert not workspace.corpus("toy").exists()


def test_a_domain_without_rows_says_where_to_put_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data/raw/toy/"):
        corpus.prepare(Workspace(tmp_path), settings_for(), "toy")


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_every_format_gives_the_same_corpus(tmp_path: Path, name: str) -> None:
    import pandas as pd

    content = [row(number) for number in range(60)]
    expected = corpus.prepare(fill(tmp_path / "a", content), settings_for(), "toy")["digest"]
    frame = pd.DataFrame(content)
    path = tmp_path / name
    write = {
        "rows.json": lambda: path.write_text(json.dumps(content)),
        "rows.csv": lambda: frame.to_csv(path, index=False),
        "rows.tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        "rows.parquet": lambda: frame.to_parquet(path),
    }
    write[name]()
    workspace = fill(tmp_path / "b", path.read_bytes(), name)
    assert corpus.prepare(workspace, settings_for(), "toy")["digest"] == expected


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    noise=st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.text(max_size=40).map(lambda text: json.dumps({"instruction": text, "output": text}).encode()),
        ),
        max_size=12,
    )
)
def test_no_bytes_break_it_and_every_line_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, noise: list[bytes]
) -> None:
    good = [json.dumps(row(number)).encode() for number in range(60)]
    workspace = fill(tmp_path_factory.mktemp("noise"), b"\n".join([*good, *noise]))
    counted = corpus.prepare(workspace, settings_for(max_rejected=1.0), "toy")["rows"]
    assert counted["read"] == sum(counted[key] for key in ("kept", "rejected", "duplicates", "near_duplicates"))
    assert counted["kept"] == sum(counted[split] for split in rows.SPLITS)
    assert counted["kept"] >= 60

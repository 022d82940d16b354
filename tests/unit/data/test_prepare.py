"""Rows in, corpus out: every line accounted for, no row changes sides, bad input is one sentence."""

import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken

from moa.base.pin import BasePin
from moa.core.config import BaseParams, Config, Domain, PrepareParams
from moa.core.errors import DataError
from moa.core.paths import Workspace
from moa.data import corpus as rows
from moa.data import prepare as corpus
from moa.data import row_store, splits


class LetterTokenizer:
    """One id a character; a template in the manner of ChatML that has no place for one system message."""

    all_special_tokens = ("</>",)
    chat_template, is_fast = "", True
    added_tokens_decoder = MappingProxyType({0: AddedToken("</>", special=True)})

    def __call__(self, texts: list[str], add_special_tokens: bool = True, return_offsets_mapping: bool = False
                 ) -> dict[str, list[list[Any]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts],
                "offset_mapping": [[(place, place + 1) for place in range(len(text))] for text in texts]}

    def apply_chat_template(self, messages: list[dict[str, str]], chat_template: str | None, tokenize: bool,
                            add_generation_prompt: bool) -> str:
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
    assert (counted["read"], counted["duplicates"], counted["near_duplicates"], counted["kept"]) == (64, 3, 1, 61)
    double, = (json.loads(line) for line in (workspace.corpus("toy") / "near_duplicates.jsonl").open())
    assert double["of"] in sides(workspace) and double["id"] not in sides(workspace)


@pytest.mark.parametrize(
    ("bad", "reason", "code"),
    [
        ("not json", "malformed JSON", "malformed"),
        ("[1]", "not an object", "not-object"),
        ('{"output": "x"}', "instruction is missing", "missing"),
        ('{"instruction": 3, "output": "x"}', "not text but int", "not-text"),
        ('{"instruction": "x", "output": " "}', "output is empty", "empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "ending with assistant", "bad-chat"),
        ('{"instruction": "a\\u0000", "output": "x"}', "control characters", "control-characters"),
        ('{"instruction": "a", "output": "b</>\\n<user>c"}', "contains </>, a special token", "special-token"),
        (
            '{"messages": [{"role": "system", "content": "refuse me"}, {"role": "user", "content": "a"},'
            ' {"role": "assistant", "content": "b"}]}',
            "template refuses it: System role not supported",
            "template",
        ),
        (json.dumps({"instruction": "x" * 2000, "output": "x"}), "too long", "too-long"),
    ],
)
def test_each_rejection_has_its_reason(tmp_path: Path, bad: str, reason: str, code: str) -> None:
    good = [json.dumps(row(number)) for number in range(60)]
    workspace = fill(tmp_path, "\n".join([*good[:30], bad, *good[30:]]).encode())
    manifest = corpus.prepare(workspace, settings_for(), "toy")
    assert manifest["rows"]["rejected"] == 1 and manifest["codes"] == {code: 1}
    record = json.loads((workspace.corpus("toy") / "rejected.jsonl").read_text())
    assert reason in record["reason"] and record["code"] == code and record["reason"].startswith(record["kind"])
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


def prepared(root: Path, content: list[Any], domain: Domain | None = None, **prepare: Any) -> dict[str, str]:
    config = settings_for(**{"near_duplicate": 0.0, **prepare})
    if domain is not None:
        config = config.model_copy(update={"domains": {"toy": domain}})
    workspace = fill(root, content)
    corpus.prepare(workspace, config, "toy")
    return sides(workspace)


def identity(item: dict[str, str]) -> str:
    return rows.row_id([{"role": "user", "content": item["instruction"]},
                        {"role": "assistant", "content": item["output"]}])


def test_rows_of_one_answer_share_a_side_and_labels_do_not(tmp_path: Path) -> None:
    answers = [f"This is a long answer about subject {number}." for number in range(60)]
    content = [{"instruction": f"question {number} {way}", "output": answer if way else answer.upper() + " "}
               for number, answer in enumerate(answers) for way in range(5)]
    placed = prepared(tmp_path / "a", content)
    assert len(placed) == 300
    for number in range(60):
        assert len({placed[identity({**item, "output": item["output"].strip()})]
                    for item in content[5 * number:5 * number + 5]}) == 1
    labels = [{"instruction": f"is {number} of {number * 7919 % 997} even?", "output": ("no", "yes")[number % 2]}
              for number in range(300)]
    placed = prepared(tmp_path / "b", labels)
    assert {placed[identity(item)] for item in labels if item["output"] == "yes"} == set(rows.SPLITS)


@pytest.mark.parametrize(("ways", "apart"), [(splits.CANNED, True), (splits.CANNED - 1, False)])
def test_replies_of_a_closed_set_are_in_every_split(tmp_path: Path, ways: int, apart: bool) -> None:
    """As groups, whole replies would never be trained on."""
    books = [f"{colour} {age}" for colour in ("red", "blue", "green", "pink") for age in ("old", "new", "torn", "lost")]
    content = [{"instruction": f"question {number} in way {way}", "output": f"Please look into our {book} book today."}
               for number, book in enumerate(books) for way in range(ways)]
    placed = prepared(tmp_path, content, test=0.2, validation=0.2)
    by_reply = [{placed[identity(item)] for item in content[ways * reply:ways * (reply + 1)]} for reply in range(16)]
    assert all("train" in found for found in by_reply) if apart else all(len(found) == 1 for found in by_reply)
    corpus_rows = [each for split in rows.SPLITS for each in rows.read(Workspace(tmp_path).corpus("toy"), split)]
    assert len({each.group for each in corpus_rows}) == (16 * ways if apart else 16)


def test_paraphrases_of_one_query_are_a_group_however_many_there_are(tmp_path: Path) -> None:
    content = [{"instruction": f"way {way} of asking for column {column}", "output": f"SELECT {column} FROM books;"}
               for column in "abcdefghijklmnopqrstuvwxyz" for way in range(splits.CANNED)]
    placed = prepared(tmp_path, content, Domain(metric="sql"))
    sides_of = [{placed[identity(item)] for item in content[start:start + splits.CANNED]}
                for start in range(0, len(content), splits.CANNED)]
    assert all(len(found) == 1 for found in sides_of)


def test_every_row_carries_its_group(tmp_path: Path) -> None:
    content = [{**row(number), "document": f"d{number // 6}"} for number in range(120)]
    placed = prepared(tmp_path, content, Domain(metric="exact", group_by="document"))
    groups: dict[str, set[str]] = {}
    for split in rows.SPLITS:
        for each in rows.read(Workspace(tmp_path).corpus("toy"), split):
            assert each.group is not None and re.fullmatch("[0-9a-f]{16}", each.group)
            groups.setdefault(each.group, set()).add(placed[each.id])
    assert len(groups) == 20 and all(len(sides) == 1 for sides in groups.values())


def test_no_test_row_decides_how_long_answers_may_be(tmp_path: Path) -> None:
    prepared(tmp_path, [{**row(number), "output": "9" * (1 + number % 37)} for number in range(300)])
    corpus_folder = Workspace(tmp_path).corpus("toy")
    manifest = json.loads((corpus_folder / "manifest.json").read_text())
    longest = {split: max(each.completion_tokens for each in rows.read(corpus_folder, split)) for split in rows.SPLITS}
    assert manifest["longest_answer"] == max(longest["train"], longest["validation"])
    assert manifest["groups"] == {split: len({each.group for each in rows.read(corpus_folder, split)})
                                  for split in rows.SPLITS}


def test_a_corpus_from_before_groups_is_read(tmp_path: Path) -> None:
    prepared(tmp_path, [row(number) for number in range(60)])
    path = Workspace(tmp_path).corpus("toy") / "train.parquet"
    pq.write_table(pq.read_table(path).drop_columns("group"), path)
    assert {each.group for each in rows.read(path.parent, "train")} == {None}


def test_a_group_column_decides_the_side(tmp_path: Path) -> None:
    content = [{**row(number), "document": f"d{number // 6}"} for number in range(300)]
    placed = prepared(tmp_path / "a", content, Domain(metric="exact", group_by="document"))
    groups = [{placed[identity(item)] for item in content[6 * group:6 * group + 6]} for group in range(50)]
    assert all(len(group) == 1 for group in groups)
    assert {side for group in groups for side in group} == set(rows.SPLITS)
    with pytest.raises(DataError, match="no row has the column 'page'"):
        prepared(tmp_path / "b", content, Domain(metric="exact", group_by="page"))


def test_of_near_duplicates_on_two_sides_the_training_copy_goes(tmp_path: Path) -> None:
    content = [{"instruction": " ".join(f"{number}-{word}" for word in range(80)) + f" way {way}",
                "output": f"the answer number {number * 3 + way}"} for number in range(80) for way in range(3)]
    workspace = fill(tmp_path, content)
    counted = corpus.prepare(workspace, settings_for(near_duplicate=0.8), "toy")["rows"]
    assert counted["kept"] == 80 and counted["near_duplicates"] == 160 and counted["straddling"] > 20
    ahead = {"test": 0, "validation": 1, "train": 2}
    for line in (workspace.corpus("toy") / "near_duplicates.jsonl").open():
        double = json.loads(line)
        assert ahead[double["of_split"]] <= ahead[double["split"]]
        assert sides(workspace)[double["of"]] == double["of_split"]


answers = st.sampled_from(["yes", "no", *(f"a longer answer with number {number}" for number in range(12))])
questions = st.builds(lambda words, end: " ".join(words) + end,
                      st.lists(st.sampled_from(["the", "a", "cat", "dog", "sat", "on", "mat", "under", "house"]),
                               min_size=6, max_size=30), st.sampled_from(["", "!", " really"]))
generated = st.lists(st.builds(lambda question, answer: {"instruction": question, "output": answer},
                               questions, answers), max_size=30)


@pytest.mark.slow
@settings(max_examples=40)
@given(before=generated, after=generated, threshold=st.sampled_from([0.0, 0.5, 0.9]), seed=st.randoms())
def test_no_row_ever_moves_when_rows_are_added(tmp_path_factory: pytest.TempPathFactory, before: list[Any],
                                               after: list[Any], threshold: float, seed: Any) -> None:
    good = [row(number) for number in range(100)]
    root = tmp_path_factory.mktemp("moves")
    first = prepared(root, [*good, *before], near_duplicate=threshold)
    content = [*good, *before, *after]
    seed.shuffle(content)
    then = prepared(root, content, near_duplicate=threshold)
    assert all(then[key] == side for key, side in first.items() if key in then)
    if not threshold:
        assert first.keys() <= then.keys()


FIELD = st.one_of(st.text(max_size=20), st.none(), st.integers(), st.floats(), st.lists(st.integers(), max_size=2),
                  st.sampled_from(["\x00", "\ud800", "</>", "x" * 5000, "a\rb", "a\u2028b", '"', "\t", ","]))
OBJECT = st.dictionaries(st.sampled_from(["instruction", "output", "input", "system", "messages", "other"]), FIELD)
LINE = st.one_of(
    st.binary(max_size=60),
    OBJECT.map(lambda value: json.dumps(value).encode()),
    OBJECT.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    OBJECT.map(lambda value: json.dumps(value).encode()[:-3]),                             # cut off
    st.text(max_size=20).map(lambda text: f'{{"instruction": "{text}", "output": "x"}}'.encode("latin-1", "replace")),
    st.text(max_size=20).map(lambda text: f'{{"output": "a", "output": {json.dumps(text)}}}'.encode()),
    st.integers(1, 3000).map(lambda depth: b"[" * depth),
    st.integers(1, 3000).map(lambda depth: b'{"a":' * depth + b"1" + b"}" * depth),
    st.just(b'{"instruction": ' + b"9" * 5000 + b"}"),
)
END = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"])


def accounted(workspace: Workspace, good: int) -> dict[str, int]:
    config = settings_for(max_rejected=1.0, near_duplicate=0.0)
    counted: dict[str, int] = corpus.prepare(workspace, config, "toy")["rows"]
    assert counted["read"] == counted["kept"] + counted["rejected"] + counted["duplicates"]
    assert counted["kept"] == sum(counted[split] for split in rows.SPLITS)
    assert len((workspace.corpus("toy") / "rejected.jsonl").read_bytes().split(b"\n")) == counted["rejected"] + 1
    kept = sides(workspace)
    assert all(identity(row(number)) in kept for number in range(good)), "a valid row was lost"
    return counted


@pytest.mark.slow
@settings(max_examples=100)
@given(noise=st.lists(st.tuples(st.integers(0, 60), LINE), max_size=12), end=END, bom=st.booleans())
def test_no_bytes_break_json_lines_and_no_valid_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, noise: list[tuple[int, bytes]], end: bytes, bom: bool
) -> None:
    lines = [json.dumps(row(number)).encode() for number in range(60)]
    for place, line in noise:
        lines.insert(place, line)
    content = (b"\xef\xbb\xbf" if bom else b"") + end.join(lines)
    accounted(fill(tmp_path_factory.mktemp("noise"), content), 60)


CELL = st.one_of(st.binary(max_size=30).map(lambda cell: cell.replace(b'"', b"'")),
                 st.sampled_from([b"", b'"', b'a"b', b'"open', b'"a"b', b"\x00", b"\xff", b",,,,", b"x" * 200_000]))


@settings(max_examples=30)
@given(noise=st.lists(st.tuples(st.integers(0, 60), st.lists(CELL, max_size=4).map(b",".join)), max_size=8),
       end=st.sampled_from([b"\n", b"\r\n"]), bom=st.booleans(), kind=st.sampled_from(["csv", "tsv"]))
def test_no_bytes_break_separated_values(tmp_path_factory: pytest.TempPathFactory, noise: list[tuple[int, bytes]],
                                         end: bytes, bom: bool, kind: str) -> None:
    comma = b"," if kind == "csv" else b"\t"
    lines = [row(number)["instruction"].encode() + comma + row(number)["output"].encode() for number in range(60)]
    for place, line in noise:
        lines.insert(place, line)
    content = (b"\xef\xbb\xbf" if bom else b"") + end.join([b"instruction" + comma + b"output", *lines])
    # Two stray quotation marks make one valid field of what stands between them: no reader can know better.
    quotes = sum(line.count(b'"') for _, line in noise)
    accounted(fill(tmp_path_factory.mktemp("cells"), content, f"rows.{kind}"), 60 if quotes < 2 else 0)


@settings(max_examples=30)
@given(content=st.one_of(st.binary(max_size=200), st.lists(OBJECT).map(lambda value: json.dumps(value).encode())),
       kind=st.sampled_from(["json", "parquet", "csv", "tsv", "jsonl"]), cut=st.integers(0, 40))
def test_a_file_of_anything_is_read_or_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, kind: str, cut: int
) -> None:
    workspace = fill(tmp_path_factory.mktemp("file"), [row(number) for number in range(60)])
    fill(workspace.root, content[:len(content) - cut], f"other.{kind}")
    try:
        accounted(workspace, 60)
    except DataError as error:
        assert str(error).startswith(f"other.{kind}") and "\n" not in str(error)


def test_what_two_quotation_marks_open_is_read_again(tmp_path: Path) -> None:
    lines = [f"question number {number} of {number * 7919 % 997},answer {number}" for number in range(60)]
    lines[10] = '"never closed,x'
    workspace = fill(tmp_path, "\n".join(["instruction,output", *lines]).encode(), "rows.csv")
    counted = corpus.prepare(workspace, settings_for(), "toy")["rows"]
    assert (counted["read"], counted["rejected"], counted["kept"]) == (60, 1, 59)
    record = json.loads((workspace.corpus("toy") / "rejected.jsonl").read_text())
    assert (record["line"], record["text"]) == (12, '"never closed,x')


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    text = "\r\n".join(json.dumps({**row(number), "output": f"größe {number}"}, ensure_ascii=False)
                       for number in range(60))
    workspace = fill(tmp_path, text.encode(encoding))
    counted = corpus.prepare(workspace, settings_for(), "toy")["rows"]
    assert (counted["kept"], counted["rejected"]) == (60, 0)


def test_columns_by_other_names_and_a_template(tmp_path: Path) -> None:
    plain = [row(number) for number in range(60)]
    expected = prepared(tmp_path / "a", plain)
    renamed = [{"q": item["instruction"], "a": item["output"], "instruction": "not this"} for item in plain]
    assert prepared(tmp_path / "b", renamed,
                    Domain(metric="exact", map={"instruction": "q", "output": "a"})) == expected
    made = [{"n": str(number), "m": str(number * 7919 % 1000), "output": str(number + 1)} for number in range(60)]
    assert prepared(tmp_path / "c", made, Domain(
        metric="exact", template="What follows {n} in the row of {m} numbers?")) == expected


def test_personal_data_goes_before_anything_else_sees_it(tmp_path: Path) -> None:
    content = [{**row(number), "output": f"write to jane{number}@example.com"} for number in range(60)]
    broken = {"instruction": "", "output": "joe@example.com"}
    workspace = fill(tmp_path, [*content, broken])
    manifest = corpus.prepare(workspace, settings_for(redact=["email"]), "toy")
    assert (manifest["redacted"], manifest["rows"]["rejected"]) == ({"email": 60}, 1)
    assert {item.reference for item in rows.read(workspace.corpus("toy"), "train")} == {"write to [EMAIL]"}
    assert not [path for path in workspace.corpus("toy").iterdir() if b"example.com" in path.read_bytes()]


def test_shared_names_of_chat_turns_and_a_system_column(tmp_path: Path) -> None:
    chats = [{"conversations": [{"from": "human", "value": f"number {number} of {number * 7919 % 1000}?"},
                                {"from": "gpt", "value": "yes"}]} for number in range(60)]
    prepared(tmp_path / "a", chats, Domain(metric="exact", map={"messages": "conversations"}))
    found = rows.read(Workspace(tmp_path / "a").corpus("toy"), "train")[0]
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    prepared(tmp_path / "b", [{**row(number), "system": "Be brief."} for number in range(60)])
    found = rows.read(Workspace(tmp_path / "b").corpus("toy"), "train")[0]
    assert found.messages[0] == {"role": "system", "content": "Be brief."}


def test_many_rows_pass_through_buckets_in_the_order_of_their_ids(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(row_store, "FLUSH", 64)
        patch.setattr(row_store, "ROW_GROUP", 50)
        patch.setattr(corpus, "BATCH", 32)
        small = prepared(tmp_path / "a", [row(number) for number in range(500)])
    assert list(small.items()) == list(prepared(tmp_path / "b", [row(number) for number in range(500)]).items())
    for split in rows.SPLITS:
        ids = [item.id for item in rows.read(Workspace(tmp_path / "a").corpus("toy"), split)]
        assert ids == sorted(ids)

"""Files that no reader should meet: whatever is in one, it is put aside with its reason, and the others are learned."""

import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.steps import event_log
from flows.steps.run_context import do_nothing, log_failures, run_context
from flows.steps.runner import LocalRunner
from moa.core.config import Domain
from moa.core.errors import DataError
from moa.core.paths import Workspace
from moa.data.conversations import conversation
from moa.data.readers import RowRejected, read_file
from moa.workspace import domains, incoming
from moa.workspace.init import init
from tests import tiny

ROW = {"instruction": "Ask?", "output": "Say."}
DEEP = 900   # within what Python's JSON reads, beyond what code that walks a value recursively can take


def jsonl(start: int, count: int) -> str:
    return "".join(json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}."}) + "\n"
                   for number in range(start, start + count))


def unknown_zone(path: Path) -> None:
    pq.write_table(pa.table({"instruction": ["Ask?"] * 3, "output": ["Say."] * 3,
                             "at": pa.array([1, 2, 3], pa.timestamp("us", tz="Mars/Olympus"))}), path)


def truncated(path: Path) -> None:
    pq.write_table(pa.table({"instruction": ["Ask?"] * 300, "output": ["Say."] * 300}), path)
    path.write_bytes(path.read_bytes()[:-40])


def broken_pages(path: Path) -> None:
    """Its footer is whole, and every page is zeros."""
    pq.write_table(pa.table({"instruction": ["Ask?"] * 300, "output": ["Say."] * 300}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(len(whole) // 3) + whole[4 + len(whole) // 3:])


def deep(path: Path) -> None:
    path.write_text('{"instruction": "Ask?", "output": ' + "[" * DEEP + "]" * DEEP + "}\n")


def huge_number(path: Path) -> None:
    path.write_text('{"instruction": "Ask?", "output": ' + "9" * 5000 + "}\n")


def surrogates(path: Path) -> None:
    path.write_text('{"instruction": "Ask \\ud800?", "output": "Say."}\n')


def zeros(path: Path) -> None:
    path.write_bytes(bytes(4096))


def zeros_in_fields(path: Path) -> None:
    path.write_text("instruction,output\nAsk\0?,Say.\n")


BAD = {"zone.parquet": (unknown_zone, "zone.parquet"),
       "cut.parquet": (truncated, "cut.parquet is not a Parquet file"),
       "pages.parquet": (broken_pages, "pages.parquet is not a Parquet file"),
       "deep.jsonl": (deep, "nested too deeply"),
       "number.jsonl": (huge_number, "4300 digits"), "surrogates.jsonl": (surrogates, "control characters"),
       "zeros.csv": (zeros, "zeros.csv"), "zeros.parquet": (zeros, "zeros.parquet is not a Parquet file"),
       "fields.csv": (zeros_in_fields, "instruction has control characters")}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "base").mkdir()
    init(folder / "w", f"path:{folder / 'base'}", folder)
    (folder / "tax.jsonl").write_text(jsonl(1000, 3))
    domains.add(Workspace(folder / "w"), "tax", ["tax.jsonl"], folder, {})
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(template / "w", tmp_path / "w", symlinks=True))


def moa(workspace: Workspace, *words: str | bytes, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=cwd or workspace.root, capture_output=True,
                          text=True, errors="replace", check=False,
                          env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_bad_files_are_put_aside_and_good_rows_are_taken_in(workspace: Workspace) -> None:
    """`moa adapt` cannot train here (there is no base), but taking in comes before that."""
    for domain in ("tax", "law"):
        for name, (write, _) in BAD.items():
            (workspace.incoming / domain).mkdir(parents=True, exist_ok=True)
            write(workspace.incoming / domain / name)
    (workspace.incoming / "tax" / "good.jsonl").write_text(jsonl(0, 40))
    assert moa(workspace, "status").returncode == 0
    done = moa(workspace, "adapt", "--local")
    assert done.returncode == 1 and "moa: base failed: " in done.stderr, done.stderr
    assert incoming.waiting_files(workspace) == []
    assert sorted(path.read_text() for path in workspace.raw("tax").iterdir()) == sorted([jsonl(0, 40), jsonl(1000, 3)])
    for domain in ("tax", "law"):
        told = {each["file"]: each["reason"] for each in event_log.read(workspace, kinds=["rejected"])
                if each["domain"] == domain}
        assert told.keys() == BAD.keys()
        for name, (_, reason) in BAD.items():
            assert reason in told[name] and "\n" not in told[name], told[name]
            assert (workspace.quarantine / domain / f"{name}.reason.json").exists()


@pytest.mark.parametrize("name", BAD)
def test_each_command_says_one_sentence(workspace: Workspace, tmp_path: Path, name: str) -> None:
    write, reason = BAD[name]
    write(tmp_path / name)
    for words in (["ingest", "law"], ["domain", "add", "law"]):
        done = moa(workspace, *words, str(tmp_path / name))
        assert done.returncode == 1 and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    write(workspace.raw("tax") / name)   # by hand
    for words in (["domain", "which", "Say 1000"], ["domain", "list"], ["plan"], ["status"]):
        done = moa(workspace, *words)
        assert done.returncode in (0, 1) and done.stderr.count("\n") <= 1, done.stderr


def test_a_bad_file_among_the_raw_ones(tmp_path: Path) -> None:
    """Put there by hand; with a base, so that the rows are prepared. Rows with a bad value are counted, and a file that
    cannot be read is named."""
    workspace = tiny.workspace(tmp_path / "w", ("law",))
    subprocess.run(["git", "init", "-q", "."], cwd=workspace.root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=workspace.root, check=True)
    unknown_zone(workspace.raw("law") / "zone.parquet")
    params = workspace.params.read_text()
    workspace.params.write_text(params.replace("min_rows: 10", "min_rows: 10\n  max_rejected: 0.5"))
    report = json.loads(moa(workspace, "domain", "check", "law", "--json").stdout)
    assert report["rows"]["rejected"] == 3 and "Mars/Olympus" in json.dumps(report["rejected"])
    truncated(workspace.raw("law") / "cut.parquet")
    done = moa(workspace, "domain", "check", "law")
    assert done.returncode == 1 and "cut.parquet is not a Parquet file" in done.stderr.splitlines()[-1], done.stderr


def test_a_bad_value_is_a_rejected_row(tmp_path: Path) -> None:
    """The rows beside it are read."""
    zone = pa.timestamp("us", tz="Mars/Olympus")
    pq.write_table(pa.table({"instruction": ["Ask?"] * 3, "output": ["Say."] * 3,
                             "at": pa.array([None, 2, None], zone)}), tmp_path / "a.parquet")
    first, second, third = (raw.value for raw in read_file(tmp_path / "a.parquet", "a.parquet"))
    assert isinstance(second, RowRejected) and "Mars/Olympus" in str(second)
    assert first == third == {**ROW, "at": None}


def test_a_failure_that_is_no_error_of_ours_is_told(workspace: Workspace) -> None:
    """The sensor waits longer after each failed run, which it knows from the ledger."""
    with (pytest.raises(KeyError), run_context(workspace, LocalRunner(1), False, do_nothing, wait=0.0) as work,
          log_failures(work, "adaptation", time.monotonic())):
        raise KeyError("Mars/Olympus")
    told, = event_log.read(workspace, kinds=["failed"])
    assert told["reason"] == "KeyError: 'Mars/Olympus'"


# Whatever bytes and types there are.

SCALARS = st.sampled_from([
    pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.string(), pa.large_string(), pa.binary(),
    pa.binary(4), pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns"), pa.timestamp("s"), pa.timestamp("ns"),
    pa.timestamp("us", tz="UTC"), pa.timestamp("ms", tz="Mars/Olympus"), pa.timestamp("us", tz="+99:99"),
    pa.timestamp("us", tz="../../etc/passwd"), pa.duration("ns"), pa.decimal128(38, 10), pa.decimal256(76, 0),
    pa.null(), pa.uuid(), pa.json_(), pa.dictionary(pa.int8(), pa.string())])


def _wider(types: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        types.map(pa.list_), types.map(lambda each: pa.list_(each, 2)), types.map(pa.large_list),
        types.map(lambda each: pa.map_(pa.string(), each)),
        st.lists(st.tuples(st.sampled_from(["a", "b", "é", "\n"]), types), min_size=1, max_size=3).map(pa.struct))


TYPES = st.one_of(SCALARS, st.recursive(SCALARS, _wider, max_leaves=4))


def _two(kind: Any, byte: int) -> pa.Array:
    """Two values of `kind`, made of one byte: valid by Arrow's format or not."""
    if isinstance(kind, pa.StructType):
        return pa.StructArray.from_arrays([_two(field.type, byte) for field in kind], fields=list(kind))
    if isinstance(kind, pa.MapType):
        return pa.MapArray.from_arrays([0, 1, 2], ["a", "b"], _two(kind.item_type, byte))
    if isinstance(kind, pa.FixedSizeListType):
        return pa.FixedSizeListArray.from_arrays(pa.concat_arrays([_two(kind.value_type, byte)] * 2), 2)
    if isinstance(kind, pa.LargeListType):
        return pa.LargeListArray.from_arrays([0, 1, 2], _two(kind.value_type, byte))
    if isinstance(kind, pa.ListType):
        return pa.ListArray.from_arrays([0, 1, 2], _two(kind.value_type, byte))
    if isinstance(kind, pa.DictionaryType):
        return pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int8()), ["a", "b"])
    if isinstance(kind, pa.ExtensionType):
        return pa.ExtensionArray.from_storage(kind, _two(kind.storage_type, byte))
    if kind == pa.string() or kind == pa.binary():
        return pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])),
                                               pa.py_buffer(bytes([byte]) * 2)])
    if kind.num_buffers == 2:
        return pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(bytes([byte]) * 64)])
    return pa.nulls(2, kind)


@given(kind=TYPES, byte=st.integers(0, 255), column=st.sampled_from(["at", "input", "system", "messages", "output"]))
@settings(max_examples=150)
def test_any_type_of_parquet_is_rows_or_a_data_error(tmp_path: Path, kind: pa.DataType, byte: int, column: str) -> None:
    path = tmp_path / "any.parquet"
    columns: dict[str, Any] = {key: [text] * 2 for key, text in ROW.items()}
    try:
        pq.write_table(pa.table({**columns, column: _two(kind, byte)}), path)
    except (pa.ArrowException, ValueError, OSError):
        return   # Arrow itself does not write it
    _read(path)


@given(cut=st.floats(0, 1), at=st.floats(0, 1), bits=st.integers(0, 255), compression=st.sampled_from(["none", "zstd"]))
@settings(max_examples=150)
def test_a_damaged_parquet_file_is_rows_or_a_data_error(tmp_path: Path, cut: float, at: float, bits: int,
                                                        compression: str) -> None:
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"instruction": ["Ask?", "Ask é?"], "output": ["Say.", "x"], "n": [[1], [2, 3]],
                             "at": pa.array([1, 2], pa.timestamp("us", tz="UTC"))}), path, compression=compression)
    whole = bytearray(path.read_bytes())
    whole[min(int(at * len(whole)), len(whole) - 1)] ^= bits
    path.write_bytes(whole if cut > 0.5 else whole[:int(2 * cut * len(whole))])
    _read(path)


@given(data=st.one_of(
    st.binary(max_size=300),
    st.text("[]{}\",:\n\\u0d8e19.truefalsn \t;'\r\0\ufeff", max_size=120).map(lambda text: text.encode()),
    st.binary(max_size=100).map(zlib.compress),
    st.binary(max_size=60).map(lambda data: b"PAR1" + data + b"PAR1")),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
@settings(max_examples=300)
def test_any_bytes_are_rows_or_a_data_error(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"any{suffix}"
    path.write_bytes(data)
    _read(path)


def _read(path: Path) -> None:
    """Every row is a conversation or rejected, and can be shown; or the file is a DataError of one line."""
    try:
        for raw in read_file(path, path.name):
            assert isinstance(raw.text, str)
            try:
                conversation(raw.value, Domain(metric="rouge_l"))
            except RowRejected as reason:
                assert str(reason)
    except DataError as error:
        assert str(error).startswith(path.name) and "\n" not in str(error)

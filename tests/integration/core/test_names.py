"""Names that no terminal, YAML or database takes as they are, through real git and DVC: all commands go on."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML, YAMLError

from flows.steps import event_log
from moa.core.names import LONGEST, escaped, printable
from moa.core.paths import Workspace
from moa.workspace import domains, incoming
from moa.workspace.init import init
from moa.workspace.origins import origins

NAMES = {"caf\\xe9.jsonl": b"caf\xe9.jsonl",
         "a\\nb.jsonl": b"a\nb.jsonl", "\\u202elnosj.jsonl": "\u202elnosj.jsonl".encode(),
         "\\x1b[31mred.jsonl": b"\x1b[31mred.jsonl", "- &a !b {c: d} #e.jsonl": b"- &a !b {c: d} #e.jsonl",
         f"{'x' * 240}.jsonl": b"x" * 240 + b".jsonl", "\\ufeffé\\x85\\u2028.jsonl": "\ufeffé\x85\u2028.jsonl".encode(),
         "\\xed\\xa0\\x80.jsonl": b"\xed\xa0\x80.jsonl", "null.jsonl": b"null.jsonl", "=1+1.jsonl": b"=1+1.jsonl"}


def jsonl(start: int, count: int) -> str:
    return "".join(json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}."}) + "\n"
                   for number in range(start, start + count))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    (folder / "base").mkdir()
    init(folder / "w", f"path:{folder / 'base'}", folder)
    for name, start in (("tax", 1000), ("law", 2000)):
        (folder / f"{name}.jsonl").write_text(jsonl(start, 3))
    domains.add(Workspace(folder / "w"), "tax", ["tax.jsonl"], folder, {})
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(template / "w", tmp_path / "w", symlinks=True))


def moa(workspace: Workspace, *words: str | bytes) -> subprocess.CompletedProcess[str]:
    """Output must be UTF-8 that a terminal shows as it is: one control character would be the name's own."""
    done = subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, capture_output=True, check=False,
                          env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "PYTHONIOENCODING": "utf-8"})
    out, err = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in err, err
    assert all(line.isprintable() for line in (out + err).split("\n")), out + err
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def every_command_works(workspace: Workspace, domain: str) -> None:
    for words in (["status"], ["status", "--json"], ["plan"], ["log"], ["domain", "list"],
                  ["domain", "show", domain], ["domain", "show", domain, "--json"], ["domain", "which", "Ask 2001"]):
        done = moa(workspace, *words)
        assert done.returncode == 0, (words, done.stderr)


def written(folder: Path, rows: int) -> list[Path]:
    """A file of each name."""
    paths = [folder / os.fsdecode(name) for name in NAMES.values()]
    for number, path in enumerate(paths):
        path.write_text(jsonl(2000 + rows * number, rows))
    return paths


def test_files_of_any_name_are_added(workspace: Workspace, tmp_path: Path) -> None:
    """One by one, and in a folder whose own name is no text."""
    folder = tmp_path / os.fsdecode(b"d\xffr")
    folder.mkdir()
    for path in written(folder, 3):
        path.with_name(f"{path.name[:100]}.txt").write_text("x")
    done = moa(workspace, "domain", "add", "law", *map(os.fsencode, written(tmp_path, 4)), os.fsencode(folder))
    assert done.returncode == 0, done.stderr
    shown = NAMES.keys() | {f"d\\xffr/{name}" for name in NAMES}
    assert set(origins(workspace, "law").values()) == shown and all(f"from {name}\n" in done.stdout for name in shown)
    assert all(file.name.isascii() for file in workspace.raw("law").iterdir())
    every_command_works(workspace, "law")
    assert moa(workspace, "domain", "remove", "law", "--yes").returncode == 0
    assert not workspace.tracked("law").exists()


def test_files_of_any_name_arrive(workspace: Workspace, tmp_path: Path) -> None:
    """By `moa ingest` and by hand, in folders of any name, good and bad ones."""
    done = moa(workspace, "ingest", "law", *map(os.fsencode, written(tmp_path, 40)))
    assert done.returncode == 0, done.stderr
    for domain in ("law", os.fsdecode(b"d\xffr"), "a\nb", "\u202ex"):
        for name in map(os.fsdecode, NAMES.values()):
            by_hand = workspace.incoming / domain / name
            by_hand.parent.mkdir(exist_ok=True)
            by_hand.write_text(jsonl(9000, 40))
            by_hand.with_name(f"{name[:200]}.txt").write_text("x")
    assert moa(workspace, "status").returncode == 0
    done = moa(workspace, "adapt", "--local")   # it takes in, and then finds no base
    assert "base failed: path:base" in done.stderr
    assert incoming.waiting_files(workspace) == []
    assert NAMES.keys() <= set(origins(workspace, "law").values())
    rejected = event_log.read(workspace, kinds=["rejected"])
    assert {each["domain"] for each in rejected} == {"law", "d\\xffr", "a\\nb", "\\u202ex"}
    for each in rejected:
        assert f"{each['file']}{each['reason']}".isprintable()
    for path in workspace.quarantine.rglob("*.reason.json"):
        assert json.loads(path.read_text())["origin"].isprintable()
    every_command_works(workspace, "law")


def test_a_name_that_is_too_long_for_any_file(workspace: Workspace) -> None:
    done = moa(workspace, "ingest", "law", "x" * 5000 + ".jsonl")
    assert done.returncode == 2 and done.stderr.startswith("moa: There is no file or folder xxx")
    assert len(done.stderr) < LONGEST + 200


@pytest.mark.parametrize("words", [["--map", b"instruction=caf\xe9"], ["--group-by", b"caf\xe9"],
                                   ["--template", b"{caf\xe9}"], ["--metric", b"caf\xe9"]])
def test_a_column_that_params_yaml_cannot_hold(workspace: Workspace, template: Path, words: list[str | bytes]) -> None:
    before = workspace.params.read_bytes()
    done = moa(workspace, "domain", "add", "law", str(template / "law.jsonl"), *words)
    assert done.returncode == 2 and "caf\\xe9" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert workspace.params.read_bytes() == before


def test_columns_are_shown_on_one_line(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"a\nb": "x", "\ud800": "y", "\u202e": "z"}) + "\n")
    done = moa(workspace, "domain", "add", "law", str(tmp_path / "q.jsonl"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "a\\nb" in done.stderr


@pytest.mark.parametrize("words", [[b"hub:caf\xe9@x"], [b"hub:a/b@caf\xe9"], ["hub:a/b", "--split", b"caf\xe9"]])
def test_a_hub_has_no_such_name(workspace: Workspace, words: list[str | bytes]) -> None:
    done = moa(workspace, "domain", "add", "law", *words)
    assert done.returncode == 2 and "caf\\xe9" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_file_among_the_raw_ones_that_dvc_cannot_keep(workspace: Workspace) -> None:
    path = workspace.raw("tax") / os.fsdecode(b"caf\xe9.jsonl")
    path.write_text(jsonl(2000, 3))
    for words in (["domain", "add", "tax"], ["plan"], ["status"]):
        done = moa(workspace, *words)
        assert done.returncode and done.stderr.count("\n") == 1, done.stderr
        assert "data/raw/tax/caf\\xe9.jsonl is no UTF-8" in done.stderr, done.stderr
    path.rename(path.with_name("café.jsonl"))
    assert moa(workspace, "domain", "add", "tax").returncode == 0


# A workspace in which a name was kept as it is.

def broken(workspace: Workspace, template: Path) -> None:
    """data/raw/law.dvc with the origin of a file whose name is no UTF-8, as it was once written."""
    domains.add(workspace, "law", ["law.jsonl"], template, {})
    tracked, yaml, out = workspace.tracked("law"), YAML(), StringIO()
    content = yaml.load(tracked)
    file, = content["meta"]["moa"]
    content["meta"]["moa"].update({file: "caf\udce9 \\\udce9.jsonl", "more": "\\uDCE9 \ud800\n"})
    yaml.dump(content, out)
    tracked.write_text(out.getvalue(), encoding="utf-8")
    with pytest.raises(YAMLError):
        YAML(typ="safe").load(tracked)


@pytest.mark.parametrize("words", [["domain", "remove", "law", "--yes"], ["status"],
                                   ["domain", "add", "law", "x.jsonl"]])
def test_whichever_command_comes_first_mends_it(workspace: Workspace, template: Path, words: list[str]) -> None:
    broken(workspace, template)
    (workspace.root / "x.jsonl").write_text(jsonl(3000, 3))
    done = moa(workspace, *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("moa: data/raw/law.dvc held a name that is no UTF-8") and done.stderr.count("\n") == 1
    if "remove" in words:
        assert not workspace.tracked("law").exists() and not workspace.raw("law").exists()
    else:
        assert {"caf\\xe9 \\\\xe9.jsonl", "\\uDCE9 \\ud800\n"} <= set(origins(workspace, "law").values())
    assert moa(workspace, "plan").returncode == 0


def test_a_run_that_prefect_began_mends_it_too(workspace: Workspace, template: Path) -> None:
    """It does not come through the command line."""
    from moa.workspace.data_versions import DataVersions

    broken(workspace, template)
    with DataVersions(workspace).lock():
        assert YAML(typ="safe").load(workspace.tracked("law"))


# The one function.

@given(st.text(st.characters(codec=None), max_size=700))
def test_any_text_is_one_printable_line(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and len(shown) <= LONGEST + 3
    shown.encode("utf-8")
    assert escaped(text) == text if text.isprintable() else escaped(text).isprintable()


@given(st.binary(max_size=80))
def test_any_bytes_are_too(name: bytes) -> None:
    shown = printable(os.fsdecode(name))
    assert shown.isprintable() and (os.fsencode(shown) == name or not os.fsdecode(name).isprintable())

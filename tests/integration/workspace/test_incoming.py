"""What arrives in data/incoming, on real git and DVC: whatever happens, a file is taken in, waits, or is explained."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest

from flows.steps import event_log
from moa.core import config, transaction
from moa.core.errors import ArtifactError, DataError, MoaError, UsageError
from moa.core.paths import Workspace
from moa.workspace import domains, incoming
from moa.workspace.data_versions import DataVersions
from moa.workspace.dvc_repository import DvcRepository
from moa.workspace.incoming import Arrival
from moa.workspace.init import init
from moa.workspace.pipeline import Pipeline
from moa.workspace.row_sources import HubDataset

NEW = 40   # rows, more than prepare.min_rows
PROBE = re.compile(r"\.[\w-]{22}\.tmp")   # DVC tries what links the disk knows with these; git and DVC ignore them


def jsonl(start: int, count: int, **more: str) -> str:
    return "".join(json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}.", **more}) + "\n"
                   for number in range(start, start + count))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the domain tax, and files beside it."""
    folder = tmp_path_factory.mktemp("incoming")
    (folder / "base").mkdir()
    init(folder / "w", f"path:{folder / 'base'}", folder)
    (folder / "tax.jsonl").write_text(jsonl(1000, 3))
    (folder / "law.jsonl").write_text(jsonl(0, NEW))
    (folder / "more.jsonl").write_text(jsonl(2000, 5))
    domains.add(Workspace(folder / "w"), "tax", ["tax.jsonl"], folder, {})
    return folder


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(template / "w", tmp_path / "w", symlinks=True))


def drop(workspace: Workspace, name: str, text: str | bytes) -> Path:
    """Put a file into data/incoming, as a person would."""
    path = workspace.incoming / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def take_in(workspace: Workspace) -> dict[str, incoming.IngestResult]:
    versions = DataVersions(workspace)
    with versions.lock():
        return {each.domain: each for each in incoming.ingest(versions, incoming.waiting_files(workspace))}


def test_files_are_put_back_once_with_their_origins(workspace: Workspace) -> None:
    text = jsonl(0, NEW)
    drop(workspace, "law/rows.jsonl", text)
    taken = take_in(workspace)["law"]
    path, = workspace.raw("law").iterdir()
    incoming.put_back(workspace, "law", [path])
    incoming.put_back(workspace, "law", [path])   # as after a kill in between
    waiting, = incoming.waiting_files(workspace)
    assert waiting.path.read_text() == text and waiting.domain == "law"
    other = drop(workspace, f"tax/{path.name}", jsonl(5000, 2))
    incoming.put_back(workspace, "tax", [path])   # another file has that name
    assert other.read_text() != text
    assert {each.path.read_text() for each in incoming.waiting_files(workspace)} == {text, other.read_text()}
    revert(workspace, "law", taken.before)
    again = take_in(workspace)["law"]
    assert [each["origin"] for each in again.files] == ["rows.jsonl"] and [each["name"] for each in again.files] == [
        each["name"] for each in taken.files]


def revert(workspace: Workspace, name: str, before: str | None) -> None:
    versions = DataVersions(workspace)
    with versions.lock():
        domains.revert_rows(versions, name, before)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() or path.is_symlink()}


def texts(workspace: Workspace, name: str) -> list[str]:
    return sorted(path.read_text() for path in workspace.raw(name).iterdir())


def state(workspace: Workspace) -> dict[str, Any]:
    """What people, git and DVC see of the data, without times; and whether DVC agrees that it is versioned."""
    found = {name: data for name, data in files(workspace.data).items()
             if not name.endswith(".reason.json") and not PROBE.fullmatch(Path(name).name)}
    with DvcRepository(workspace).repo() as repo:
        changed = repo.status(targets=[str(path) for path in sorted((workspace.data / "raw").glob("*.dvc"))])
    return {**found, "params": workspace.params.read_bytes(), "changed": changed}


# What waits.

def test_what_waits_and_what_is_passed_over(workspace: Workspace) -> None:
    for name in ("law/a.jsonl", "law/deep/b.CSV", "law/notes.txt", "Bad Name/c.jsonl", "direct.jsonl"):
        drop(workspace, name, "x")
    for name in (".rejected/law/a.jsonl", "law/.hidden", "law/a.jsonl.part", "law/b.TMP", "law/c.crdownload",
                 "law/d.partial", "law/e.jsonl~", ".git/x.jsonl", "law/half.part/a.jsonl"):
        drop(workspace, name, "x")
    (workspace.incoming / "law" / "dangling.jsonl").symlink_to("nowhere")
    os.mkfifo(workspace.incoming / "law" / "pipe.jsonl")
    found = {each.path.relative_to(workspace.incoming).as_posix(): each.domain
             for each in incoming.waiting_files(workspace)}
    assert found == {"law/a.jsonl": "law", "law/deep/b.CSV": "law", "law/notes.txt": "law",
                     "Bad Name/c.jsonl": "Bad Name", "direct.jsonl": ""}


def test_nothing_waits_where_there_is_no_folder(workspace: Workspace) -> None:
    assert incoming.waiting_files(workspace) == [] and take_in(workspace) == {}


def test_a_file_settles_and_has_a_signature(workspace: Workspace) -> None:
    path = drop(workspace, "law/a.jsonl", "x")
    os.utime(path, (1_000_000, 1_000_000))
    arrivals = incoming.waiting_files(workspace)
    assert incoming.settled_files(arrivals, 2, 1_000_001) == []
    assert incoming.settled_files(arrivals, 2, 1_000_002) == arrivals
    first = incoming.incoming_signature(arrivals)
    assert first == incoming.incoming_signature(incoming.waiting_files(workspace))
    path.write_text("xy")
    os.utime(path, (1_000_000, 1_000_000))
    second = incoming.incoming_signature(incoming.waiting_files(workspace))
    assert first != second != incoming.incoming_signature([])
    os.utime(path, (1e11, 1e11))   # a copy may bring a time from the future: it must not wait until then
    arrival, = incoming.waiting_files(workspace)
    assert arrival.modified < 1e11
    assert incoming.settled_files([Arrival("law", path, 1, 1e11)], 2, 1_000_000)   # as after a clock that was put back


@pytest.mark.parametrize(("name", "content", "readable", "usable"), [
    ("a.jsonl", jsonl(0, 3) + "broken\n", 3, 3),
    ("a.jsonl", '{"q": 1}\n{"q": 2}\n', 2, 0),
    ("a.csv", "instruction,output\nAsk?,Say.\n,Say.\n", 2, 1),
    ("a.json", "{", 0, 0),
    ("a.parquet", b"PAR1 not really", 0, 0),
    ("a.txt", jsonl(0, 3), 0, 0),
    ("a.jsonl", b"", 0, 0),
    (os.fsdecode(b"\xff.jsonl"), jsonl(0, 2), 2, 2),
])
def test_rows_are_counted(workspace: Workspace, name: str, content: str | bytes, readable: int, usable: int) -> None:
    path = drop(workspace, f"law/{name}", content)
    arrival, = incoming.waiting_files(workspace)
    assert incoming.count_rows(path) == readable
    assert incoming.usable_row_count(config.load(workspace.params), arrival) == usable
    assert len(incoming.incoming_signature([arrival])) == 64


def test_rows_of_a_folder_that_cannot_be_a_domains_do_not_count(workspace: Workspace) -> None:
    text = workspace.params.read_text().replace("quickstart: []", "quickstart: [math]")
    workspace.params.write_text(text)
    for name in ("Bad Name/a.jsonl", "a.jsonl", "math/a.jsonl", "base/a.jsonl", "law/a.jsonl"):
        drop(workspace, name, jsonl(0, 3))
    loaded = config.load(workspace.params)
    assert {each.domain: incoming.usable_row_count(loaded, each) for each in incoming.waiting_files(workspace)} == {
        "Bad Name": 0, "": 0, "math": 0, "base": 0, "law": 3}
    assert incoming.count_rows(workspace.incoming / "law" / "gone.jsonl") == 0


# How files get there.

def test_queueing_and_queueing_again(workspace: Workspace, template: Path) -> None:
    with DataVersions(workspace).lock():   # a build may be running for hours
        done = incoming.queue(workspace, "law", ["law.jsonl", "more.jsonl"], template)
    assert done["new"] and done["folder"] == "data/incoming/law"
    assert [(each["origin"], each["rows"]) for each in done["files"]] == [("law.jsonl", NEW), ("more.jsonl", 5)]
    names = sorted(each.path.name for each in incoming.waiting_files(workspace))
    assert names == [each["name"] for each in done["files"]]
    assert incoming.queued_text(done).startswith("2 files with 45 usable rows of the new domain law queued in data/inc")
    again = incoming.queue(workspace, "law", ["law.jsonl"], template)
    assert again["files"] == [] and again["already_waiting"] == ["law.jsonl"]
    assert incoming.queued_text(again) == "Nothing new to queue.\nWaiting already: law.jsonl."
    taken = take_in(workspace)["law"]
    assert [each["origin"] for each in taken.files] == ["law.jsonl", "more.jsonl"]
    assert {each["name"] for each in taken.files} == {each["name"] for each in done["files"]}   # no digest twice
    assert files(workspace.incoming) == {}
    assert incoming.queue(workspace, "law", ["law.jsonl"], template)["already_there"] == ["law.jsonl"]


@pytest.mark.parametrize(("name", "text", "said"), [
    ("Law", jsonl(0, 1), r"'Law' cannot be the name of a domain: a domain name is lower-case"),
    ("math", jsonl(0, 1), r"The rows of math are generated by quickstart in params.yaml: ingest yours under another"),
    ("law", '{"q": "Why?", "a": "So."}\n', r"--map instruction=q,output=a. A domain whose columns are called otherwise "
     r"begins with `moa domain add law FILE --map"),
    ("law", "", r"rows.jsonl has no rows"),
])
def test_what_cannot_be_queued_is_one_sentence(workspace: Workspace, tmp_path: Path, name: str, text: str, said: str
                                               ) -> None:
    workspace.params.write_text(workspace.params.read_text().replace("quickstart: []", "quickstart: [math]"))
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "good.jsonl").write_text(jsonl(0, 3))
    with pytest.raises((UsageError, DataError), match=said):
        incoming.queue(workspace, name, ["good.jsonl", "rows.jsonl"], tmp_path)
    with pytest.raises(UsageError, match="There is no file or folder nowhere"):
        incoming.queue(workspace, "law", ["nowhere"], tmp_path)
    with pytest.raises(UsageError, match="--revision, --split and --subset belong to"):
        incoming.queue(workspace, "law", ["good.jsonl"], tmp_path, HubDataset(split="test"))
    assert files(workspace.incoming) == {}


def test_two_that_queue_at_once(workspace: Workspace, template: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text(jsonl(5000, 50))
    script = ("import sys; from pathlib import Path; from moa.workspace import incoming; "
              "from moa.core.paths import Workspace; "
              "print(len(incoming.queue(Workspace(Path(sys.argv[1])), 'law', sys.argv[2:], Path('/'))['files']))")
    both = [Popen([sys.executable, "-c", script, workspace.root, template / "law.jsonl", more], stdout=PIPE, text=True)
            for more in (template / "more.jsonl", tmp_path / "other.jsonl")]
    said = [int(each.communicate()[0]) for each in both]
    assert sum(said) in (3, 4) and all(each.returncode == 0 for each in both)
    assert len(incoming.waiting_files(workspace)) == 3
    assert len(take_in(workspace)["law"].files) == 3


# How they are taken in.

def test_a_new_domain_and_more_of_an_old_one(workspace: Workspace) -> None:
    tracked = workspace.tracked("tax").read_text()
    drop(workspace, "law/2026/rows.jsonl", jsonl(0, NEW))
    drop(workspace, "law/twin.jsonl", jsonl(0, NEW))
    drop(workspace, "tax/rows.csv", "instruction,output\nAsk?,Say.\n")
    drop(workspace, "tax/known.jsonl", jsonl(1000, 3))
    taken = take_in(workspace)
    law, tax = taken["law"], taken["tax"]
    assert (law.new, law.before, law.already_there) == (True, None, ["twin.jsonl"])
    assert [(each["origin"], each["rows"]) for each in law.files] == [("rows.jsonl", NEW)]
    assert (tax.new, tax.before, tax.already_there) == (False, tracked, ["known.jsonl"])
    assert [each["origin"] for each in tax.files] == ["rows.csv"]
    assert "rows.csv" in domains.origins(workspace, "tax").values()
    assert list(config.load(workspace.params).domains) == ["tax", "law"]
    assert texts(workspace, "law") == [jsonl(0, NEW)] and len(texts(workspace, "tax")) == 2
    assert files(workspace.incoming) == {} and state(workspace)["changed"] == {}
    assert Pipeline(workspace).snapshot().graph.upstream("prepare@law") == ["base", "data/raw/law.dvc"]
    drop(workspace, "law/again.jsonl", jsonl(0, NEW))
    again = take_in(workspace)["law"]
    assert (again.files, again.already_there, again.rejected) == ([], ["again.jsonl"], [])
    assert files(workspace.incoming) == {}


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("law/notes.txt", "hello", "notes.txt is not of a known format; files end with .jsonl, .json"),
    ("law/empty.jsonl", "", "empty.jsonl has no rows."),
    ("law/odd.jsonl", '{"q": "Why?", "a": "So."}\n', "because of: instruction is missing"),
    ("law/cut.parquet", b"PAR1", "cut.parquet is not a Parquet file that can be read"),
    ("tax/list.json", "{", "list.json: none of its first 1 rows can be used"),
    ("Law/a.jsonl", jsonl(0, NEW), "'Law' cannot be the name of a domain"),
    ("all/a.jsonl", jsonl(0, NEW), "'all' has a meaning of its own"),
    ("a.jsonl", jsonl(0, NEW), "It lies directly in data/incoming; put it into data/incoming/NAME"),
    ("math/a.jsonl", jsonl(0, NEW), "The rows of math are generated by quickstart"),
    ("found/a.jsonl", jsonl(0, NEW), "data/raw/found holds files, and params.yaml has no domain found"),
    (os.fsdecode(b"law/\xff.txt"), "hello", "is not of a known format"),
    (f"law/{'x' * 240}.txt", "hello", "is not of a known format"),
])
def test_what_cannot_be_used_is_put_aside_with_its_reason(workspace: Workspace, name: str, content: str | bytes,
                                                          reason: str) -> None:
    workspace.params.write_text(workspace.params.read_text().replace("quickstart: []", "quickstart: [math]"))
    (workspace.raw("found")).mkdir()
    (workspace.raw("found") / "mine.jsonl").write_text(jsonl(0, 3))
    path = drop(workspace, name, content)
    drop(workspace, "law/good.jsonl", jsonl(0, NEW))
    taken = take_in(workspace)
    domain = name.rpartition("/")[0]
    fact, = taken[domain].rejected
    assert reason in fact["reason"] and not path.exists()
    kept = next(each for each in (workspace.quarantine / (domain or "-")).iterdir()
                if not each.name.endswith(".reason.json"))
    assert kept.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    told = json.loads(kept.with_name(f"{kept.name}.reason.json").read_text())
    assert reason in told["reason"] and len(told["digest"]) == 64 and told["at"] and told["from"].startswith("data/inc")
    assert [each["origin"] for each in taken["law"].files] == ["good.jsonl"]   # the others go on
    assert incoming.waiting_files(workspace) == [] and take_in(workspace) == {}


def test_files_of_one_name_that_are_rejected(workspace: Workspace) -> None:
    for text in ("one", "two", "one"):
        drop(workspace, "law/a.txt", text)
        take_in(workspace)
    drop(workspace, "law/a.txt.reason.json", "[]")
    take_in(workspace)
    kept = {name: data for name,
            data in files(workspace.quarantine / "law").items() if not name.endswith(".reason.json")
            or data == b"[]"}
    assert sorted(kept.values()) == [b"[]", b"one", b"two"]
    assert len(files(workspace.quarantine / "law")) == 6   # and a reason for each


def test_a_new_domain_with_too_few_rows_waits(workspace: Workspace) -> None:
    drop(workspace, "law/a.jsonl", jsonl(0, 20))
    drop(workspace, "law/notes.txt", "hello")
    assert take_in(workspace)["law"].rejected[0]["file"] == "notes.txt"
    assert take_in(workspace) == {}
    assert len(incoming.waiting_files(workspace)) == 1 and "law" not in config.load(workspace.params).domains
    drop(workspace, "law/b.jsonl", jsonl(20, 20))
    assert len(take_in(workspace)["law"].files) == 2 and incoming.waiting_files(workspace) == []


def test_a_file_that_somebody_has_under_another_name_is_copied(workspace: Workspace, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text(jsonl(0, NEW))
    (workspace.incoming / "law").mkdir(parents=True)
    os.link(mine, workspace.incoming / "law" / "a.jsonl")
    (workspace.incoming / "law" / "b.jsonl").symlink_to(tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").write_text(jsonl(NEW, 3))
    assert len(take_in(workspace)["law"].files) == 2 and mine.exists() and (tmp_path / "other.jsonl").exists()
    mine.write_text("changed")
    (tmp_path / "other.jsonl").write_text("changed")
    assert texts(workspace, "law") == [jsonl(0, NEW), jsonl(NEW, 3)]
    assert not any(path.is_symlink() for path in workspace.raw("law").iterdir())


def test_a_file_that_is_replaced_while_it_is_taken_in_is_not_lost(workspace: Workspace,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    path = drop(workspace, "tax/daily.jsonl", jsonl(0, 3))
    add = DataVersions.add

    def meanwhile(versions: DataVersions, folder: Path) -> None:
        add(versions, folder)
        if len(texts(workspace, "tax")) == 2:   # the file's content is there now
            drop(workspace, "tax/.next", jsonl(10, 4)).replace(path)

    with monkeypatch.context() as patch:
        patch.setattr(DataVersions, "add", meanwhile)
        take_in(workspace)
    assert path.read_text() == jsonl(10, 4)
    assert len(take_in(workspace)["tax"].files) == 1 and len(texts(workspace, "tax")) == 3


# Going back.

def test_going_back_to_what_was_before(workspace: Workspace) -> None:
    before = state(workspace)
    drop(workspace, "tax/poison.jsonl", jsonl(0, 3))
    drop(workspace, "law/poison.jsonl", jsonl(0, NEW))
    taken = take_in(workspace)
    for name, each in taken.items():
        paths = [workspace.raw(name) / file["name"] for file in each.files]
        for _ in range(2):   # whoever was killed in between does it again
            rejected = incoming.reject(workspace, name, paths, "the gate refused it")
            assert [fact["reason"] for fact in rejected] == ["the gate refused it"]
        for _ in range(2):
            revert(workspace, name, each.before)
    assert (workspace.quarantine / "tax" / taken["tax"].files[0]["name"]).read_text() == jsonl(0, 3)
    shutil.rmtree(workspace.quarantine)
    assert state(workspace) == before
    assert incoming.waiting_files(workspace) == []


def test_rows_that_people_put_there_survive_going_back(workspace: Workspace) -> None:
    (workspace.raw("tax") / "mine.jsonl").write_text(jsonl(7000, 2))   # `moa domain add tax` was forgotten
    drop(workspace, "tax/poison.jsonl", jsonl(0, 3))
    revert(workspace, "tax", take_in(workspace)["tax"].before)
    assert texts(workspace, "tax") == [jsonl(1000, 3), jsonl(7000, 2)] and state(workspace)["changed"] == {}


def test_a_domain_that_was_written_down_before_its_rows_came(workspace: Workspace) -> None:
    workspace.params.write_text(workspace.params.read_text().replace("  tax:", "  law:\n    metric: exact\n  tax:"))
    before = state(workspace)
    drop(workspace, "law/a.jsonl", jsonl(0, 3))   # prepare.min_rows is for those that nobody wrote down
    taken = take_in(workspace)["law"]
    assert not taken.new and taken.before == ""
    revert(workspace, "law", taken.before)
    assert state(workspace) == before


def test_going_back_without_the_bytes_changes_nothing(workspace: Workspace) -> None:
    drop(workspace, "tax/a.jsonl", jsonl(0, 3))
    taken = take_in(workspace)["tax"]
    now = state(workspace)
    assert taken.before is not None
    cache = DvcRepository(workspace).cache()
    earlier = jsonl(1000, 3).encode()
    gone, = (path for path in cache.rglob("*") if path.is_file() and path.read_bytes() == earlier)
    gone.chmod(0o644)
    aside = gone.rename(gone.with_name("aside"))
    with pytest.raises(ArtifactError, match=r"DVC's cache lacks 1 of the 1 earlier files of tax: run `dvc fetch`"):
        revert(workspace, "tax", taken.before)
    assert aside.exists() and files(workspace.data) == {name: data for name, data in now.items()
                                                        if name not in ("params", "changed")}


# Whatever ends the process.

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEPS = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "shutil.copyfile"}


def killed(action: Callable[[], object], root: Path, step: int) -> bool:
    """Let a process do `action` and kill it before its `step`-th change of data, params.yaml or journal. Whether it
    was."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event: str, words: tuple[Any, ...]) -> None:
            nonlocal count
            writing = event == "open" and isinstance(words[2], int) and words[2] & WRITING
            if (writing or event in STEPS) and isinstance(words[0], str | os.PathLike):
                path = os.fspath(words[0])
                if path.startswith((f"{root}/data/", f"{root}/params", f"{root}/.moa/change")):
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(audit)
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def contents(workspace: Workspace) -> set[bytes]:
    """Everything that is in one of the places where it cannot be lost."""
    found = {**files(workspace.data / "raw"), **files(workspace.quarantine)}
    return {*found.values(), *(each.path.read_bytes() for each in incoming.waiting_files(workspace))}


STRIDE = int(os.environ.get("MOA_TEST_STRIDE", "17"))   # 1 = every step, which takes minutes


def test_killed_anywhere_the_next_one_ends_the_same(workspace: Workspace, tmp_path: Path) -> None:
    arrived = {"law/a.jsonl": jsonl(0, NEW), "law/notes.txt": "hello", "tax/more.jsonl": jsonl(50, 5),
               "tax/known.jsonl": jsonl(1000, 3)}
    for name, text in arrived.items():
        drop(workspace, name, text)
    copied = Workspace(tmp_path / "copy")

    def again() -> None:
        shutil.rmtree(copied.root, ignore_errors=True)
        shutil.copytree(workspace.root, copied.root, symlinks=True)

    again()
    take_in(copied)
    expected = state(copied)
    steps = 0
    for step in range(1, 1000, STRIDE):
        again()
        if not killed(lambda: take_in(copied), copied.root, step):
            break
        transaction.recover(copied)
        assert contents(copied) >= {text.encode() for text in arrived.values()}, f"step {step}"
        take_in(copied)
        assert state(copied) == expected, f"step {step}"
        steps += 1
    assert steps > 60 / STRIDE


def test_killed_while_it_queues_the_queue_has_whole_files_only(workspace: Workspace, template: Path) -> None:
    def action() -> object:
        return incoming.queue(workspace, "law", ["law.jsonl", "more.jsonl"], template)

    whole = {(template / name).read_bytes() for name in ("law.jsonl", "more.jsonl")}
    seen = set()
    for step in range(1, 100):
        shutil.rmtree(workspace.incoming, ignore_errors=True)
        ended = killed(action, workspace.root, step)
        there = {each.path.read_bytes() for each in incoming.waiting_files(workspace)}
        assert there <= whole
        seen.add(len(there))
        action()
        assert {each.path.read_bytes() for each in incoming.waiting_files(workspace)} == whole
        assert not list(workspace.incoming.rglob("*.part"))
        if not ended:
            break
    assert step > 6 and seen == {0, 1, 2}


def refused(action: Callable[[], object], limit: int) -> str:
    """What `action` says in a process that may write no file of more than `limit` bytes, as if the disk were full."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                action()
            except MoaError as error:
                os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(workspace: Workspace, tmp_path: Path) -> None:
    big = jsonl(0, NEW, more="x" * 100_000)
    (tmp_path / "big.jsonl").write_text(big)
    said = refused(lambda: incoming.queue(workspace, "law", ["big.jsonl"], tmp_path), 1 << 20)
    assert said == "ArtifactError: big.jsonl cannot be copied to law: File too large."   # the machine, not the rows
    assert files(workspace.incoming) == {}
    incoming.queue(workspace, "law", ["big.jsonl"], tmp_path)
    before = state(workspace)
    said = refused(lambda: take_in(workspace), 1 << 20)
    assert said == "PipelineError: DVC cannot version data/raw/law: File too large."
    assert state(workspace) == before
    taken = take_in(workspace)["law"]
    assert [each["origin"] for each in taken.files] == ["big.jsonl"] and texts(workspace, "law") == [big]


# The command line.

def moa(workspace: Workspace, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", "--workspace", workspace.root, *words], cwd=cwd,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"})   # where nobody listens


def test_ingest_queues_and_says_who_will_learn_it(workspace: Workspace, template: Path) -> None:
    done = moa(workspace, "ingest", "law", "law.jsonl", cwd=template)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ("1 file with 40 usable rows of the new domain law queued in "
                                           "data/incoming/law.")
    assert done.stdout.splitlines()[-1] == "`moa up` does not run: run `moa up`, or `moa adapt` once, to learn it."
    workspace.up.write_text(json.dumps({"pid": os.getpid(), "api": "http://127.0.0.1:9/api"}))
    again = json.loads(moa(workspace, "ingest", "law", "law.jsonl", "more.jsonl", "--json", cwd=template).stdout)
    assert again["watched"] and again["already_waiting"] == ["law.jsonl"] and len(again["files"]) == 1
    bad = moa(workspace, "ingest", "law", "nowhere.jsonl", cwd=template)
    assert bad.returncode == 2 and bad.stderr.startswith("moa: There is no file or folder nowhere.jsonl;")


def test_log_shows_the_events(workspace: Workspace) -> None:
    assert moa(workspace, "log").stdout == "Nothing has happened yet.\n"
    event_log.append(workspace, "arrived", domain="law", rows=40)
    event_log.append(workspace, "skipped", reason="within the cool-down")
    assert [line.split("  ", 2)[2] for line in moa(workspace, "log").stdout.splitlines()] == [
        "arrived  40 rows of law", "skipped  no run: within the cool-down"]
    assert [each["kind"] for each in json.loads(moa(workspace, "log", "--last", "1", "--json").stdout)["entries"]
            ] == ["skipped"]
    assert "arrived" in moa(workspace, "log", "--kind", "arrived").stdout
    wrong = moa(workspace, "log", "--kind", "arived")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("moa: The event log has no kind 'arived'; its kinds are arri")

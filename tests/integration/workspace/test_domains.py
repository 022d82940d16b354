"""`moa domain` on real git and DVC: what is taken in, from where, how it is kept, and how it goes."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from moa.core import config
from moa.core.errors import DataError, UsageError
from moa.core.paths import Workspace
from moa.reports import domains as inventory
from moa.workspace import domains
from moa.workspace.init import init
from moa.workspace.pipeline import Pipeline
from moa.workspace.stage_graph import RESTORE

COMMIT = "0123456789" * 4


def jsonl(*numbers: int) -> str:
    return "".join(json.dumps({"instruction": f"Ask {number}?", "output": f"Say {number}."}) + "\n"
                   for number in numbers)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Files to add, beside a workspace."""
    (tmp_path / "base").mkdir()
    init(tmp_path / "w", f"path:{tmp_path / 'base'}", tmp_path)
    (tmp_path / "one.jsonl").write_text(jsonl(1))
    (tmp_path / "two.jsonl").write_text(jsonl(2))
    return tmp_path


@pytest.fixture
def workspace(desk: Path) -> Workspace:
    return Workspace(desk / "w")


def names(workspace: Workspace, domain: str) -> list[str]:
    return sorted(path.name for path in workspace.raw(domain).iterdir())


def tracked(workspace: Workspace, domain: str) -> Any:
    return YAML(typ="safe").load(workspace.tracked(domain))


# Adding.

def test_files_are_known_by_their_content(workspace: Workspace, desk: Path) -> None:
    shutil.copy(desk / "one.jsonl", desk / "copy of one.jsonl")
    done = domains.add(workspace, "law", ["one.jsonl", "copy of one.jsonl"], desk, {})
    digest = hashlib.sha256(jsonl(1).encode()).hexdigest()
    assert names(workspace, "law") == [f"one-{digest[:12]}.jsonl"]
    assert done["new"] and done["already_there"] == ["copy of one.jsonl"]
    assert done["files"] == [{"name": f"one-{digest[:12]}.jsonl", "origin": "one.jsonl", "size": len(jsonl(1)),
                              "digest": digest}]
    assert done["changed"] == ["params.yaml", "data/raw/law", "data/raw/law.dvc"]
    again = domains.add(workspace, "law", ["one.jsonl"], desk, {"metric": "rouge_l"})
    assert again["changed"] == [] and not again["new"] and again["already_there"] == ["one.jsonl"]
    more = domains.add(workspace, "law", ["two.jsonl"], desk, {})
    assert more["changed"] == ["data/raw/law", "data/raw/law.dvc"] and len(names(workspace, "law")) == 2
    assert set(domains.origins(workspace, "law").values()) == {"one.jsonl", "two.jsonl"}
    assert tracked(workspace, "law")["outs"][0]["nfiles"] == 2
    graph = Pipeline(workspace).snapshot().graph   # what `dvc push` and `dvc gc` know of
    assert graph.upstream("prepare@law") == ["base", "data/raw/law.dvc"]
    assert not [path for path in workspace.data.rglob(".gitignore") if path.parent != workspace.data]


def test_a_file_that_was_edited_in_place_is_not_overwritten(workspace: Workspace, desk: Path) -> None:
    domains.add(workspace, "law", ["one.jsonl"], desk, {})
    file, = workspace.raw("law").iterdir()
    file.unlink()   # editors write anew; DVC's copy in the cache may be the same file
    file.write_text(jsonl(7))
    domains.add(workspace, "law", ["one.jsonl"], desk, {})
    assert file.read_text() == jsonl(7)
    assert sorted(path.read_text() for path in workspace.raw("law").iterdir()) == [jsonl(1), jsonl(7)]


def test_a_folder_of_several_formats(workspace: Workspace, desk: Path) -> None:
    folder = desk / "rows"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.JSON").write_text(json.dumps([json.loads(jsonl(1))]))
    (folder / "deep" / "b.tsv").write_text("instruction\toutput\nAsk?\tSay.\n")
    (folder / "readme.md").write_text("hello")
    (folder / ".hidden.csv").write_text("x\n")
    done = domains.add(workspace, "law", ["rows"], desk, {})
    assert [each["origin"] for each in done["files"]] == ["rows/a.JSON", "rows/deep/b.tsv"]
    assert done["ignored"] == [".hidden.csv", "readme.md"]
    assert "Passed over, not of a known format: 2 files (.hidden.csv, readme.md)." in inventory.added_text(done)
    assert {Path(name).suffix for name in names(workspace, "law")} == {".json", ".tsv"}


def test_how_rows_are_read_is_written_down(workspace: Workspace, desk: Path) -> None:
    (desk / "t.csv").write_text("q,where,a,topic\nWhy?,here,So.,x\n")
    domains.add(workspace, "law", ["t.csv"], desk, {"metric": "json_equal", "map": {"output": "a"}, "group_by": "topic",
                                                    "template": "At {where}: {q}"})
    text = workspace.params.read_text()
    assert ('domains:\n  law:\n    metric: json_equal\n    map:\n      output: a\n    group_by: topic\n'
            '    template: "At {where}: {q}"\n') in text or "    template: 'At {where}: {q}'\n" in text
    assert "# One LoRA expert each." in text and "# null = the chat template's own system message" in text
    domain = config.load(workspace.params).domains["law"]
    assert domain.template == "At {where}: {q}" and domain.group_by == "topic" and domain.map == {"output": "a"}
    with pytest.raises(UsageError, match=r"params\.yaml reads law with template: At"):
        domains.add(workspace, "law", ["t.csv"], desk, {"template": "{q}"})


def test_rows_need_not_be_alike(workspace: Workspace, desk: Path) -> None:
    lines = [json.dumps({"id": number}) for number in range(300)]
    lines[5] = json.dumps({"q": "?", "output": "!"})
    lines[250] = json.dumps({"q": "?", "context": "late", "output": "!"})
    (desk / "mixed.jsonl").write_text("\n".join(lines))
    domains.add(workspace, "law", ["mixed.jsonl"], desk, {"map": {"instruction": "q", "input": "context"}})
    with pytest.raises(DataError, match=r"mixed\.jsonl has no column 'nowhere', which --map system names"):
        domains.add(workspace, "tax", ["mixed.jsonl"], desk, {"map": {"instruction": "q", "system": "nowhere"}})


def test_rows_that_lie_there_already(workspace: Workspace, desk: Path) -> None:
    workspace.raw("law").mkdir(parents=True)
    (workspace.raw("law") / "mine.jsonl").write_text(jsonl(3))
    done = domains.add(workspace, "law", [], desk, {})
    assert done["versioned_along"] == ["mine.jsonl"] and done["files"] == []
    assert done["changed"] == ["params.yaml", "data/raw/law.dvc"]
    (workspace.raw("law") / "later.jsonl").write_text(jsonl(4))
    assert domains.add(workspace, "law", [], desk, {})["changed"] == ["data/raw/law.dvc"]
    assert tracked(workspace, "law")["outs"][0]["nfiles"] == 2


def test_a_domain_that_moa_generates(workspace: Workspace, desk: Path) -> None:
    text = workspace.params.read_text().replace("quickstart: []", "quickstart: [math, sql]   # two")
    workspace.params.write_text(text.replace("domains: {}", "domains:\n  math:\n    metric: final_number\n"))
    assert "quickstart@math" in Pipeline(workspace).snapshot().stale
    Pipeline(workspace).reproduce("quickstart@math", lambda _: None)
    with pytest.raises(UsageError, match="The rows of math are generated by quickstart@math"):
        domains.add(workspace, "math", ["one.jsonl"], desk, {})
    done = domains.remove(workspace, "math")
    assert done["lock_entries"] == ["quickstart@math"] and done["others"] == 1
    assert "quickstart: [sql]   # two" in workspace.params.read_text()
    domains.add(workspace, "math", ["one.jsonl"], desk, {})
    assert len(names(workspace, "math")) == 1


def test_git_that_would_not_keep_the_digest(workspace: Workspace, desk: Path) -> None:
    ignore = workspace.data / ".gitignore"
    ignore.write_text(ignore.read_text().replace("/raw/?*/", "/raw/"))
    with pytest.raises(Exception, match=r"git-ignored. Let git keep it: write `/raw/\?\*/` instead of"):
        domains.add(workspace, "law", ["one.jsonl"], desk, {})
    assert not workspace.raw("law").exists() and config.load(workspace.params).domains == {}


# A hub's data sets: a stand-in on this machine speaks the hub's language.

FILES = {"train.jsonl": b'{"q": "Ask?", "a": "Say."}\n{"q": "Why?", "a": "So."}\n',
         "test.jsonl": b'{"q": "How?", "a": "Thus."}\n'}


class StandIn(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(with_body=False)

    def do_GET(self) -> None:
        self.reply(with_body=True)

    def reply(self, *, with_body: bool) -> None:
        status, body, headers = self.found(self.path.partition("?")[0])
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    @staticmethod
    def found(path: str) -> tuple[int, bytes, dict[str, str]]:
        listing = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                   for name, body in FILES.items()]
        if path in (f"/api/datasets/own/set/revision/{name}" for name in ("main", COMMIT)):
            facts = {"id": "own/set", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            return 200, json.dumps(facts).encode(), {"Content-Type": "application/json"}
        if path == f"/api/datasets/own/set/tree/{COMMIT}":
            return 200, json.dumps(listing).encode(), {"Content-Type": "application/json"}
        name = path.rpartition("/")[2]
        if path == f"/datasets/own/set/resolve/{COMMIT}/{name}" and name in FILES:
            return 200, FILES[name], {"ETag": f'"{hashlib.sha1(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        missing = "RepoNotFound" if "/own/set" not in path else "RevisionNotFound" if "/revision/" in path else ""
        return 404, b"", {"X-Error-Code": missing or "EntryNotFound"}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment in which the hub is the stand-in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
           "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    server.shutdown()
    server.server_close()
    thread.join()


def add(workspace: Workspace, environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", "domain", "add", *words], cwd=workspace.root, text=True,
                          capture_output=True, env=environment)


def test_a_data_set_of_a_hub(workspace: Workspace, hub: dict[str, str]) -> None:
    reading = ("--map", "instruction=q,output=a")
    done = add(workspace, hub, "law", "hub:own/set@main", *reading)
    assert done.returncode == 0, done.stderr
    file, = workspace.raw("law").iterdir()
    assert file.name.startswith("own-set-train-") and file.suffix == ".parquet"
    assert pq.read_table(file).to_pylist() == [{"q": "Ask?", "a": "Say."}, {"q": "Why?", "a": "So."}]
    assert domains.origins(workspace, "law") == {file.name: f"hub:own/set@{COMMIT} train"}
    again = add(workspace, hub, "law", "hub:own/set", "--revision", COMMIT)
    assert "Already there, not copied again" in again.stdout
    assert add(workspace, hub, "law", "hub:own/set", "--split", "test").returncode == 0
    assert len(names(workspace, "law")) == 2 and not (workspace.local / "intake").exists()
    for words, sentence in (
            (("hub:own/none",), "The hub has no data set own/none, or it is private"),
            (("hub:own/set@v9",), "The data set own/set has no revision v9"),
            (("hub:own/set", "--split", "nowhere"), "The split 'nowhere' of the data set own/set cannot be read"),
            (("hub:own/set", "--subset", "nowhere"), "The split 'train' of the data set own/set cannot be read")):
        bad = add(workspace, hub, "tax", *words, *reading)
        assert bad.returncode == 1 and bad.stderr.startswith(f"moa: {sentence}"), bad.stderr
        assert bad.stderr.count("\n") == 1
    gone = add(workspace, {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}, "tax", "hub:own/set", *reading)
    assert gone.returncode == 1 and gone.stderr.startswith("moa: The hub cannot be asked for the data set own/set: ")
    assert not workspace.raw("tax").exists()


# Looking and removing.

def test_list_and_show(workspace: Workspace, desk: Path) -> None:
    domains.add(workspace, "law", ["one.jsonl"], desk, {})
    domains.add(workspace, "tax", ["two.jsonl", "one.jsonl"], desk, {"metric": "json_equal"})
    content = config.load(workspace.params)
    text = inventory.listed_text(inventory.listed(workspace, content))
    assert [line.split()[:3] for line in text.splitlines()] == [
        ["domain", "metric", "files"], ["law", "rouge_l", "1"], ["tax", "json_equal", "2"]]
    shown = inventory.shown(workspace, content, "tax")
    assert {each["origin"] for each in shown["sources"]} == {"one.jsonl", "two.jsonl"}
    assert shown["steps"] == {"prepare": "never run", "train": "never run"} and shown["champion"] is None
    assert "two.jsonl" in inventory.shown_text(shown)


def objects(workspace: Workspace) -> set[bytes]:
    return {path.read_bytes() for path in (workspace.root / ".dvc" / "cache" / "files").rglob("*") if path.is_file()}


def test_purging_deletes_every_version_that_nothing_else_uses(workspace: Workspace, desk: Path) -> None:
    for number in (3, 4):   # 3 is the other domain's, too
        (desk / f"{number}.jsonl").write_text(jsonl(number))
    domains.add(workspace, "law", ["one.jsonl"], desk, {})
    for words in (["add", "."], ["-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x"]):
        subprocess.run(["git", *words], cwd=workspace.root, check=True)
    for file in workspace.raw("law").iterdir():
        file.unlink()
    domains.add(workspace, "law", ["3.jsonl", "4.jsonl"], desk, {})
    domains.add(workspace, "tax", ["3.jsonl"], desk, {})
    kept = domains.remove(workspace, "law")
    assert kept["purged"] is None and {jsonl(1).encode(), jsonl(4).encode()} <= objects(workspace)
    purged = domains.remove(workspace, "law", purge=True)["purged"]
    assert jsonl(3).encode() in objects(workspace)
    assert not {jsonl(1).encode(), jsonl(4).encode()} & objects(workspace) and purged["kept"] == 1
    assert Pipeline(workspace).snapshot().stale["prepare@tax"][0].kind != RESTORE


def test_the_last_domain_may_go(workspace: Workspace, desk: Path) -> None:
    before = workspace.params.read_bytes()
    domains.add(workspace, "law", ["one.jsonl"], desk, {})
    domains.remove(workspace, "law")
    assert workspace.params.read_bytes() == before
    assert inventory.listed_text(inventory.listed(workspace, config.load(workspace.params))).startswith("There are no")

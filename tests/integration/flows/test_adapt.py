"""What arrives is learned: new domains, new rows, bad rows, and everything that can go wrong on the way. The tiny base;
real git, DVC, MLflow, and each run a process of its own, as `moa up` would start it."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows.steps import event_log
from moa.cli.app import exit_code
from moa.core import digests
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.mixture import incumbent
from tests import tiny
from tests.waiting import Gate, until

ROWS = 150
FEW = 40   # rows that alpha begins with: so few that more of them surely make its expert better, on any CPU
PARAMS: dict[str, Any] = {
    "train": {"rank": 2, "alpha": 4.0, "epochs": 2, "batch_rows": 8, "learning_rate": 0.02, "batch_tokens": 2048},
    "evaluate": {"generate_rows": 2, "max_new_tokens": 8},
    "assemble": {"max_abstention": 0.0},
    "release": {"min_rows": 4, "metric_rows": 0, "tolerance": 0.06},   # one prompt of 26 may be left to the base
    "adapt": {"settle": 0.0, "debounce": 0.0, "golden": 1},
}


def environment(**extra: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_TRACKING", "PREFECT_API"))}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def start(workspace: Workspace, *words: str, limit: int | None = None, **extra: str) -> subprocess.Popen[str]:
    """`limit`: bytes that a file may grow to, as on a disk that fills up."""
    def full_soon() -> None:
        assert limit is not None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen([sys.executable, "-m", "moa", *words], cwd=workspace.root, env=environment(**extra),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=full_soon if limit else None)


def moa(workspace: Workspace, *words: str, status: int = 0, **how: Any) -> str:
    process = start(workspace, *words, **how)
    out, err = process.communicate()
    assert process.returncode == status, f"{words}: {out}\n{err}"
    assert "Traceback" not in err
    return out if status == 0 else out + err


def adapt(workspace: Workspace, **how: Any) -> dict[str, Any]:
    """One adaptation in a process of its own; what was done."""
    return dict(json.loads(moa(workspace, "adapt", "--local", "--json", **how)))


def drop(workspace: Workspace, domain: str, rows: Sequence[dict[str, str]], name: str = "rows.jsonl") -> Path:
    path = workspace.root / "data" / "incoming" / domain / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(domain: str, numbers: Sequence[int]) -> list[dict[str, str]]:
    return [tiny.telling_row(domain, number) for number in numbers]


def champion(workspace: Workspace) -> int:
    return int(json.loads(moa(workspace, "release", "list", "--json"))["champion"])


def kinds(workspace: Workspace, since: int = 0) -> list[str]:
    return [entry["kind"] for entry in event_log.read(workspace) if entry["n"] > since]


def experts(workspace: Workspace) -> dict[str, str]:
    return {path.parent.name: read_json(path)["digest"] for path in workspace.data.glob(f"experts/*/{MANIFEST}")}


def waiting(workspace: Workspace) -> list[str]:
    folder = workspace.root / "data" / "incoming"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")
                  if path.is_file() and ".rejected" not in path.parts and not path.name.startswith("."))


def release_digest(workspace: Workspace, version: int) -> str:
    return str(json.loads(moa(workspace, "release", "show", str(version), "--json"))["digest"])


def fresh(workspace: Workspace) -> bool:
    return not json.loads(moa(workspace, "plan", "--json"))["stale"]


def made(root: Path) -> Workspace:
    """A workspace of two domains with a champion."""
    workspace = tiny.workspace(root, ("alpha", "beta"), rows=ROWS, **PARAMS)
    for name, count in (("alpha", FEW), ("beta", ROWS)):
        (workspace.raw(name) / "rows.jsonl").write_text("".join(
            json.dumps(row) + "\n" for row in rows(name, range(count))), encoding="utf-8")
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment())
    (root / ".gitignore").write_text(".moa/\n*.tmp\n")
    for name in ("alpha", "beta"):
        moa(workspace, "domain", "add", name)
    moa(workspace, "run", "--local")
    assert champion(workspace) == 1
    return workspace


@dataclass
class Learned:
    """A workspace that has learned its third domain, gamma; what its experts were before, and what was done."""

    workspace: Workspace
    before: dict[str, str]
    done: dict[str, Any]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    workspace = made(tmp_path_factory.mktemp("adapting") / "w")
    before = experts(workspace)
    drop(workspace, "gamma", rows("gamma", range(ROWS)))
    done = adapt(workspace)
    text = workspace.params.read_text()   # candidates and golden answers were in this adaptation; others do without
    workspace.params.write_text(text.replace("golden: 1", "golden: 0\n  candidates: 0"))
    shutil.copytree(workspace.root, workspace.root.with_name("kept"), symlinks=True)
    return Learned(workspace, before, done)


@pytest.fixture
def workspace(learned: Learned) -> Workspace:
    """As it was then, and in the same folder, which MLflow's database names."""
    root = learned.workspace.root
    shutil.rmtree(root)
    shutil.copytree(root.with_name("kept"), root, symlinks=True)
    return learned.workspace


def test_a_new_domain(workspace: Workspace, learned: Learned) -> None:
    done, before = learned.done, learned.before
    assert done["state"] == "released" and done["version"] == champion(workspace) == 2
    assert {name: digest for name, digest in experts(workspace).items() if name != "gamma"} == before
    assert kinds(workspace) == ["started", "arrived", "start-chosen", "trained", "gate", "released", "forgetting",
                                "finished"]
    assert set(done["forgetting"]["golden"]) == {"alpha", "beta"} and done["forgetting"]["equal"]
    chosen = event_log.read(workspace, kinds=["start-chosen"])[-1]
    assert {each["parent"] for each in chosen["table"]} == {None, "alpha", "beta"}
    assert not waiting(workspace) and fresh(workspace)
    assert YAML(typ="safe").load(workspace.params)["domains"].keys() == {"alpha", "beta", "gamma"}
    assert event_log.read(workspace, kinds=["trained"])[-1]["domains"] == ["gamma"]
    # The router is the first champion's, grown; the stages know the new champion now.
    router = read_json(workspace.mixture / MANIFEST)["router"]
    assert router["extends"] == release_digest(workspace, 1)
    assert read_json(workspace.champion / MANIFEST)["digest"] == release_digest(workspace, 2)
    assert incumbent.rows(workspace) and workspace.champion.with_name("champion.dvc").is_file()


def test_the_same_file_again(workspace: Workspace) -> None:
    before, last = experts(workspace), len(event_log.read(workspace))
    drop(workspace, "gamma", rows("gamma", range(ROWS)), "again.jsonl")
    assert adapt(workspace)["state"] == "skipped"
    assert not waiting(workspace) and experts(workspace) == before and champion(workspace) == 2 and fresh(workspace)
    assert "trained" not in kinds(workspace, last)
    assert adapt(workspace) == {"state": "skipped", "reason": "nothing that can be learned waits.", "wait": None}


def test_new_rows_continue_the_expert(workspace: Workspace) -> None:
    before = experts(workspace)
    drop(workspace, "alpha", rows("alpha", range(FEW, 2 * ROWS)))
    done = adapt(workspace)
    assert done["state"] in ("released", "kept"), done
    manifest = read_json(workspace.expert("alpha") / MANIFEST)
    assert manifest["parent"] == {"domain": "alpha", "digest": before["alpha"]}
    assert manifest["curve"][0]["epoch"] == 0 and manifest["best_loss"] <= manifest["curve"][0]["validation_loss"]
    assert {name: digest for name, digest in experts(workspace).items() if name != "alpha"} == {
        name: digest for name, digest in before.items() if name != "alpha"}
    assert fresh(workspace)


def test_unusable_files_are_set_aside(workspace: Workspace) -> None:
    last, version = len(event_log.read(workspace)), champion(workspace)
    folder = workspace.root / "data" / "incoming"
    (folder / "delta").mkdir(parents=True, exist_ok=True)
    (folder / "delta" / "notes.txt").write_text("hello")
    (folder / "delta" / "broken.jsonl").write_text("{\n")
    assert adapt(workspace)["state"] == "skipped"
    assert not waiting(workspace) and champion(workspace) == version
    rejected = [entry for entry in event_log.read(workspace, kinds=["rejected"]) if entry["n"] > last]
    assert {entry["file"] for entry in rejected} == {"notes.txt", "broken.jsonl"}
    aside = folder / ".rejected" / "delta"
    assert (aside / "notes.txt").read_text() == "hello"
    assert all(read_json(path)["reason"] for path in aside.glob("*.reason.json"))


def poisoned(domain: str) -> list[dict[str, str]]:
    """Its questions, each answered with one word: what a broken export does. An expert surely learns that."""
    good = rows(domain, range(3 * ROWS, 5 * ROWS))
    return [{**row, "output": "no " * (20 + number % 40)} for number, row in enumerate(good)]


def test_poison_is_refused_and_undone(workspace: Workspace) -> None:
    version, before = champion(workspace), experts(workspace)
    raw = sorted(path.name for path in workspace.raw("beta").iterdir())
    tracked = workspace.tracked("beta").read_text()
    drop(workspace, "beta", poisoned("beta"), "poison.jsonl")
    drop(workspace, "delta", rows("delta", range(ROWS)), "good.jsonl")   # arrives at the same time
    done = adapt(workspace)
    assert done["state"] == "released" and done["undone"].keys() == {"beta"}, done
    assert champion(workspace) == done["version"] > version
    assert read_json(workspace.mixture / MANIFEST)["router"]["extends"] == release_digest(workspace, version)
    assert read_json(workspace.champion / MANIFEST)["digest"] == release_digest(workspace, done["version"])
    assert {name: digest for name, digest in experts(workspace).items() if name != "delta"} == before
    assert sorted(path.name for path in workspace.raw("beta").iterdir()) == raw
    assert workspace.tracked("beta").read_text() == tracked and fresh(workspace)
    aside = workspace.root / "data" / "incoming" / ".rejected" / "beta"
    reason, = [read_json(path)["reason"] for path in aside.glob("poison*.reason.json")]
    assert reason.startswith("the gate refused it: ") and "beta" in reason
    assert event_log.read(workspace, kinds=["undone"])[-1]["domains"] == ["beta"]

    said = moa(workspace, "adapt", "--local", "--accept", "beta", status=2)
    assert "--accept NAME needs --reason TEXT" in said
    said = moa(workspace, "adapt", "--local", "--accept", "delta", "--reason", "checked", status=2)
    assert "No rows of delta were refused" in said and champion(workspace) == done["version"]
    last = len(event_log.read(workspace))
    accepted = json.loads(moa(workspace, "adapt", "--local", "--json", "--accept", "beta", "--reason", "checked"))
    assert accepted["state"] == "released" and accepted["reason"] == "accepted beta: checked."
    assert champion(workspace) == accepted["version"] and not list(aside.iterdir()) and fresh(workspace)
    entry = json.loads(moa(workspace, "release", "history", "--json"))["history"][-1]
    assert entry["version"] == accepted["version"] and entry["reason"] == "accepted beta: checked"
    shown = json.loads(moa(workspace, "release", "show", str(accepted["version"]), "--json"))
    assert shown["gate"]["harm"] and shown["gate"]["worse"] == ["beta"]
    assert kinds(workspace, last)[:3] == ["started", "accepted", "arrived"]


def test_too_few_test_groups_wait_before_any_training(workspace: Workspace) -> None:
    """Rows of one answer are a group: of these eight three are in the test split, and four are needed."""
    words = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
    few = [{**row, "output": f"the answer is {words[number % 8]} today"}
           for number, row in enumerate(rows("dusk", range(64)))]
    drop(workspace, "dusk", few)
    drop(workspace, "delta", rows("delta", range(ROWS)))   # arrives at the same time, and is released
    done = adapt(workspace)
    assert done["state"] == "released" and done["deferred"].keys() == {"dusk"} and not done["undone"], done
    said = done["deferred"]["dusk"]
    assert said == "dusk waits: not enough data: 22 more rows of dusk"
    assert [entry["domains"] for entry in event_log.read(workspace, kinds=["trained"])][-1] == ["delta"]
    assert len(waiting(workspace)) == 1 and "dusk" not in experts(workspace) and fresh(workspace)
    last = len(event_log.read(workspace))
    again = moa(workspace, "adapt", "--local", status=4)
    assert f"Nothing was done: {said}." in again and kinds(workspace, last) == ["skipped"]
    assert f"{said}." in moa(workspace, "status") and said in moa(workspace, "log")


# Whatever ends a run, the next one ends what it began.

def kill_when(process: subprocess.Popen[str], seen: Callable[[], object]) -> None:
    until(seen, process)
    process.kill()
    process.communicate()


def after(workspace: Workspace, last: int, kind: str) -> Callable[[], bool]:
    return lambda: any(entry["n"] > last and entry["kind"] == kind for entry in event_log.read(workspace))


STEPS = ["ingest", "commit of rows", "choice of the start", "training", "commit of the expert", "assembling",
         "registration", "promotion"]


def test_killed_at_every_step(workspace: Workspace, tmp_path: Path) -> None:
    """kill -9 again and again during one adaptation, each time a step further; the last one ends it. Every second step,
    or every one with MOA_EVERY_STEP=1."""
    version, last = champion(workspace), len(event_log.read(workspace))
    drop(workspace, "onyx", rows("onyx", range(ROWS)))
    raw = workspace.raw("onyx")
    shutil.rmtree(workspace.logs)   # so that a log which is there is of a step that has begun

    def begun(name: str) -> Callable[[], bool]:
        return lambda: any(workspace.logs.glob(name))

    # The first is held there. What is seen of the others stays: a look that comes late kills later, which must do, too.
    gate = Gate(tmp_path, "moa.workspace.data_versions:DataVersions.add")
    moments: dict[str, Callable[[], object]] = {
        "ingest": gate.reached,
        "commit of rows": lambda: workspace.tracked("onyx").exists() or any(raw.glob("*")),
        "choice of the start": after(workspace, last, "arrived"),
        "training": begun("train@*onyx*.log"),
        "commit of the expert": lambda: (workspace.expert("onyx") / MANIFEST).exists(),
        "assembling": begun("assemble.log"),
        "registration": begun("evaluate.log"),
        "promotion": after(workspace, last, "gate"),
    }
    assert list(moments) == STEPS
    for seen in list(moments.values())[::1 if os.environ.get("MOA_EVERY_STEP") else 2]:
        kill_when(start(workspace, "adapt", "--local", **gate.environment), seen)
        gate.open()
        assert champion(workspace) in (version, version + 1)
    if workspace.adaptation_state.exists() or waiting(workspace):   # the last kill may have come after its end
        done = adapt(workspace)
        assert done["state"] in ("released", "kept")
    assert champion(workspace) == version + 1 and not waiting(workspace) and not workspace.adaptation_state.exists()
    assert "onyx" in experts(workspace) and fresh(workspace)
    assert len([path for path in raw.iterdir() if path.suffix == ".jsonl"]) == 1
    assert "taken-over" in kinds(workspace, last)


def test_one_misfortune_after_the_other(workspace: Workspace) -> None:
    """The same rows meet a full disk, an MLflow that does not answer, and two triggers at once."""
    raw, version = workspace.raw("alpha"), champion(workspace)
    before = digests.of_files(sorted(raw.iterdir()), raw)
    path = drop(workspace, "quilt", rows("quilt", range(ROWS)))
    said = moa(workspace, "adapt", "--local", status=1, limit=4096)
    assert said.strip(), "a sentence says why"
    assert path.exists() or any(workspace.raw("quilt").glob("*.jsonl")), "the rows are in one of the two places"
    assert champion(workspace) == version
    assert digests.of_files(sorted(raw.iterdir()), raw) == before

    last = len(event_log.read(workspace))
    said = moa(workspace, "adapt", "--local", status=1, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert "MLflow" in said and event_log.read(workspace, kinds=["failed"])[-1]["n"] > last
    assert kinds(workspace, last).count("trained") == 1
    assert champion(workspace) == version and workspace.adaptation_state.exists() and not waiting(workspace)

    last = len(event_log.read(workspace))
    both = [start(workspace, "adapt", "--local", "--json") for _ in range(2)]
    done = [json.loads(process.communicate()[0]) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    states = sorted(each["state"] for each in done)
    assert states == ["released", "skipped"] and champion(workspace) == version + 1
    busy, = [each for each in done if each["state"] == "skipped"]
    assert "Another moa run" in busy["reason"] or "nothing that can be learned waits" in busy["reason"]
    assert "trained" not in kinds(workspace, last)   # what had finished before was not done again
    assert "quilt" in experts(workspace) and fresh(workspace)


def test_retraining(workspace: Workspace, tmp_path: Path) -> None:
    drop(workspace, "alpha", rows("alpha", range(FEW, 2 * ROWS)))
    assert adapt(workspace)["state"] in ("released", "kept")
    nothing = json.loads(moa(workspace, "retrain", "--local", "--json"))
    assert nothing == {"state": "skipped", "reason": "nothing is stale"}
    before, version = experts(workspace), champion(workspace)
    continued = read_json(workspace.root / "data" / "starts.json")
    assert "alpha" in continued
    gate = Gate(tmp_path, "moa.experts.train:Checkpoint.save_now_and_then")
    process = start(workspace, "retrain", "--from-scratch", "--local", "--json", **gate.environment)
    kill_when(process, gate.reached)
    assert not (workspace.root / "data" / "starts.json").exists()
    assert adapt(workspace)["state"] == "skipped"   # whoever comes next puts back what was forgotten
    assert read_json(workspace.root / "data" / "starts.json") == continued and experts(workspace) == before
    assert event_log.read(workspace, kinds=["undone"])[-1]["reason"] == "the training from scratch was interrupted"
    process = start(workspace, "retrain", "--from-scratch", "--local", "--json")
    done = json.loads(process.communicate()[0])
    assert process.returncode == exit_code("worse" if done["state"] == "refused" else done["outcome"])
    if done["state"] == "released":
        assert experts(workspace) != before and champion(workspace) > version
        assert not (workspace.root / "data" / "starts.json").exists()
    else:   # the experts stay those that were continued
        assert experts(workspace) == before and champion(workspace) == version
        assert read_json(workspace.root / "data" / "starts.json") == continued
    assert fresh(workspace)


def test_status_and_history(workspace: Workspace) -> None:
    facts = json.loads(moa(workspace, "status", "--json"))
    assert facts["up"] is None and facts["working"] is None and facts["interrupted"] is None
    assert facts["ledger"] and "nothing that can be learned waits" in facts["due"]["reason"]
    said = moa(workspace, "status")
    assert "moa up" in said and "does not run" in said
    assert "released" in moa(workspace, "log")

"""moa.pipeline and the local build against real git and DVC, with toy steps."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from flows.launch import run
from flows.steps.session import BuildOptions, Result
from moa.core.config import LEFT_OUT
from moa.core.errors import ConfigError, PipelineError, UsageError
from moa.core.paths import Workspace
from moa.core.subprocesses import environment
from moa.core.supervisor import SupervisedProcess
from moa.workspace.pipeline import Pipeline
from tests import tiny, toy
from tests.waiting import until

EVERYTHING = {"base", "prepare@math", "prepare@sql", "train@math", "train@sql", "assemble", "evaluate"}


@pytest.fixture(autouse=True)
def _toy_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "site"))
    monkeypatch.setattr("moa.experts.train.finished", toy.finished)
    monkeypatch.setattr("flows.steps.session._release_hooks", lambda *_: [])


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return toy.make(tmp_path / "w")


@pytest.fixture
def built(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Everything fresh: a copy of one that was built once."""
    template = Workspace(tmp_path_factory.getbasetemp() / "template")
    if not template.reports.exists():
        assert build(toy.make(template.root)).failure() is None
        toy.runs(template)
    return Workspace(shutil.copytree(template.root, tmp_path / "w"))


def build(workspace: Workspace, **options: object) -> Result:
    return run(workspace, BuildOptions(**options), local=True)   # type: ignore[arg-type]


def texts(workspace: Workspace, name: str) -> list[str]:
    return [reason.text for reason in Pipeline(workspace).snapshot().stale.get(name, ())]


def test_graph_of_a_workspace_without_a_lock_file(workspace: Workspace) -> None:
    snapshot = Pipeline(workspace).snapshot()
    assert set(snapshot.graph.stages) == EVERYTHING == set(snapshot.stale) == snapshot.affected
    assert snapshot.graph.upstream("assemble") == ["prepare@math", "prepare@sql", "train@math", "train@sql"]
    stage = snapshot.graph.stages["train@math"]
    assert (stage.step, stage.domain, stage.outputs) == ("train", "math", ("data/experts/math",))
    assert {reason.text for reasons in snapshot.stale.values() for reason in reasons} == {"never run"}
    assert not toy.runs(workspace)


def test_everything_runs_once_and_trainings_share_a_process(workspace: Workspace) -> None:
    result = build(workspace)
    assert result.failure() is None and set(result.named("done")) >= EVERYTHING
    assert toy.runs(workspace) == ["assemble", "base", "evaluate", "prepare math", "prepare sql", "train math,sql"]
    assert toy.value(workspace.mixture) == ["MATH", "SQL"]
    assert not Pipeline(workspace).snapshot().stale
    again = build(workspace)
    assert set(again.named("cached")) == EVERYTHING and not toy.runs(workspace)


ON_A_TERMINAL = {
    "run": """
from pathlib import Path
from flows import launch
from flows.steps import session
from moa.core.paths import Workspace
session._release_hooks = lambda *_: []
assert not launch.run(Workspace(Path.cwd()), session.BuildOptions(), local=True).named("done")
""",
    "plan": """
from pathlib import Path
from moa.core.paths import Workspace
from moa.workspace.pipeline import Pipeline
assert not Pipeline(Workspace(Path.cwd())).snapshot().stale
"""}


@pytest.mark.parametrize("what", ON_A_TERMINAL)
def test_where_nothing_is_to_be_done_a_terminal_shows_nothing(built: Workspace, what: str) -> None:
    """A pipe would not do: DVC draws its progress bars on terminals only."""
    (built.corpus("math") / "manifest.json").touch()   # so that DVC computes digests
    terminal, child_end = os.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))   # a new one has no columns
    child = subprocess.Popen([sys.executable, "-P", "-c", ON_A_TERMINAL[what]], cwd=built.root,
                             env=environment({"TERM": "xterm"}), stdin=child_end, stdout=child_end, stderr=child_end)
    os.close(child_end)
    shown = b""
    with contextlib.suppress(OSError):   # EIO, once the child has ended
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert child.wait() == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())   # codes that hide the cursor and clear its line
    assert not text.strip(), text


def test_reasons_and_what_they_lead_to(built: Workspace) -> None:
    toy.add_rows(built, "sql", "more sql")
    snapshot = Pipeline(built).snapshot()
    assert [reason.text for reason in snapshot.stale["prepare@sql"]] == ["data/raw/sql changed"]
    assert set(snapshot.stale) == {"prepare@sql"}   # DVC does not look further
    assert snapshot.affected == {"prepare@sql", "train@sql", "assemble", "evaluate"}

    built.params.write_text(built.params.read_text().replace("rank: 8", "rank: 4"))
    assert texts(built, "train@math") == ["parameter train changed"]
    (built.mixture / "manifest.json").unlink()
    built.mixture.rmdir()
    assert texts(built, "assemble") == ["its output data/mixture is missing"]
    (built.reports / "manifest.json").write_text("{}")
    assert "its output data/reports was changed by something else" in texts(built, "evaluate")
    pipeline = built.root / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("steps.py base", "steps.py  base"))
    assert texts(built, "base") == ["its command changed"]


def test_unchanged_output_stops_the_wave(built: Workspace) -> None:
    toy.add_rows(built, "math", "math ")   # other bytes, same corpus
    result = build(built)
    assert toy.runs(built) == ["prepare math"]
    assert result.outcomes["train@math"].state == result.outcomes["evaluate"].state == "cached"


def test_a_new_domain_leaves_the_others_fresh(built: Workspace) -> None:
    toy.add_domain(built, "law")
    build(built)
    assert toy.runs(built) == ["assemble", "evaluate", "prepare law", "train law"]


def test_stages_of_the_users_own_and_tracked_data(built: Workspace) -> None:
    (built.root / "extra.txt").write_text("x")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "extra.txt"], cwd=built.root, check=True,
                   env=environment())
    with (built.root / "dvc.yaml").open("a") as file:
        file.write("  mine:\n    cmd: cp extra.txt mine.txt\n    deps: [extra.txt, data/reports]\n"
                   "    outs: [mine.txt]\n")
    assert Pipeline(built).snapshot().affected == {"mine"}
    result = build(built)
    assert result.named("done") == ["mine"] and (built.root / "mine.txt").exists()


def test_force_and_domains(built: Workspace) -> None:
    build(built, force=("train@math",))
    assert toy.runs(built) == ["train math"]   # the expert came out the same, so nothing follows
    toy.add_rows(built, "math", "m2")
    toy.add_rows(built, "sql", "s2")
    build(built, domains=("sql",))
    assert toy.runs(built) == ["assemble", "evaluate", "prepare sql", "train sql"]
    assert toy.value(built.mixture) == ["MATH", "S2"]
    with pytest.raises(UsageError, match=r"No stage 'tran'.*train"):
        build(built, force=("tran",))
    with pytest.raises(ConfigError, match="No domain 'law'"):
        build(built, domains=("law",))


def test_domains_without_the_other_experts(workspace: Workspace) -> None:
    result = build(workspace, domains=("math",))
    assert result.named("failed") == ["assemble"] and "sql has none yet" in str(result.failure())
    assert "train@math" in result.named("done")


def test_a_failing_stage_stops_only_what_needs_it(workspace: Workspace) -> None:
    toy.control(workspace, fail=["train@math"])
    result = build(workspace)
    assert result.named("failed") == ["train@math"]
    assert result.named("skipped") == ["assemble", "evaluate"]
    sentence = str(result.failure())
    assert "train@math" in sentence and "No luck with math." in sentence and ".moa/logs/train@" in sentence
    assert set(Pipeline(workspace).snapshot().stale) == {"train@math", "assemble", "evaluate"}   # sql is recorded
    toy.runs(workspace)
    toy.control(workspace)
    assert build(workspace).failure() is None
    assert toy.runs(workspace) == ["assemble", "evaluate", "train math"]


def test_a_failing_stage_that_runs_alone(workspace: Workspace) -> None:
    toy.control(workspace, fail=["prepare@sql"])
    result = build(workspace)
    assert result.named("failed") == ["prepare@sql"]
    assert str(result.outcomes["prepare@sql"].error) == (
        "prepare@sql failed: No luck with sql. (full output: .moa/logs/prepare@sql.log)")
    assert {"prepare@math", "train@math"} <= set(result.named("done"))


def test_a_failure_leaves_the_lock_file_as_it_was(built: Workspace) -> None:
    lock = built.root / "dvc.lock"
    before = lock.read_bytes()
    toy.add_rows(built, "sql", "s2")
    toy.control(built, fail=["prepare@sql"])
    assert build(built).named("failed") == ["prepare@sql"] and lock.read_bytes() == before
    steps = built.root / "steps.py"   # ends well, and has not written what it should
    steps.write_text(steps.read_text().replace("write(data / \"corpora\"", "print(data / \"corpora\""))
    toy.control(built)
    assert str(build(built).outcomes["prepare@sql"].error) == (
        "prepare@sql could not be recorded: output 'data/corpora/sql' does not exist.")
    assert lock.read_bytes() == before


def test_dvc_would_write_the_same(built: Workspace) -> None:
    toy.add_domain(built, "a-name-so-long-that-its-command-stands-on-two-lines-of-the-file")
    toy.add_rows(built, "sql", "s2")
    assert build(built).failure() is None
    lock, runs = built.root / "dvc.lock", built.root / ".dvc" / "cache" / "runs"
    ours, remembered = lock.read_text(), sorted(path.name for path in runs.rglob("*"))
    subprocess.run([sys.executable, "-m", "dvc", "commit", "-q", "--force"], cwd=built.root, check=True,
                   env=environment())
    assert lock.read_text() == ours and sorted(path.name for path in runs.rglob("*")) == remembered
    lock.write_text(f"# somebody's\n{ours}")   # DVC keeps it, so it is DVC who writes
    toy.add_rows(built, "sql", "s3")
    assert build(built).failure() is None
    assert lock.read_text().startswith("# somebody's\n") and not Pipeline(built).snapshot().stale


def test_a_stage_that_is_frozen_is_left_to_dvc(built: Workspace) -> None:
    pipeline = built.root / "dvc.yaml"
    pipeline.write_text(pipeline.read_text().replace("  base:\n", "  base:\n    frozen: true\n"))
    (built.root / "data" / "base" / "manifest.json").unlink()
    result = build(built)
    assert result.named("failed") == ["base"] and not toy.runs(built)
    assert "missing data 'source'" in str(result.failure())


def test_parameters_are_found_as_dvc_finds_them(built: Workspace) -> None:
    with (built.root / "dvc.yaml").open("a") as file:
        file.write("  mine:\n    cmd: echo mine > mine.txt\n    params: [execution.devices.0, domains.math.metric]\n"
                   "    outs: [mine.txt]\n")
    assert build(built).named("done") == ["mine"] and not Pipeline(built).snapshot().stale
    built.params.write_text(built.params.read_text().replace("devices: [cpu]", "devices: [cuda]"))
    assert texts(built, "mine") == ["parameter execution.devices.0 changed"]


def without_groups(workspace: Workspace) -> None:
    """Leave only base, domains and execution in params.yaml; dvc.yaml reads every group that may be left out."""
    kept = [line for line in toy.PARAMS.splitlines() if line.partition(":")[0] not in LEFT_OUT]
    workspace.params.write_text("\n".join(kept) + "\n")
    pipeline = toy.PIPELINE.replace("params: [prepare]", "params: [prompt, prepare]")
    (workspace.root / "dvc.yaml").write_text(pipeline + """
  quickstart:
    foreach: ${quickstart}
    do:
      cmd: python steps.py quickstart ${item}
      outs: ["data/raw/${item}"]
""")


def test_groups_that_are_left_out_are_empty_ones(workspace: Workspace) -> None:
    without_groups(workspace)
    assert set(build(workspace).named("done")) >= EVERYTHING
    recorded = Pipeline(workspace).recorded()
    assert recorded["prepare@sql"]["params"] == {"params.yaml": {"prompt": {}, "prepare": {}}}
    text = workspace.params.read_text()
    for written in ("", *(f"{key}: {value}\n" for key, value in LEFT_OUT.items())):
        workspace.params.write_text(text + written)
        assert not Pipeline(workspace).snapshot().stale
    for group, stages in (("train", {"train@math", "train@sql"}), ("evaluate", {"evaluate"})):
        workspace.params.write_text(f"{text}{group}:\n  rows: 3\n")
        assert set(Pipeline(workspace).snapshot().stale) == stages
        assert texts(workspace, min(stages)) == [f"parameter {group} changed"]


def test_a_group_that_was_set_and_is_left_out_has_changed(built: Workspace) -> None:
    built.params.write_text(built.params.read_text().replace("train: {rank: 8}\n", ""))
    assert set(Pipeline(built).snapshot().stale) == {"train@math", "train@sql"}
    assert texts(built, "train@sql") == ["parameter train changed"]
    assert build(built).failure() is None and not Pipeline(built).snapshot().stale


def test_a_stage_that_dvc_runs_reads_the_groups_that_are_left_out(workspace: Workspace) -> None:
    without_groups(workspace)
    steps = workspace.root / "dvc.yaml"
    own = "  page:\n    cmd: echo page > page.txt\n    deps: [data/reports]\n    params: [prompt, train]\n"
    steps.write_text(steps.read_text() + own + "    outs: [page.txt]\n")
    assert build(workspace).failure() is None
    assert (workspace.root / "page.txt").read_text() == "page\n" and not Pipeline(workspace).snapshot().stale
    assert Pipeline(workspace).recorded()["page"]["params"] == {"params.yaml": {"prompt": {}, "train": {}}}


def test_a_long_lived_process_keeps_nothing_of_what_it_asked(built: Workspace) -> None:
    import fsspec

    kept = fsspec.filesystem("memory").store
    with Pipeline(built).lock():
        before = set(kept)
        for _ in range(3):
            assert not Pipeline(built).snapshot().stale
    assert set(kept) == before


def test_a_training_that_dvc_remembers(built: Workspace) -> None:
    toy.add_rows(built, "math", "m2")
    toy.add_rows(built, "sql", "s2")
    build(built)
    toy.add_rows(built, "math", "math")   # back to what was built first
    toy.add_rows(built, "sql", "s3")
    toy.runs(built)
    assert build(built).failure() is None
    assert toy.runs(built) == ["assemble", "evaluate", "prepare sql", "train sql"]
    assert toy.value(built.mixture) == ["MATH", "S3"]


@pytest.mark.parametrize(("step", "key"), [("train", "rank: "), ("prepare", "validation: ")])
def test_inputs_that_change_during_a_step_are_not_recorded(workspace: Workspace, step: str, key: str) -> None:
    steps = workspace.root / "steps.py"
    steps.write_text(steps.read_text() + f'\nif step == "{step}":\n    p = pathlib.Path("params.yaml")\n'
                     f'    p.write_text(p.read_text().replace("{key}", "{key}1"))\n')
    result = build(workspace)
    assert "inputs changed while it was running" in str(result.failure())
    assert f"{step}@math" in Pipeline(workspace).snapshot().stale


DRIVER = """
import sys, pathlib, moa.core.paths, moa.experts.train, flows.steps.session
from flows.launch import run
from tests import toy
moa.experts.train.finished = toy.finished
flows.steps.session._release_hooks = lambda *_: []
try:
    run(moa.core.paths.Workspace(pathlib.Path(sys.argv[1])), flows.steps.session.BuildOptions(), local=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start_driver(workspace: Workspace, step: str) -> tuple[subprocess.Popen[bytes], int]:
    """A build in a process of its own, which prints into driver.log, and the pid of the step it is in the middle of."""
    with (workspace.root / "driver.log").open("w") as printed:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, workspace.root], cwd=tiny.REPOSITORY, stderr=printed)
    log = workspace.root / "runs.log"

    def began() -> list[int]:
        lines = log.read_text().split("\n")[:-1] if log.exists() else []   # the last one may not be whole yet
        return [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(step)]

    return driver, until(began, driver)[0]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("step", ["prepare sql", "train"])
def test_killed_in_mid_step(workspace: Workspace, step: str) -> None:
    toy.control(workspace, hold=["prepare@sql" if step == "prepare sql" else "train@sql"])
    driver, pid = start_driver(workspace, step)
    with pytest.raises(PipelineError, match=rf"Another moa run \(pid {driver.pid}, since .*\) is working"):
        build(workspace)
    driver.kill()
    driver.wait()
    until(lambda: gone(pid))   # no orphan, and no one looked for it
    toy.control(workspace)
    toy.runs(workspace)
    assert build(workspace).failure() is None
    assert "base" not in toy.runs(workspace)   # nothing finished was lost
    assert toy.value(workspace.mixture) == ["MATH", "SQL"]
    assert not Pipeline(workspace).snapshot().stale


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end(workspace: Workspace, number: int) -> None:
    toy.control(workspace, hold=["train@math"])
    driver, pid = start_driver(workspace, "train")
    driver.send_signal(number)
    assert driver.wait() == 130
    until(lambda: gone(pid))
    printed = (workspace.root / "driver.log").read_text()
    assert "interrupted" in printed and "FAILED" not in printed
    with Pipeline(workspace).lock():
        pass


def test_a_supervised_process_ends_what_does_not_listen(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); signal.pause()"
    process = SupervisedProcess(["/bin/sh", "-c", f"{sys.executable} -c '{deaf}' & echo $!; wait"], cwd=tmp_path,
                                env=os.environ)
    lines: list[str] = []
    process.follow(lambda line: (lines.append(line), len(lines) == 2 and process.release()))   # type: ignore[func-returns-value]
    pid = int(next(line for line in lines if line != "1"))
    until(lambda: gone(pid))


def test_stale_path_locks_are_cleared(built: Workspace) -> None:
    rwlock = built.root / ".dvc" / "tmp" / "rwlock"
    held = {str(built.mixture): {"pid": os.getppid(), "cmd": "dvc repro"}}
    rwlock.write_text(json.dumps({"write": held, "read": {}}))
    with Pipeline(built).lock():
        assert not rwlock.exists()


def test_a_lock_file_that_was_cut_off(built: Workspace) -> None:
    lock = built.root / "dvc.lock"
    build(built)
    lock.write_text(lock.read_text()[:100])
    assert build(built).failure() is None
    assert not toy.runs(built)


def test_a_folder_without_dvc(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run `git init && dvc init` there first"):
        Pipeline(Workspace(tmp_path))


def test_a_broken_pipeline_file(workspace: Workspace) -> None:
    (workspace.root / "dvc.yaml").write_text("stages: [oops")
    with pytest.raises(PipelineError, match="DVC cannot read this workspace's pipeline"):
        Pipeline(workspace).snapshot()

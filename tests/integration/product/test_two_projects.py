"""Two projects on one MLflow server and one Prefect server: each keeps what is its own; clones of one share it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from flows import prefect_api
from flows.sensor import send_arrival_event
from flows.steps import event_log, release
from moa.core import config
from moa.core.config import Config
from moa.core.errors import RegistryError
from moa.core.paths import Workspace
from moa.release.registry import Registry
from moa.workspace import init
from moa.workspace.pipeline import Pipeline
from tests import tiny, toy
from tests.integration.release.test_mlflow_client import mlflow_server
from tests.integration.release.test_registry import build, register

DOMAINS = {"math": {"metric": "final_number"}, "sql": {"metric": "sql_result"}}
TAG = "moa.project"   # of a registered model


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=root, check=True,
                          capture_output=True, text=True).stdout.strip()


def edit(workspace: Workspace, **keys: Any) -> Config:
    """Set top-level keys of params.yaml, None to leave one out; what it says then."""
    yaml = YAML()
    yaml.preserve_quotes = True
    params = yaml.load(workspace.params)
    for key, value in keys.items():
        params.pop(key, None)
        if value is not None:
            params[key] = value
    with workspace.params.open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    return config.load(workspace.params)


def made(root: Path) -> Workspace:
    """A workspace as `moa init` makes it, with two domains, committed."""
    init.init(root, None, root.parent)
    workspace = Workspace(root)
    edit(workspace, domains=DOMAINS)
    git(root, "add", ".")
    git(root, "commit", "-qm", f"the workspace {root}")
    return workspace


def from_before(root: Path) -> Workspace:
    """The same as it was made before projects had an id."""
    workspace = made(root)
    edit(workspace, project=None)
    git(root, "commit", "-qam", "no id", "--allow-empty")
    return workspace


def settings(workspace: Workspace) -> Config:
    return config.load(workspace.params)


def registry_of(workspace: Workspace) -> Registry:
    return Registry(workspace, settings(workspace))


def released(workspace: Workspace, content: str) -> int:
    """Build, register and promote what `content` names; its version."""
    build(workspace, content)
    version = register(registry_of(workspace)).version
    release.promote(workspace, settings(workspace), version, content, "ann")
    return int(version)


def champion(workspace: Workspace) -> tuple[int, str] | None:
    found = registry_of(workspace).champion()
    return (found.version, found.digest) if found else None


def history(workspace: Workspace) -> list[tuple[int, str]]:
    return [(entry.version, entry.reason) for entry in registry_of(workspace).history()]


def moa(workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, capture_output=True, text=True,
                          check=False, env={**os.environ, "COLUMNS": "200"})


# One MLflow server.

@pytest.fixture(scope="module")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture
def server(tracking_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The server, and nothing registered there."""
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_server)
    monkeypatch.chdir(tmp_path)
    yield tracking_server
    client = MlflowClient(tracking_server, tracking_server)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)


def test_each_project_keeps_its_own_releases(server: str, tmp_path: Path) -> None:
    one, other = made(tmp_path / "here" / "shop"), made(tmp_path / "there" / "shop")   # the same folder's name, too
    assert released(one, "first") == 1 and released(one, "second") == 2
    kept = champion(one), history(one)
    assert released(other, "first") == 1   # with the same bytes as the first of `one`
    assert (champion(one), history(one)) == kept and history(other) == [(1, "first")]
    mine, theirs = registry_of(one), registry_of(other)
    assert [version.version for version in mine.versions()] == [1, 2]
    assert [version.version for version in theirs.versions()] == [1]
    for registry in (mine, theirs):
        assert registry.params(registry.get("champion"))["math.train.rank"] == "8"   # its experts are found
    pinned = {registry.mixture_name: {pin["name"] for version in registry.versions()
                                      for pin in version.experts.values()} for registry in (mine, theirs)}
    assert set.isdisjoint(*pinned.values()) and len(pinned) == 2
    ids = {settings(workspace).project for workspace in (one, other)}
    names = {model.name for model in mine.client.search_registered_models()}
    assert names == {*pinned, *set.union(*pinned.values())} and len(ids) == 2
    assert all(sum(str(project) in name for project in ids) == 1 for name in names)
    assert mine.open()[1] != theirs.open()[1]   # the experiments
    release.roll_back(one, settings(one))
    assert champion(other) == (1, theirs.get(1).digest) and champion(one) == (1, mine.get(1).digest)


def test_two_clones_share(server: str, tmp_path: Path) -> None:
    first = made(tmp_path / "first")
    released(first, "one")
    git(tmp_path, "clone", "-q", str(first.root), "second")
    second = Workspace(tmp_path / "second")
    assert champion(second) == champion(first) and history(second) == [(1, "one")]
    assert released(second, "two") == 2
    assert champion(first) == champion(second) and history(first) == [(1, "one"), (2, "two")]


def test_an_old_workspace_goes_on_under_its_names_and_another_is_refused(server: str, tmp_path: Path) -> None:
    old, other = from_before(tmp_path / "old"), from_before(tmp_path / "other")
    released(old, "first")
    before = champion(old), history(old)
    assert registry_of(old).mixture_name == "moa-mixture"
    build(other, "theirs")
    for attempt in (lambda: champion(other), lambda: registry_of(other).versions(), lambda: history(other),
                    lambda: registry_of(other).register_expert("math"), lambda: release.roll_back(
                        other, settings(other))):
        with pytest.raises(RegistryError, match=r"moa-(mixture|expert-math) at http://127.* is another project's"):
            attempt()
    said = moa(other, "release", "list")
    assert said.returncode == 1 and "Traceback" not in said.stderr
    line = said.stderr.split("write `", 1)[1].split("`", 1)[0]
    key, _, value = line.partition(": ")
    assert key == "project" and value.startswith("other-")
    edit(other, project=value)   # what the sentence says
    assert released(other, "theirs") == 1
    assert (champion(old), history(old)) == before and released(old, "second") == 2

    git(tmp_path, "clone", "-q", str(old.root), "clone")   # a clone of an old workspace is the same project
    clone = Workspace(tmp_path / "clone")
    assert champion(clone) == champion(old) and released(clone, "third") == 3 and history(old)[-1] == (3, "third")


def test_what_was_registered_before_there_were_ids_is_not_lost(server: str, tmp_path: Path) -> None:
    """Releases without any tag of ours; then git brings an id."""
    old = from_before(tmp_path / "old")
    for content in ("first", "second"):
        released(old, content)
    forget_owners(registry_of(old).client)
    edit(old, project="shop-1a2b3c")
    assert champion(old) == (2, registry_of(old).get(2).digest)
    assert history(old) == [(1, "first"), (2, "second")]
    assert registry_of(old).mixture_name == "moa-mixture"
    assert released(old, "third") == 3
    release.roll_back(old, settings(old))
    assert champion(old) == (2, registry_of(old).get(2).digest)
    client = registry_of(old).client
    assert {model.name for model in client.search_registered_models()} == {
        "moa-mixture", "moa-expert-math", "moa-expert-sql"}
    assert {model.tags[TAG] for model in client.search_registered_models()} == {"shop-1a2b3c"}
    assert client.get_experiment(registry_of(old).open()[1]).name == "moa"

    new = made(tmp_path / "new")   # the old names are not in the way of a new project
    assert champion(new) is None and released(new, "first") == 1


def test_untagged_releases_of_commits_that_are_not_ours_are_refused(server: str, tmp_path: Path) -> None:
    old, other = from_before(tmp_path / "old"), from_before(tmp_path / "other")
    released(old, "first")
    forget_owners(registry_of(old).client)
    with pytest.raises(RegistryError, match="is another project's"):
        champion(other)
    build(other, "theirs")
    with pytest.raises(RegistryError, match="is another project's"):
        register(registry_of(other))
    assert released(old, "second") == 2


def forget_owners(client: Any) -> None:
    for model in client.search_registered_models():
        client.delete_registered_model_tag(model.name, TAG)


def test_a_name_that_is_taken_is_refused_with_what_to_set(server: str, tmp_path: Path) -> None:
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    edit(one, project="shop")
    released(one, "first")
    edit(other, project="shop-old")   # whose experts' names are those that `shop` gives to a domain of this name
    registry_of(one).client.set_registered_model_tag("moa-shop-mixture", TAG, "someone-else")
    with pytest.raises(RegistryError, match=r"moa-shop-mixture at .* is another project's \(someone-else\): "
                                            r".*`project: .*release\.name.*`project: someone-else`"):
        champion(one)
    assert champion(other) is None


def test_a_private_database_is_never_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace with releases in its own database pulls a params.yaml that has an id."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = from_before(tmp_path / "old")
    shutil.rmtree(old.root / ".git")   # nothing proves whose it is
    released(old, "first")
    edit(old, project="shop-1a2b3c")
    assert history(old) == [(1, "first")] and released(old, "second") == 2
    assert registry_of(old).mixture_name == "moa-mixture"


def test_an_id_makes_nothing_stale(tmp_path: Path) -> None:
    workspace = toy.make(tmp_path / "w")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=workspace.root, check=True)
    assert not Pipeline(workspace).snapshot().stale
    edit(workspace, project="shop-1a2b3c")
    assert not Pipeline(workspace).snapshot().stale


# One Prefect server.

def until(seen: Callable[[], Any], what: str, *processes: "subprocess.Popen[str]") -> Any:
    """What `seen` finds, asked again and again while all of `processes` live."""
    while not (found := seen()):
        for process in processes:
            assert process.poll() is None, f"no {what}: {process.stdout.read() if process.stdout else ''}"
        time.sleep(0.3)
    return found


def skipped(workspace: Workspace) -> list[str]:
    """What set off the runs that found nothing to learn."""
    return [entry["trigger"] for entry in event_log.read(workspace, kinds=["skipped"])]


def idle(root: Path, project: str | None) -> Workspace:
    """A workspace with nothing to do."""
    workspace = tiny.workspace(root, (), retrain={"cron": "0 3 * * 0"}, drift={"cron": None},
                               adapt={"settle": 0.5, "debounce": 0.0, "poll": 0.5})
    if project:
        edit(workspace, project=project)
    git(root, "init", "-q", ".")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    return workspace


def ask(path: str, body: dict[str, Any]) -> Any:
    """What the server of `prefect_url` says."""
    api = prefect_api.configured_api()
    assert api is not None
    return api.ask(path, body)


def deployed() -> dict[str, str]:
    """Root by name of every deployment that there is."""
    return {f"{each['entrypoint'].rsplit('.', 1)[-1]}/{each['name']}": each["parameters"]["root"]
            for each in ask("deployments/filter", {})}


@pytest.mark.parametrize("ids", [("shop-1a2b3c", "desk-4d5e6f"), (None, None), (None, "desk-4d5e6f")],
                         ids=["ids", "old", "mixed"])
def test_an_event_for_one_runs_not_the_other(prefect_url: str, tmp_path: Path, ids: tuple[str | None, ...]) -> None:
    both = [idle(tmp_path / name / "w", project) for name, project in zip(("one", "other"), ids, strict=True)]
    ups = [subprocess.Popen([sys.executable, "-m", "moa", "up", "--no-ui"], cwd=workspace.root, text=True,
                            env={**os.environ, "PREFECT_API_URL": prefect_url, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for workspace in both]
    try:
        roots = {str(workspace.root) for workspace in both}
        until(lambda: sum(root in roots for root in deployed().values()) == 6, "six deployments", *ups)
        assert send_arrival_event(both[0], ["mine"])
        until(lambda: skipped(both[0]), "the first one's run", *ups)
        assert send_arrival_event(both[1], ["yours"])
        until(lambda: skipped(both[1]), "the other one's run", *ups)
        assert [skipped(workspace) for workspace in both] == [["rows of mine arrived"], ["rows of yours arrived"]]
        triggers = [run["parameters"]["trigger"] for run in ask("flow_runs/filter", {
            "limit": 200}) if run["parameters"].get("root") in roots and "trigger" in run["parameters"]]
        assert sorted(triggers) == ["rows of mine arrived", "rows of yours arrived"]
        for workspace in both:
            facts = json.loads(moa_with(prefect_url, workspace, "status", "--json").stdout)
            assert {each["flow"] for each in facts["scheduled"]} == {"retrain"}
    finally:
        for process in ups:
            process.send_signal(signal.SIGTERM)
        for process in ups:
            process.communicate()


def moa_with(url: str, workspace: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moa", *words], cwd=workspace.root, capture_output=True, text=True,
                          check=True, env={**os.environ, "PREFECT_API_URL": url})


def test_what_an_earlier_version_deployed_goes(prefect_url: str, tmp_path: Path) -> None:
    """Its schedules and its trigger would go on beside those of now; another workspace's stay."""
    from flows.deployments import delete_former, deployments

    workspace, other = idle(tmp_path / "w", None), idle(tmp_path / "other", None)
    for each in (workspace, other):
        for deployment in deployments(each, settings(each)):
            deployment.apply()
    old = deployments(workspace, settings(workspace))[0]
    old.name = "moa"   # what it was called before there were ids
    old.apply()
    before = {name: root for name, root in deployed().items() if root == str(other.root)}
    edit(workspace, project="shop-1a2b3c")
    now = deployments(workspace, settings(workspace))
    for deployment in now:
        deployment.apply()
    delete_former(workspace, settings(workspace))
    found = deployed()
    assert before.items() <= found.items() and len(before) == 3
    assert {name for name, root in found.items() if root == str(workspace.root)} == {
        f"{flow}/moa-shop-1a2b3c" for flow in ("adapt", "retrain", "drift")}

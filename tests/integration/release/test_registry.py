"""Registrations, champions and the release flow on real MLflow: a SQLite database (test_mlflow_client.py has the
server)."""

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.steps import release
from moa.core import digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, PipelineError, RegistryError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.release import mlflow_client
from moa.release.registry import Registry

BASE = {"digest": "b" * 64, "weights": "w", "tokenizer": "t", "template": "c", "source": "path:toy"}
CONFIG = Config.model_validate({"base": {"source": "path:toy"},
                                "domains": {"math": {"metric": "final_number"}, "sql": {"metric": "sql_result"}}})


def build(workspace: Workspace, content: str = "first") -> None:
    """Experts, mixture and reports as the stages leave them, around weights that are a few bytes."""
    pinned = {}
    for domain in CONFIG.domains:
        folder = workspace.expert(domain)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(f"{domain} {content}".encode())
        write_json(folder / "adapter_config.json", {"r": 8})
        pinned[domain] = digests.of_files(sorted(folder.iterdir()), folder)
        write_json(folder / MANIFEST, {
            "kind": "expert", "domain": domain, "digest": pinned[domain], "base": BASE, "corpus": domain[0] * 64,
            "rank": 8, "alpha": 16.0, "targets": ["q_proj"], "train": CONFIG.train.model_dump(), "best_epoch": 2,
            "curve": [{"epoch": 1, "step": 10, "train_loss": 1.5, "validation_loss": 1.6, "tokens": 100,
                       "learning_rate": 1e-3},
                      {"epoch": 2, "step": 20, "train_loss": 1.1, "validation_loss": 1.3, "tokens": 200,
                       "learning_rate": 1e-4}]})
    shutil.rmtree(workspace.mixture, ignore_errors=True)
    for domain in CONFIG.domains:
        shutil.copytree(workspace.expert(domain), workspace.mixture / "experts" / domain)
    (workspace.mixture / "router.safetensors").write_bytes(b"router")
    facts = {"base": BASE["digest"], "labels": sorted(pinned), "experts": pinned,
             "router": {"rule": "early", "layer": 4, "temperature": 1.0, "threshold": 0.5, "weights": "r" * 64}}
    write_json(workspace.mixture / MANIFEST, {"kind": "mixture", "digest": digests.of_json(facts), **facts,
                                              "source": BASE["source"]})
    write_json(workspace.reports / "summary.json", {
        "domains": {"math": {"routed": {"loss": 1.25, "score": None, "bleu": float("nan")}}},
        "routing": {"accuracy": 0.99, "abstention": 0.01, "confusion": {}}})


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow database, which takes seconds to make."""
    from mlflow.tracking import MlflowClient

    mlflow_client.quiet_mlflow()
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)   # nothing may be written where we happen to stand
    workspace = Workspace(tmp_path / "workspace")
    workspace.mlflow.mkdir(parents=True)
    shutil.copy(database, workspace.mlflow / "mlflow.db")
    workspace.params.write_text("{}")
    (workspace.root / "dvc.yaml").write_text("{}")
    build(workspace)
    return workspace


@pytest.fixture
def registry(workspace: Workspace) -> Registry:
    return Registry(workspace, CONFIG)


def counts(registry: Registry) -> tuple[int, int, int]:
    """Runs, logged models and versions there are."""
    client, experiment = registry.open()
    return (len(client.search_runs([experiment])), len(client.search_logged_models([experiment])),
            len(client.search_model_versions()))


def register(registry: Registry) -> Any:
    return registry.register_mixture({domain: registry.register_expert(domain) for domain in CONFIG.domains})


def test_a_new_database_is_made_quietly_in_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capfd: pytest.CaptureFixture) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    workspace = Workspace(tmp_path / "new")
    registry = Registry(workspace, CONFIG)
    assert registry.champion() is None
    assert registry.history() == [] and registry.versions() == []
    build(workspace)
    register(registry)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger().level == logging.WARNING
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_an_expert_is_registered_once_with_its_lineage(registry: Registry, workspace: Workspace) -> None:
    subprocess.run("git init -q . && git add params.yaml && git -c user.name=t -c user.email=t@t commit -qm t",
                   shell=True, cwd=workspace.root, check=True)
    (workspace.root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  prepare@math:\n    outs:\n    - path: data/corpora/math\n      md5: abc.dir\n")
    write_json(workspace.corpus("math") / MANIFEST, {"digest": "m" * 64})
    first = registry.register_expert("math")
    again = Registry(workspace, CONFIG).register_expert("math")
    assert first.created and not again.created
    assert (again.name, again.version, again.run_id) == ("moa-expert-math", 1, first.run_id)
    assert counts(registry) == (1, 1, 1)
    run = registry.client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == str(CONFIG.train.learning_rate)
    assert len(run.data.tags["moa.git.commit"]) == 40 and run.data.tags["moa.git.dirty"] == "true"
    assert run.data.tags["moa.base"] == BASE["digest"]
    history = registry.client.get_metric_history(first.run_id, "validation_loss")
    assert [(point.step, point.value) for point in history] == [(10, 1.6), (20, 1.3)]
    dataset, = run.inputs.dataset_inputs
    tags = {tag.key: tag.value for tag in dataset.tags}
    assert (dataset.dataset.name, dataset.dataset.digest) == ("math", "abc.dir")
    assert (tags["moa.digest"], tags["dvc.md5"]) == ("m" * 64, "abc.dir")
    assert len(run.outputs.model_outputs) == 1


def test_a_corpus_that_moved_on_is_not_taken_for_the_one_learned_from(registry: Registry, workspace: Workspace) -> None:
    (workspace.root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  prepare@math:\n    outs:\n    - path: data/corpora/math\n      md5: new.dir\n")
    write_json(workspace.corpus("math") / MANIFEST, {"digest": "n" * 64})
    run = registry.client.get_run(registry.register_expert("math").run_id)
    dataset, = run.inputs.dataset_inputs
    assert dataset.dataset.digest == "m" * 36 and "dvc.md5" not in {tag.key for tag in dataset.tags}


def test_a_person_can_follow_an_expert_to_its_parent_and_a_mixture_to_its_experts(registry: Registry,
                                                                                  workspace: Workspace) -> None:
    """What MLflow's pages show: descriptions with links, models that went into a run, versions of a model."""
    client, _ = registry.open()
    old = registry.register_expert("math")
    build(workspace, "second")
    manifest = read_json(workspace.expert("math") / MANIFEST)
    write_json(workspace.expert("math") / MANIFEST, {**manifest, "parent": old.digest})
    mixture = register(registry)
    expert = client.get_model_version("moa-expert-math", "2")
    assert (expert.tags["moa.parent"], expert.tags["moa.in.moa-mixture"]) == (old.digest, "1")
    assert "[moa-expert-math version 1](#/models/moa-expert-math/versions/1)" in expert.description

    def made(run_id: str) -> str:
        output, = client.get_run(run_id).outputs.model_outputs
        return str(output.model_id)

    def used(run_id: str) -> list[str]:
        return sorted(each.model_id for each in client.get_run(run_id).inputs.model_inputs)

    assert used(old.run_id) == [] and used(expert.run_id) == [made(old.run_id)]
    experts = [registry.register_expert(domain).run_id for domain in CONFIG.domains]
    assert used(mixture.run_id) == sorted(map(made, experts))
    found = client.get_model_version("moa-mixture", "1")
    assert "| math | [moa-expert-math version 2](#/models/moa-expert-math/versions/2) |" in found.description
    assert client.get_run(mixture.run_id).data.tags["mlflow.note.content"] == found.description
    tag = client.get_logged_model(made(mixture.run_id)).tags["mlflow.modelVersions"]
    assert json.loads(tag) == [{"name": "moa-mixture", "version": 1}]
    assert "`champion` serves" in client.get_registered_model("moa-mixture").description


def test_a_mixture_pins_its_experts_and_is_registered_once(registry: Registry) -> None:
    version = register(registry)
    assert version.created and not register(registry).created
    assert counts(registry) == (3, 3, 3)
    assert version.experts["sql"]["name"] == "moa-expert-sql" and version.experts["sql"]["version"] == 1
    metrics = registry.client.get_run(version.run_id).data.metrics
    assert metrics == {"math/routed/loss": 1.25, "routing/accuracy": 0.99, "routing/abstention": 0.01}


def test_new_content_is_a_new_version(registry: Registry, workspace: Workspace) -> None:
    register(registry)
    build(workspace, "second")
    assert register(registry).version == 2
    build(workspace, "first")
    assert register(registry).version == 1
    assert [each.version for each in registry.versions()] == [1, 2]


def test_an_expert_names_the_newest_mixture_that_it_is_in(registry: Registry, workspace: Workspace) -> None:
    experts = {domain: registry.register_expert(domain) for domain in CONFIG.domains}
    manifest = read_json(workspace.mixture / MANIFEST)
    for digest, newest in ((manifest["digest"], "1"), ("2" * 64, "2"), (manifest["digest"], "2")):
        write_json(workspace.mixture / MANIFEST, {**manifest, "digest": digest})   # the same experts, another router
        registry.register_mixture(experts)
        for domain in CONFIG.domains:
            tags = registry.client.get_model_version(f"moa-expert-{domain}", "1").tags
            assert tags["moa.in.moa-mixture"] == newest


def test_a_mixture_of_other_experts_than_the_registered_is_refused(registry: Registry, workspace: Workspace) -> None:
    experts = {domain: registry.register_expert(domain) for domain in CONFIG.domains}
    build(workspace, "second")
    with pytest.raises(RegistryError, match="another expert of 'math'"):
        registry.register_mixture(experts)
    with pytest.raises(RegistryError, match="'sql'"):
        registry.register_mixture({"math": registry.register_expert("math")})


CALLS = ("create_run", "log_batch", "log_inputs", "create_logged_model", "log_model_artifacts", "finalize_logged_model",
         "log_outputs", "set_terminated", "create_registered_model", "create_model_version", "set_logged_model_tags")
# The version is there then.
AT_THE_END = {("create_model_version", True), ("set_logged_model_tags", False), ("set_logged_model_tags", True)}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_crash_anywhere_is_continued(registry: Registry, workspace: Workspace, monkeypatch: pytest.MonkeyPatch,
                                       call: str, after: bool) -> None:
    from mlflow.tracking import MlflowClient

    real = getattr(MlflowClient, call)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, call, crash)
        with pytest.raises(KeyboardInterrupt):
            registry.register_expert("math")
    version = Registry(workspace, CONFIG).register_expert("math")
    assert version.created == ((call, after) not in AT_THE_END)
    assert counts(registry) == (1, 1, 1)
    run = registry.client.get_run(version.run_id)
    assert run.info.status == "FINISHED" and len(run.outputs.model_outputs) == 1
    assert len(registry.client.get_metric_history(version.run_id, "train_loss")) == 2


@pytest.mark.parametrize("call", ["log_inputs", "create_logged_model"])
def test_an_interrupted_mixture_names_its_experts_once(registry: Registry, monkeypatch: pytest.MonkeyPatch,
                                                       call: str) -> None:
    from mlflow.tracking import MlflowClient

    real = getattr(MlflowClient, call)

    def crash(*args: Any, **kwargs: Any) -> Any:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    experts = {domain: registry.register_expert(domain) for domain in CONFIG.domains}
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, call, crash)
        with pytest.raises(KeyboardInterrupt):
            registry.register_mixture(experts)
    run = registry.client.get_run(Registry(registry.workspace, CONFIG).register_mixture(experts).run_id)
    assert counts(registry) == (3, 3, 3)
    assert len(run.inputs.model_inputs) == len(run.inputs.dataset_inputs) == len(CONFIG.domains)


def test_the_champion_and_its_history(registry: Registry, workspace: Workspace) -> None:
    register(registry)
    build(workspace, "second")
    register(registry)
    registry.set_champion(1, "first release", "ann")
    registry.set_champion(1, "again", "ann")
    registry.set_champion(2, "better", "ben")
    registry.set_champion(1, "rollback", "ann")
    champion = registry.champion()
    assert champion is not None and champion.version == registry.get("champion").version == 1
    assert [(e.n, e.version, e.previous, e.by, e.reason) for e in registry.history()] == [
        (1, 1, None, "ann", "first release"), (2, 2, 1, "ben", "better"), (3, 1, 2, "ann", "rollback")]
    registry.client.delete_registered_model_alias("moa-mixture", "champion")
    assert registry.champion() is None and len(registry.history()) == 3
    with pytest.raises(RegistryError, match="no version 7; its versions: 1, 2"):
        registry.set_champion(7, "", "")


def test_an_interrupted_change_of_champion_shows_and_is_completed(registry: Registry, workspace: Workspace,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    register(registry)
    build(workspace, "second")
    register(registry)
    registry.set_champion(1, "first release", "ann")
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "set_registered_model_alias", crash)
        with pytest.raises(KeyboardInterrupt):
            registry.set_champion(2, "better", "ben")
    assert registry.get("champion").version == 1
    assert [entry.effective for entry in registry.history()] == [True, False]
    registry.set_champion(2, "better", "ben")
    assert registry.get("champion").version == 2
    assert [entry.effective for entry in registry.history()] == [True, True]


def test_a_download_is_what_was_registered(registry: Registry, workspace: Workspace) -> None:
    version = register(registry)
    build(workspace, "second")
    mixture = registry.download(1)
    assert mixture.parent.name == version.digest and read_json(mixture / MANIFEST)["digest"] == version.digest
    assert (mixture / "experts/math/adapter_model.safetensors").read_bytes() == b"math first"
    assert (mixture.parent / "reports" / "summary.json").is_file()
    stored = next((workspace.mlflow / "artifacts").rglob("mixture/router.safetensors"))
    stored.unlink()
    assert registry.download(1) == mixture   # from the cache
    stored.write_bytes(b"another")
    shutil.rmtree(mixture.parent)
    with pytest.raises(ArtifactError, match=r"router\.safetensors differs"):
        registry.download(1)
    assert not mixture.parent.exists()


def test_whether_the_artifact_store_has_a_releases_files(registry: Registry, workspace: Workspace) -> None:
    version = register(registry)
    assert registry.lists_files(version)
    shutil.rmtree(workspace.mlflow / "artifacts")
    assert not registry.lists_files(version)


def test_mlflow_serves_chat_bodies(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """In process: what `mlflow models serve` runs."""
    from types import ModuleType, SimpleNamespace

    from fastapi.testclient import TestClient
    from mlflow.pyfunc import load_model
    from mlflow.pyfunc.scoring_server import init

    class Echo:
        def chat(self, messages: Any, domain: str | None = None, max_new_tokens: int | None = None) -> Any:
            return SimpleNamespace(answer=f"{messages[-1]['content']} {max_new_tokens}", domain=domain or "math",
                                   confidence=0.9, abstained=False, similarity=0.8, threshold=0.5,
                                   finish="stop", tokens=3, prompt_tokens=2)

    opened: list[tuple[Path, Workspace]] = []
    ask = ModuleType("moa.release.champion")
    ask.open_mixture = lambda *where: (opened.append(where), Echo())[1]   # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moa.release.champion", ask)
    register(registry)
    registry.set_champion(1, "first release", "ann")
    with mlflow_client.default_uri(registry.address):
        model = load_model("models:/moa-mixture@champion")
    (directory, where), = opened
    assert (directory / "router.safetensors").is_file() and where == registry.workspace
    client = TestClient(init(model))
    question = [{"role": "user", "content": "2+2?"}]
    answer = client.post("/invocations", json={"messages": question, "model": "moa/sql", "max_tokens": 3}).json()
    assert answer["choices"][0]["message"].items() >= {"role": "assistant", "content": "2+2? 3"}.items()
    assert answer["model"] == "moa/sql" and answer["moa"]["confidence"] == 0.9
    for bad in ({"messages": []}, {"messages": [{"role": "user"}]}, {"messages": question, "model": "moa/"},
                {"messages": question, "max_tokens": 0}):
        assert client.post("/invocations", json=bad).status_code == 400


def test_no_server_is_one_clear_sentence_and_seldom_tried(workspace: Workspace,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's own patience is eight attempts with growing pauses: two minutes of silence."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        attempts: list[object] = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):   # the door is closed
                while True:
                    attempts.append(door.accept()[0].close())

        visitor = threading.Thread(target=hang_up, daemon=True)
        visitor.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{door.getsockname()[1]}")
        with pytest.raises(RegistryError, match=r"No MLflow server answers at http://127\.0\.0\.1") as caught:
            Registry(workspace, CONFIG).champion()
        door.shutdown(socket.SHUT_RDWR)
    visitor.join()
    assert "secret" not in str(caught.value)
    assert len(attempts) <= 2


# The release flow.

def rows(shift: float) -> dict[str, Any]:
    return {"rows": [{"domain": domain, "row": str(row), "incumbent_loss": 1 + row / 40,
                      "challenger_loss": 1 + row / 40 + shift + (row % 5 - 2) / 100}
                     for domain in CONFIG.domains for row in range(40)],
            "routing": {who: {"accuracy": 1.0, "abstention": 0.0} for who in ("incumbent", "challenger")}}


def test_releases_become_champion_only_through_the_gate(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_comparison(*_: Any) -> None:
        raise AssertionError("nothing to compare")

    monkeypatch.setattr("flows.steps.release.compare", no_comparison)
    first = release.release(workspace, CONFIG)
    assert (first["version"], first["champion"]) == (1, 1)
    assert first["decision"]["reason"] == ("First release; cannot be judged: math (0 rows to compare, 20 are needed), "
                                           "sql (0 rows to compare, 20 are needed).")
    again = release.release(workspace, CONFIG)
    assert (again["created"], again["decision"]["reason"]) == (False, "already champion")
    build(workspace, "worse")
    monkeypatch.setattr("flows.steps.release.compare", lambda *_: rows(+0.2))
    worse = release.release(workspace, CONFIG)
    assert (worse["version"], worse["champion"], worse["decision"]["promote"]) == (2, 1, False)
    build(workspace, "better")
    monkeypatch.setattr("flows.steps.release.compare", lambda *_: rows(-0.2))
    held = release.release(workspace, CONFIG, promote=False)
    assert (held["version"], held["champion"], held["decision"]["promote"]) == (3, 1, True)
    assert release.release(workspace, CONFIG)["champion"] == 3
    registry = Registry(workspace, CONFIG)
    assert [entry.version for entry in registry.history()] == [1, 3]
    gate = registry.get(2).gate
    assert gate is not None and gate["against"] == 1 and "math" in gate["reason"]
    json.dumps(held)


def evaluated(workspace: Workspace, **losses: float) -> None:
    """The evaluation of what is built: by domain, the mean loss of forty routed rows; the base has 2 nats."""
    pq.write_table(pa.Table.from_pylist([
        {"domain": domain, "row": str(row), "group": f"{row:016x}", "system": system, "tokens": 3, "score": None,
         "loss": (2.0 if system == "base" else loss) + row / 40 + (row % 5 - 2) / 100}
        for domain, loss in losses.items() for row in range(40) for system in ("base", "routed", "forced")]),
        workspace.reports / "rows.parquet")


def test_a_first_release_is_compared_with_the_base(workspace: Workspace) -> None:
    evaluated(workspace, math=2.5, sql=1.0)
    worse = release.release(workspace, CONFIG)
    assert worse["champion"] is None and worse["decision"]["worse"] == ["math"]
    assert worse["decision"]["reason"].startswith("math: worse than the base: loss +0.5000 nats against the base")
    build(workspace, "better")
    evaluated(workspace, math=1.5, sql=1.0)
    better = release.release(workspace, CONFIG)
    assert (better["champion"], better["decision"]["reason"]) == (2, "First release; better than the base: math, sql.")


def test_looks_are_counted_and_small_losses_add_up(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def challenge(content: str, math: float, sql: float, **options: Any) -> dict[str, Any]:
        """Release what differs by so much from the champion, whose losses `champion` holds."""
        build(workspace, content)
        losses = {"math": champion["math"] + math, "sql": champion["sql"] + sql}
        evaluated(workspace, **losses)
        compared = {"rows": [{"domain": domain, "row": str(row),
                              "incumbent_loss": champion[domain] + row / 40 + (row % 5 - 2) / 100,
                              "challenger_loss": loss + row / 40 + (row % 5 - 2) / 100 + (row % 3 - 1) / 1000}
                             for domain, loss in losses.items() for row in range(40)]}
        monkeypatch.setattr("flows.steps.release.compare", lambda *_: compared)
        done = release.release(workspace, CONFIG, **options)
        if done["champion"] == done["version"]:
            champion.update(losses)
        return done

    champion = {"math": 1.0, "sql": 1.0}
    evaluated(workspace, **champion)
    assert release.release(workspace, CONFIG)["champion"] == 1
    second = challenge("second", 0.015, -0.1)
    assert second["champion"] == 2 and second["decision"]["anchors"] == {"math": 1, "sql": 1}
    assert {each["look"] for each in second["decision"]["domains"].values()} == {1}
    assert {each["anchor"] for each in second["decision"]["domains"].values()} == {None}   # the incumbent is the best
    held = challenge("third", 0.015, -0.1, promote=False)
    assert held["waiting"] and {each["look"] for each in held["decision"]["domains"].values()} == {2}
    assert held["decision"]["anchors"] == {"math": 1, "sql": 2}
    assert held["decision"]["domains"]["math"]["anchor"]["point"] == pytest.approx(0.03, abs=1e-3)
    assert release.release(workspace, CONFIG)["champion"] == 3   # the same question, and no look more
    champion.update(math=1.03, sql=0.8)
    fourth = challenge("fourth", 0.015, -0.1)
    assert fourth["champion"] == 3 and {each["look"] for each in fourth["decision"]["domains"].values()} == {3}
    assert "math: worse than the tolerance of 0.04 allows: loss +0.04" in fourth["decision"]["reason"]
    assert "against its best champion so far" in fourth["decision"]["reason"]
    refused = challenge("fifth", 0.5, 0.0)
    assert {each["look"] for each in refused["decision"]["domains"].values()} == {4}
    shown = release.examine(workspace, CONFIG, 3, against=1, record=False)
    assert {each["look"] for each in shown["domains"].values()} == {1}
    assert {each["look"] for each in Registry(workspace, CONFIG).get(5).gate["domains"].values()} == {4}   # type: ignore[index]


def test_a_champion_by_force_does_not_make_the_gate_forget_the_best(workspace: Workspace,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated(workspace, math=1.0, sql=1.0)
    release.release(workspace, CONFIG)
    build(workspace, "forced")
    evaluated(workspace, math=1.3, sql=1.0)
    monkeypatch.setattr("flows.steps.release.compare", lambda *_: rows(+0.3))
    Registry(workspace, CONFIG).register_mixture({
        domain: Registry(workspace, CONFIG).register_expert(domain) for domain in CONFIG.domains})
    release.approve(workspace, CONFIG, 2, force=True, note="the old one leaks")
    build(workspace, "next")
    monkeypatch.setattr("flows.steps.release.compare", lambda *_: rows(0.3))
    decision = release.release(workspace, CONFIG)["decision"]
    assert decision["anchors"]["math"] == 1 and decision["domains"]["math"]["anchor"]["verdict"] == "fail"


def test_a_decision_on_many_domains_is_kept_whole(workspace: Workspace) -> None:
    release.release(workspace, CONFIG)
    registry = Registry(workspace, CONFIG)
    decision = {"promote": True, "reason": "No domain is worse.", "domains": {
        f"domain-{number}": {"verdict": "pass", "reason": "x" * 2000} for number in range(120)}}
    registry.record_gate(1, decision)
    assert Registry(workspace, CONFIG).get(1).gate == decision
    registry.record_gate(1, {"promote": False, "reason": "short"})
    assert Registry(workspace, CONFIG).get(1).gate == {"promote": False, "reason": "short"}


def test_a_rollback_stays_and_a_question_is_asked_once(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("flows.steps.release.compare", lambda *which: (asked.append(which[1:]), rows(-0.2))[1])
    release.release(workspace, CONFIG)
    build(workspace, "better")
    assert release.release(workspace, CONFIG, promote=False)["champion"] == 1
    assert release.release(workspace, CONFIG)["champion"] == 2
    release.promote(workspace, CONFIG, 1, "users complain")
    again = release.release(workspace, CONFIG)
    assert again["champion"] == 1 and "users complain" in again["decision"]["reason"]
    assert asked == [(1, 2)]
    corpus = workspace.corpus("math") / MANIFEST
    build(workspace, "other")
    release.release(workspace, CONFIG, promote=False)
    write_json(corpus, {"digest": "new rows"})
    release.release(workspace, CONFIG, promote=False)
    assert asked == [(1, 2), (1, 3), (1, 3)]


def test_deleting_the_alias_does_not_open_the_gate(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    release.release(workspace, CONFIG)
    Registry(workspace, CONFIG).client.delete_registered_model_alias("moa-mixture", "champion")
    build(workspace, "worse")
    monkeypatch.setattr("flows.steps.release.compare", lambda *_: rows(+0.2))
    assert release.release(workspace, CONFIG)["champion"] is None
    build(workspace, "first")
    assert release.release(workspace, CONFIG)["champion"] == 1


def test_a_failed_comparison_fails_the_release(workspace: Workspace) -> None:
    with pytest.raises(PipelineError, match="Versions 1 and 2 could not be compared: "):
        release.compare(workspace, 1, 2)

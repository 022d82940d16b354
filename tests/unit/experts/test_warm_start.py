"""Experts that begin at another one: they never end worse, and are the same however they were trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moa.base import pin
from moa.core import config
from moa.core.config import Config
from moa.core.errors import ArtifactError, ConfigError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import prepare
from moa.experts import train as experts
from moa.experts import warm_start
from moa.experts.cotraining import Learner, cotrain, validation_losses
from moa.experts.peft_format import CONFIG, WEIGHTS, state
from moa.mixture import parent_selection
from moa.mixture.assemble import assemble
from moa.workspace import warm_starts
from tests import tiny
from tests.unit.experts.test_cotraining import PARAMS, WILD, Plan, difference, prepared, train

TRAIN = {"rank": 4, "alpha": 64.0, "epochs": 5, "warm_patience": 0, "batch_rows": 4, "learning_rate": 0.02,
         "batch_tokens": 512}
ADAPT = {"candidate_gain": 0.03}   # the tiny base's words weigh so little that nobody saves a tenth


# The learner.

def warm_plans() -> list[Plan]:
    wild = PARAMS.model_copy(update={"learning_rate": 10.0, "patience": 1, "epochs": 4})
    return [Plan("a", warm=True), Plan("b", warm=True, params=wild), Plan("c", params=WILD)]


def test_the_start_is_epoch_0_and_the_best_of_who_gets_no_better() -> None:
    model, stack, learners = prepared(warm_plans())
    learners[0].validation = learners[0].rows[:4]   # words drawn at random can only be learned by heart
    before = validation_losses(model, stack, learners, 50)
    began = stack.weights.clone()
    cotrain(model, stack, learners, 50)
    a, b, c = learners
    for learner in (a, b):
        first = learner.progress.curve[0]
        assert first == {"epoch": 0, "step": 0, "tokens": 0, "validation_loss": before[learner.name]}
    assert c.progress.curve[0]["epoch"] == 1   # nobody was there before
    assert a.progress.best_epoch > 0 and a.progress.best_loss < before["a"]
    assert b.progress.best_epoch == 0 and b.progress.best_loss == before["b"]
    assert torch.equal(stack.weights[1], began[1]) and b.progress.epoch == 1 and b.progress.stopped
    after = validation_losses(model, stack, learners, 50)
    assert after["a"] == pytest.approx(a.progress.best_loss, abs=1e-12) and after["b"] == before["b"]


def test_a_resumed_start_is_measured_once_and_ends_the_same() -> None:
    plans, saved = warm_plans(), []
    whole = train(plans)

    class Killed(Exception):
        pass

    def kill(_: Sequence[Learner]) -> None:
        for learner in learners:
            tensors = {key: value.clone() for key, value in learner.tensors().items()}
            saved.append((learner.progress, tensors))
        raise Killed

    model, stack, learners = prepared(plans)
    with pytest.raises(Killed):
        cotrain(model, stack, learners, 50, kill)
    model, stack, again = prepared(plans)
    for learner, (progress, tensors) in zip(again, saved, strict=True):
        learner.restore(progress, tensors)
    cotrain(model, stack, again, 50)
    for expert, plan in enumerate(plans):
        assert difference(state(stack, expert), whole[plan.name][0]) == 0
        assert again[expert].progress == whole[plan.name][1].progress


# The step.

@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Config]:
    """Three domains with experts and a mixture. Tests work on copies."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("warm"), ("alpha", "beta", "gamma"), train=TRAIN,
                               adapt=ADAPT)
    workspace.raw("alpha2").mkdir(parents=True)   # new, and like alpha
    lines = "".join(json.dumps(tiny.row("alpha", number)) + "\n" for number in range(100, 140))
    (workspace.raw("alpha2") / "rows.jsonl").write_text(lines, encoding="utf-8")
    settings = config.load(workspace.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        patch.setenv("MOA_DTYPE", "float32")
        pin.fetch(workspace, settings.base)
        for domain in settings.domains:
            prepare.prepare(workspace, settings, domain)
        experts.train(workspace, settings, list(settings.domains))
        assemble(workspace, settings)
        text = workspace.params.read_text().replace("  alpha:\n", "  alpha2:\n    metric: rouge_l\n  alpha:\n")
        workspace.params.write_text(text)
        settings = config.load(workspace.params)
        prepare.prepare(workspace, settings, "alpha2")
    return workspace, settings


@pytest.fixture
def copy(built: tuple[Workspace, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Config]:
    shutil.copytree(built[0].root, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("MOA_DTYPE", "float32")
    return Workspace(tmp_path / "copy"), built[1]


def begin_at(workspace: Workspace, **parents: str) -> None:
    """What `starts.use` leaves, without DVC."""
    written = {name: warm_starts.InitialExpert(other, experts_digest(workspace, other)) for name,
               other in parents.items()}
    for start in written.values():
        shutil.copytree(workspace.expert(start.domain), workspace.parent(start.digest), dirs_exist_ok=True)
    warm_starts._write(workspace, written)


def experts_digest(workspace: Workspace, domain: str) -> str:
    digest: str = read_json(workspace.expert(domain) / MANIFEST)["digest"]
    return digest


def manifest(workspace: Workspace, domain: str) -> dict[str, Any]:
    content: dict[str, Any] = read_json(workspace.expert(domain) / MANIFEST)
    return content


def test_an_expert_begins_at_its_parent(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    begin_at(workspace, alpha2="alpha", beta="beta")
    assert not experts.finished(workspace, settings, "beta") and experts.finished(workspace, settings, "alpha")
    before = manifest(workspace, "beta")
    experts.train(workspace, settings, ["alpha2", "beta", "gamma"])
    assert all(experts.finished(workspace, settings, domain) for domain in ("alpha2", "beta"))
    for domain, start in warm_starts.read(workspace).items():
        now = manifest(workspace, domain)
        assert now["parent"] == {"domain": start.domain, "digest": start.digest}
        assert now["curve"][0]["epoch"] == 0 and now["best_loss"] <= now["curve"][0]["validation_loss"]
    assert manifest(workspace, "gamma")["parent"] is None
    assert manifest(workspace, "beta")["curve"][0]["validation_loss"] == pytest.approx(before["best_loss"], abs=1e-6)
    assert manifest(workspace, "beta")["best_loss"] <= before["best_loss"] + 1e-6


def test_another_start_is_another_expert_and_the_same_start_the_same(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    found = set()
    for parents in ({"alpha2": "alpha"}, {"alpha2": "beta"}, {}, {"alpha2": "alpha"}):
        begin_at(workspace, **parents)
        assert not experts.finished(workspace, settings, "alpha2")
        experts.train(workspace, settings, ["alpha2"])
        found.add((str(parents), (workspace.expert("alpha2") / WEIGHTS).read_bytes()))
    assert len(found) == 3


def test_patience_of_a_warm_expert_is_its_own(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    wild = settings.train.model_copy(update={"learning_rate": 0.2, "epochs": 4, "warm_patience": 2})
    settings = settings.model_copy(update={"train": wild})
    begin_at(workspace, beta="beta")   # which has learned what it can
    experts.train(workspace, settings, ["alpha", "beta"])
    assert [len(manifest(workspace, domain)["curve"]) for domain in ("alpha", "beta")] == [4, 3]
    assert manifest(workspace, "beta")["best_epoch"] == 0
    kept, = workspace.parents.glob(f"*/{WEIGHTS}")
    assert (workspace.expert("beta") / WEIGHTS).read_bytes() == kept.read_bytes()


def rank(workspace: Workspace, settings: Config) -> Config:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"rank": 2})})


def alpha(workspace: Workspace, settings: Config) -> Config:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"alpha": 8.0})})


def targets(workspace: Workspace, settings: Config) -> Config:
    return settings.model_copy(update={"train": settings.train.model_copy(update={"targets": ["q_proj"]})})


def foreign(workspace: Workspace, settings: Config) -> Config:
    kept, = workspace.parents.iterdir()
    write_json(kept / MANIFEST, read_json(kept / MANIFEST) | {"base": {"digest": "0" * 64, "source": "path:other"}})
    return settings


@pytest.mark.parametrize(("change", "reason"), [
    (rank, "its rank is 4, and train.rank is 2"), (alpha, "its alpha is 64.0, and train.alpha is 8.0"),
    (targets, "it adapts other layers than train.targets"), (foreign, "it was trained on another base (path:other)")])
def test_a_start_that_does_not_fit_is_said_and_not_used(
        copy: tuple[Workspace, Config], change: Callable[[Workspace, Config], Config], reason: str,
        capsys: pytest.CaptureFixture[str]) -> None:
    workspace, settings = copy
    begin_at(workspace, beta="alpha")
    settings = change(workspace, settings)
    experts.train(workspace, settings, ["beta"])
    written = manifest(workspace, "beta")
    assert written["parent"] is None and written["parent_refused"] == reason
    digest = experts_digest(workspace, "alpha")[:12]
    assert f"train beta: afresh, not from the expert of alpha ({digest}): {reason}." in capsys.readouterr().err
    assert written["curve"][0]["epoch"] == 1
    bytes_ = (workspace.expert("beta") / WEIGHTS).read_bytes()
    warm_starts._write(workspace, {})
    experts.train(workspace, settings, ["beta"])
    assert (workspace.expert("beta") / WEIGHTS).read_bytes() == bytes_   # as if there had been no start


def test_missing_or_other_bytes_are_one_sentence_and_nothing_is_written(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    begin_at(workspace, alpha2="alpha")
    kept, = workspace.parents.iterdir()
    path = f"data/parents/{kept.name}"
    with (kept / CONFIG).open("a") as file:
        file.write("\n")
    with pytest.raises(ArtifactError, match=rf"is not the one .* run `dvc checkout --force {path}\.dvc`\.$"):
        experts.train(workspace, settings, ["alpha2"])
    shutil.rmtree(kept)
    with pytest.raises(ArtifactError, match=rf"is not there: run `dvc checkout {path}\.dvc`, or `dvc pull "):
        experts.train(workspace, settings, ["alpha2"])
    assert not workspace.expert("alpha2").exists() and not list((workspace.local / "training").glob("*"))


@pytest.mark.parametrize("content", ["[", "[]", '{"law": 3}', '{"law": {"domain": "a"}}',
                                     '{"law": {"domain": "a", "digest": "../../x"}}',
                                     '{"law": {"domain": 1, "digest": ""}}'])
def test_a_damaged_list_of_starts_is_one_sentence(tmp_path: Path, content: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.data.mkdir()
    workspace.starts.write_text(content)
    with pytest.raises(ArtifactError, match=r"^data/starts\.json .*`git checkout data/starts\.json`, or delete it to "):
        warm_start.read(workspace)


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(copy: tuple[Workspace, Config]) -> None:
    """A real process, a real kill -9, with checkpoints at every step."""
    workspace, settings = copy
    begin_at(workspace, alpha2="alpha")
    experts.train(workspace, settings, ["alpha2", "gamma"])
    whole = (workspace.expert("alpha2") / WEIGHTS).read_bytes(), manifest(workspace, "alpha2")
    shutil.rmtree(workspace.expert("alpha2"))
    script = ("import signal, sys; from moa.core import config; from moa.experts import train as experts; "
              "from moa.core.paths import Workspace; import torch; "
              "torch.set_num_threads(1); save = experts.Checkpoint.save\n"
              "def slow(self, learners):\n"
              "    save(self, learners)\n"
              "    if learners[0].progress.step == 9: print('now', flush=True); signal.pause()\n"
              "experts.Checkpoint.save_now_and_then = slow; w = Workspace.find(); "
              "experts.train(w, config.load(w.params), ['alpha2'])\n")
    with subprocess.Popen([sys.executable, "-c", script], cwd=workspace.root, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "MOA_DTYPE": "float32"}) as process:
        assert process.stdout is not None and process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGKILL)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts.Checkpoint, "save_now_and_then",
                      lambda self, learners: steps.append(learners[0].progress.step))
        experts.train(workspace, settings, ["alpha2"])
    assert steps[0] == 10 and not list((workspace.local / "training").iterdir())
    assert ((workspace.expert("alpha2") / WEIGHTS).read_bytes(), manifest(workspace, "alpha2")) == whole


# The choice of a parent.

def test_the_parent_is_the_expert_that_knows_the_new_domains_answers(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    found = parent_selection.candidates(workspace, settings, "alpha2")
    table = {each["parent"]: each for each in found["table"]}
    assert found["domain"] == "alpha2" and found["rows"] == 8 and set(table) == {None, "alpha", "beta", "gamma"}
    assert found["chosen"] == "alpha" and found["table"][1]["parent"] == "alpha"   # the router's first thought
    assert table["alpha"]["loss"] < min(table[other]["loss"] for other in (None, "beta", "gamma"))
    assert sum(table[name]["shortlisted_by"] for name in ("alpha", "beta", "gamma")) == pytest.approx(1)
    assert table[None]["shortlisted_by"] is None
    saved = 1 - table["alpha"]["loss"] / table[None]["loss"]
    assert f"it saves {saved:.1%} of the base's loss, and adapt.candidate_gain asks for 3.0%." in found["reason"]
    begin_at(workspace, alpha2="alpha")
    experts.train(workspace, settings.model_copy(update={"train": settings.train.model_copy(update={
        "validation_rows": 8})}), ["alpha2"])
    first = manifest(workspace, "alpha2")["curve"][0]
    assert first["validation_loss"] == pytest.approx(table["alpha"]["loss"], abs=1e-5)


def adapted(settings: Config, **changes: Any) -> Config:
    return settings.model_copy(update={"adapt": settings.adapt.model_copy(update=changes)})


def test_a_fresh_start_is_a_valid_choice(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    found = parent_selection.candidates(workspace, adapted(settings, candidate_gain=0.99), "alpha2")
    assert found["chosen"] is None and len(found["table"]) == 4
    assert found["reason"].endswith("asks for 99.0%, so the training begins afresh.")
    assert "none (the base)" in parent_selection.text(found)


def test_few_experts_are_tried_whatever_their_number(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    found = parent_selection.candidates(workspace, adapted(settings, candidates=1, candidate_rows=3), "alpha2")
    assert [each["parent"] for each in found["table"]] == [None, "alpha"] and found["rows"] == 3
    none = parent_selection.candidates(workspace, adapted(settings, candidates=0), "alpha2")
    assert (none["table"], none["chosen"]) == ([], None) and "adapt.candidates is 0" in none["reason"]


@pytest.mark.parametrize("damage", ["missing", "router", "manifest", "another base"])
def test_without_a_mixture_the_experts_are_tried_in_order(copy: tuple[Workspace, Config], damage: str) -> None:
    workspace, settings = copy
    content = read_json(workspace.mixture / MANIFEST)
    if damage == "missing":
        shutil.rmtree(workspace.mixture)
    elif damage == "router":
        (workspace.mixture / "router.safetensors").write_bytes(b"x")
    elif damage == "manifest":
        (workspace.mixture / MANIFEST).write_text("[]")
    else:
        write_json(workspace.mixture / MANIFEST, content | {"base": content["base"] | {"digest": "0" * 64}})
    found = parent_selection.candidates(workspace, adapted(settings, candidates=2), "alpha2")
    assert [(each["parent"], each["shortlisted_by"]) for each in found["table"]] == [
        (None, None), ("alpha", None), ("beta", None)]
    assert found["chosen"] == "alpha"


def test_only_experts_that_fit_are_tried(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    other = manifest(workspace, "alpha")
    write_json(workspace.expert("alpha") / MANIFEST, other | {"base": other["base"] | {"digest": "0" * 64}})
    found = parent_selection.candidates(workspace, adapted(settings, candidates=2), "alpha2")
    assert {each["parent"] for each in found["table"]} == {None, "beta", "gamma"}
    found = parent_selection.candidates(workspace, rank(workspace, settings), "alpha2")
    assert [each["parent"] for each in found["table"]] == [None] and found["chosen"] is None
    assert found["reason"] == "No other expert has this base, rank, alpha and targets: the training begins afresh."


def test_the_command(copy: tuple[Workspace, Config], capsys: pytest.CaptureFixture[str]) -> None:
    from moa.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moa.cli.app.place.directory", None)
        main.parent(domain="alpha2", as_json=True)
        said = json.loads(capsys.readouterr().out)
        assert said["chosen"] == "alpha" and said["domain"] == "alpha2"
        main.parent(domain="alpha2")
        text = capsys.readouterr().out
        assert said["reason"] in text and "Nats per completion token, over 8 validation rows of alpha2." in text
        with pytest.raises(ConfigError, match="No domain 'law' in params"):
            main.parent(domain="law")
    shutil.rmtree(copy[0].corpus("alpha2"))
    with pytest.raises(ArtifactError, match="run `moa prepare --domain alpha2` first"):
        parent_selection.candidates(*copy, "alpha2")

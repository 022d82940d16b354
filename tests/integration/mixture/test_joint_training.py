"""`assemble` with joint training on a tiny base: experts of the mixture's own, and a router that reads under them."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moa.base import load
from moa.base import pin as base
from moa.base.device import Device
from moa.core import config, digests
from moa.core.config import Config
from moa.core.errors import RegistryError, TrainingError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus, prepare
from moa.experts import train
from moa.experts.peft_format import WEIGHTS
from moa.mixture.assemble import assemble
from moa.mixture.mixture import Mixture
from moa.release.registration import _check_experts
from moa.release.registry import ExpertVersion
from tests import tiny

DOMAINS = ("alpha", "beta")
TRAIN = {"rank": 2, "alpha": 4.0, "epochs": 1, "batch_rows": 4, "learning_rate": 0.02, "batch_tokens": 512}
JOINT = {"joint_epochs": 1, "joint_learning_rate": 0.01}
EXACT = Device("cpu", "float32", "sums that can be compared")
Built = tuple[Workspace, Config]


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Experts, and no mixture yet."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("trained"), DOMAINS, rows=24, train=TRAIN, assemble=JOINT)
    settings = config.load(workspace.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        base.fetch(workspace, settings.base)
        for domain in DOMAINS:
            prepare.prepare(workspace, settings, domain)
        train.train(workspace, settings, DOMAINS)
    return workspace, settings


@pytest.fixture(scope="module")
def built(trained: Built, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Assembled jointly, with labels."""
    return assembled(trained, tmp_path_factory.mktemp("built"))


def assembled(trained: Built, folder: Path, **changes: Any) -> Built:
    """A copy of the workspace, assembled under other parameters."""
    workspace = Workspace(folder / "copy")
    shutil.copytree(trained[0].root, workspace.root)
    params = trained[1].assemble.model_copy(update=changes)
    settings = trained[1].model_copy(update={"assemble": params})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        assemble(workspace, settings)
    return workspace, settings


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def loaded(built: Built) -> Mixture:
    return Mixture.load(built[0].mixture, load.load(built[0], built[1].base, EXACT))


def accuracy(built: Built, mixture: Mixture) -> float:
    asked = [(row.prompt, domain) for domain in DOMAINS for row in corpus.read(built[0].corpus(domain), "test")]
    decisions = mixture.route([prompt for prompt, _ in asked])
    return sum(decision.domain == domain for decision, (_, domain) in zip(decisions, asked, strict=True)) / len(asked)


def versions(workspace: Workspace) -> dict[str, ExpertVersion]:
    """What the registry would say of the experts in `data/experts`."""
    found = {domain: read_json(workspace.expert(domain) / MANIFEST)["digest"] for domain in DOMAINS}
    return {domain: ExpertVersion(f"moa-expert-{domain}", 1, digest, "") for domain, digest in found.items()}


def test_the_mixture_has_experts_of_its_own_and_names_their_parents(trained: Built, built: Built) -> None:
    manifest = read_json(built[0].mixture / MANIFEST)
    assert manifest["router"]["stream"] == "experts"
    for domain in DOMAINS:
        parent, pinned = built[0].expert(domain), manifest["experts"][domain]
        assert pinned["parent"] == read_json(parent / MANIFEST)["digest"] == digests.of_expert(parent)
        assert pinned["digest"] == digests.of_expert(built[0].mixture / "experts" / domain) != pinned["parent"]
        own = read_json(built[0].mixture / "experts" / domain / MANIFEST)
        assert (own["digest"], own["parent"]) == (pinned["digest"], pinned["parent"]) and len(own["curve"]) == 1
        assert pinned["corpus"] == own["corpus"] == read_json(parent / MANIFEST)["corpus"]
        assert files(parent) == files(trained[0].expert(domain))   # as `train` left them
        ours, theirs = (load_file(folder / WEIGHTS) for folder in (built[0].mixture / "experts" / domain, parent))
        assert ours.keys() == theirs.keys() and any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_loads_routes_and_answers(built: Built) -> None:
    mixture = loaded(built)
    assert mixture.router.stream == "experts" and accuracy(built, mixture) == 1.0
    asked = [corpus.read(built[0].corpus(domain), "test")[0].prompt for domain in DOMAINS]
    together = mixture.generate(asked, max_new_tokens=6)
    alone = [mixture.chat(prompt, max_new_tokens=6) for prompt in asked]
    for one, same in zip(together, alone, strict=True):
        routed = {"confidence": None, "similarity": None}   # in float32
        assert replace(one, **routed) == replace(same, **routed)
        assert (one.confidence, one.similarity) == (pytest.approx(same.confidence), pytest.approx(same.similarity))
    assert [choice.level for choice in mixture.trace(asked[0])] == [0, 1]


def test_its_experts_are_peft_directories(built: Built) -> None:
    mixture, plain = loaded(built), load.load(built[0], built[1].base, EXACT).model
    ids = torch.tensor([mixture.encoder.row(corpus.read(built[0].corpus("beta"), "test")[0].messages).ids])
    mixture.stack.select(torch.tensor([mixture.expert_of("beta")]))
    with torch.inference_mode():
        ours = mixture.base.model(ids).logits
        theirs = PeftModel.from_pretrained(plain, built[0].mixture / "experts" / "beta")(ids).logits
    assert (ours - theirs).abs().max() < 1e-4


def test_no_expert_is_worse_on_validation_than_its_parent(trained: Built, built: Built,
                                                          tmp_path: Path) -> None:
    """On the very rows that joint training looks at."""
    alone = assembled(trained, tmp_path, joint_epochs=0)
    for domain in DOMAINS:
        content = [row.messages for row in corpus.read(built[0].corpus(domain), "validation")]
        found = []
        for each in (built, alone):
            losses = loaded(each).losses(content, [domain] * len(content))
            found.append(sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses))
        assert found[0] <= found[1] + 1e-5
        assert "parent" not in read_json(alone[0].mixture / MANIFEST)["experts"][domain]


@pytest.mark.parametrize("recompute", [False, True])
def test_assembling_again_gives_the_same_bytes(built: Built, tmp_path: Path, recompute: bool) -> None:
    before = files(built[0].mixture)
    workspace = Workspace(tmp_path / "again")
    shutil.copytree(built[0].root, workspace.root)
    settings = built[1].model_copy(update={"train": built[1].train.model_copy(update={"recompute": recompute})})
    for _ in range(2):   # from cached features, and from the base
        assemble(workspace, settings)
        assert files(workspace.mixture) == before
        shutil.rmtree(workspace.cache)


@pytest.mark.parametrize("changes", [{"eta": 0.0}, {"joint_start": "random"}, {"eta": 0.0, "joint_start": "random"},
                                     {"joint_learning_rate": 0.0}, {"rule": "last"}, {"rule": "vote"}], ids=str)
def test_every_way_to_train_jointly_loads_and_routes(trained: Built, changes: dict[str, Any], tmp_path: Path) -> None:
    made = assembled(trained, tmp_path, **changes)
    mixture = loaded(made)
    manifest = read_json(made[0].mixture / MANIFEST)
    assert mixture.router.stream == manifest["router"]["stream"] == ("experts" if changes.get("eta", 1) else "blend")
    assert accuracy(made, mixture) >= (1.0 if changes.get("eta", 1) else 0.0)
    assert mixture.chat([{"role": "user", "content": "alpha: what is alpha 3?"}], max_new_tokens=4).tokens > 0
    if "joint_learning_rate" in changes:   # the router alone has learned
        assert all(pin["digest"] == pin["parent"] for pin in manifest["experts"].values())


def test_an_expert_that_breaks_is_named_and_nothing_is_written(trained: Built, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Joint training failed for alpha.*lower assemble\.joint_learning_rate"):
        assembled(trained, tmp_path, joint_epochs=3, joint_learning_rate=float("inf"))
    assert not (tmp_path / "copy" / "data" / "mixture").exists()


def test_a_registration_compares_the_parents(built: Built, trained: Built, tmp_path: Path) -> None:
    manifest = read_json(built[0].mixture / MANIFEST)
    registered = versions(built[0])
    _check_experts(manifest, registered)
    own = {domain: ExpertVersion(each.name, 2, manifest["experts"][domain]["digest"], "")
           for domain, each in registered.items()}
    with pytest.raises(RegistryError, match="another expert of 'alpha' than the one registered"):
        _check_experts(manifest, own)
    alone = assembled(trained, tmp_path, joint_epochs=0)   # and without joint training, the experts
    _check_experts(read_json(alone[0].mixture / MANIFEST), versions(alone[0]))


def test_base_features_are_cached_and_those_under_experts_are_not(built: Built, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    cached = sorted(path.name for path in (built[0].cache / "features").iterdir())
    assert len(cached) == 2 * len(DOMAINS) + 1   # and the prompts of no domain
    workspace = Workspace(tmp_path / "again")
    shutil.copytree(built[0].root, workspace.root)
    assemble(workspace, built[1])
    assert sorted(path.name for path in (workspace.cache / "features").iterdir()) == cached

"""From rows to an evaluated mixture on a tiny base, without DVC: every step is the real one, only the size is not."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from moa.base import load
from moa.base import pin as base
from moa.base.device import Device
from moa.base.encoding import Message
from moa.core import config, digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, UsageError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus, prepare
from moa.evaluation.evaluate import evaluate
from moa.evaluation.routing import abstentions, reliability
from moa.experts import train
from moa.experts.peft_format import WEIGHTS
from moa.mixture import artifact
from moa.mixture.assemble import assemble
from moa.mixture.mixture import BASE, Mixture
from tests import tiny

DOMAINS = ("alpha", "beta")
TRAIN = {"rank": 2, "alpha": 4.0, "epochs": 3, "batch_rows": 4, "learning_rate": 0.02, "batch_tokens": 512}
EXACT = Device("cpu", "float32", "sums that can be compared")


@pytest.fixture(scope="module", autouse=True)
def float32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Config]:
    """Everything made once. Tests that change something work on a copy."""
    workspace = tiny.workspace(tmp_path_factory.mktemp("built"), DOMAINS, train=TRAIN,
                               evaluate={"generate_rows": 3, "max_new_tokens": 12, "batch_rows": 4})
    settings = config.load(workspace.params)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace.root)
        tiny.build(workspace, settings)
    return workspace, settings


@pytest.fixture
def copy(built: tuple[Workspace, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Config]:
    shutil.copytree(built[0].root, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Workspace(tmp_path / "copy"), built[1]


@pytest.fixture(scope="module")
def mixture(built: tuple[Workspace, Config]) -> Mixture:
    return Mixture.load(built[0].mixture, load.load(*_of(built), EXACT))


@pytest.fixture(scope="module")
def plain(built: tuple[Workspace, Config]) -> load.Base:
    """A base that no mixture is on."""
    return load.load(*_of(built), EXACT)


def _of(built: tuple[Workspace, Config]) -> tuple[Workspace, Any]:
    return built[0], built[1].base


def prompts(built: tuple[Workspace, Config], domain: str) -> list[list[Message]]:
    return [row.prompt for row in corpus.read(built[0].corpus(domain), "test")]


def expert_bytes(workspace: Workspace) -> dict[str, bytes]:
    return {domain: (workspace.expert(domain) / WEIGHTS).read_bytes() for domain in DOMAINS}


# The mixture at work.

@pytest.mark.parametrize("domain", DOMAINS)
def test_peft_gives_the_logits_of_the_forced_label(built: tuple[Workspace, Config], mixture: Mixture,
                                                   domain: str) -> None:
    from peft import PeftModel

    plain = load.load(*_of(built), EXACT).model
    ids = torch.tensor([mixture.encoder.row(corpus.read(built[0].corpus(domain), "test")[0].messages).ids])
    mixture.stack.select(torch.tensor([mixture.expert_of(domain)]))
    with torch.inference_mode():
        ours, alone = mixture.base.model(ids).logits, plain(ids).logits
        theirs = PeftModel.from_pretrained(plain, built[0].expert(domain))(ids).logits
    mixture.stack.select(None)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - alone).abs().max() > 1e-2


def test_routing_goes_by_content(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    for domain in DOMAINS:
        decisions = mixture.route(prompts(built, domain))
        assert {decision.domain for decision in decisions} == {domain}
        assert all(0.5 < decision.confidence <= 1 for decision in decisions)


def test_the_callers_label_wins(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    prompt = prompts(built, "alpha")[0]
    answers = {domain: mixture.chat(prompt, domain, max_new_tokens=12) for domain in (*DOMAINS, BASE)}
    for domain, answer in answers.items():
        assert (answer.domain, answer.confidence, answer.abstained) == (domain, None, False)
        assert answer.similarity is answer.threshold is None
        assert [answer] == mixture.generate([prompt], [domain], max_new_tokens=12)
    assert len({answer.answer for answer in answers.values()}) == 3
    routed = mixture.chat(prompt, max_new_tokens=12)
    decision, = mixture.route([prompt])
    assert routed.domain == "alpha" and routed.confidence == (None if routed.abstained else decision.confidence)
    assert (routed.similarity, routed.threshold) == (decision.score, decision.threshold)
    assert routed.answer == answers[BASE if routed.abstained else "alpha"].answer


def test_an_unsure_router_leaves_the_answer_to_the_base(built: tuple[Workspace, Config], mixture: Mixture,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture.router, "threshold_C", torch.full((2,), 2.0))   # no cosine reaches it
    prompt = prompts(built, "beta")[0]
    answer = mixture.chat(prompt, max_new_tokens=8)
    alone, = mixture.generate([prompt], [BASE], max_new_tokens=8)
    assert answer.abstained and answer.answer == alone.answer
    assert (answer.domain, answer.confidence, answer.threshold) == ("beta", None, 2.0)
    assert answer.similarity is not None and 0.5 < answer.similarity <= 1.0001


def test_an_unknown_domain_is_refused_with_the_known_ones(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    with pytest.raises(UsageError, match="no expert 'gamma'; it has alpha, beta, and base"):
        mixture.chat(prompts(built, "alpha")[0], domain="gamma")


def test_a_mixed_batch_answers_as_one_by_one(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    asked = [(prompt, domain) for content in DOMAINS for prompt in prompts(built, content)[:2]
             for domain in (*DOMAINS, BASE)]
    asked.append(([{"role": "user", "content": "much longer " * 8}], "beta"))
    together = mixture.generate([prompt for prompt, _ in asked], [domain for _, domain in asked], max_new_tokens=12)
    assert together == [mixture.chat(prompt, domain, max_new_tokens=12) for prompt, domain in asked]
    for (prompt, domain), answer in list(zip(asked, together, strict=True))[:6]:
        assert "".join(mixture.stream(prompt, domain, max_new_tokens=12)).strip() == answer.answer


def test_unloading_gives_the_base_back(built: tuple[Workspace, Config]) -> None:
    before = load.load(*_of(built), EXACT).model.state_dict()
    loaded = Mixture.load(built[0].mixture, load.load(*_of(built), EXACT))
    loaded.losses([row.messages for row in corpus.read(built[0].corpus("alpha"), "test")][:2], DOMAINS)
    after = loaded.unload().model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


ELSEWHERE = '''
import json, socket, sys
from dataclasses import asdict
from pathlib import Path

def refuse(*_):
    raise OSError("the network was asked")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import torch
from moa.base import load
from moa.base.device import Device
from moa.core import config
from moa.core.paths import Workspace
from moa.mixture.mixture import Mixture

torch.set_num_threads(1)   # as here: the last bit of a sum depends on it
workspace, prompts = Workspace(Path(sys.argv[1])), json.loads(sys.argv[3])
exact = Device("cpu", "float32", "")
mixture = Mixture.load(Path(sys.argv[2]), load.load(workspace, config.load(workspace.params).base, exact))
print(json.dumps([[asdict(one) for one in made] for made in (mixture.route(prompts), mixture.generate(
    prompts, max_new_tokens=12))]))
'''


def test_a_directory_answers_anywhere_without_a_network(built: tuple[Workspace, Config], mixture: Mixture,
                                                        tmp_path: Path) -> None:
    """Another process, another folder, the same base under another name."""
    other = Workspace(tmp_path / "other")
    other.root.mkdir()
    shutil.copytree(built[0].root / "tiny-base", other.root / "moved-base")
    other.params.write_text(built[0].params.read_text().replace("path:tiny-base", "path:moved-base"))
    base.fetch(other, config.load(other.params).base)
    shutil.copytree(built[0].mixture, tmp_path / "carried" / "here")
    asked = [prompt for domain in DOMAINS for prompt in prompts(built, domain)[:3]]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, other.root, tmp_path / "carried" / "here", json.dumps(asked)], cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
        check=False)
    assert done.returncode == 0, done.stderr
    decisions, answers = json.loads(done.stdout)
    assert decisions == [dataclasses.asdict(one) for one in mixture.route(asked)]
    assert answers == [dataclasses.asdict(one) for one in mixture.generate(asked, max_new_tokens=12)]


def test_writing_and_reading_a_directory_gives_it_again(built: tuple[Workspace, Config], tmp_path: Path) -> None:
    pin = base.pin(built[0])
    manifest, router, folders = artifact.read(built[0].mixture, pin)
    facts = manifest["experts"]
    again = artifact.write(tmp_path, base=pin, prompt=manifest["prompt"], router=router, experts=folders, facts=facts)
    assert again == manifest == artifact.read(tmp_path, pin)[0]
    assert again["digest"] == digests.of_json({key: value for key, value in again.items() if key != "digest"})
    changed = {**facts, "beta": {**facts["beta"], "digest": "0" * 64}}
    with pytest.raises(ArtifactError, match="expert of 'beta' changed while"):
        artifact.write(tmp_path / "b", base=pin, prompt=manifest["prompt"], router=router, experts=folders,
                       facts=changed)


# What evaluate writes.

def test_the_summary_is_what_the_rows_come_to(built: tuple[Workspace, Config]) -> None:
    workspace, settings = built
    scored = pq.read_table(workspace.reports / "rows.parquet").to_pylist()
    summary = read_json(workspace.reports / "summary.json")
    for domain in DOMAINS:
        ids = {row.id for row in corpus.read(workspace.corpus(domain), "test")}
        for system, figures in summary["domains"][domain].items():
            mine = [row for row in scored if (row["domain"], row["system"]) == (domain, system)]
            assert {row["row"] for row in mine} == ids and len(mine) == len(ids) == figures["rows"]
            tokens = sum(row["tokens"] for row in mine)
            assert figures["loss"] == pytest.approx(sum(row["loss"] * row["tokens"] for row in mine) / tokens)
            answered = [row["score"] for row in mine if row["answer"] is not None]
            assert len(answered) == figures["answered"] == settings.evaluate.generate_rows
            assert figures["score"] == pytest.approx(sum(answered) / len(answered))
    routed = [row for row in scored if row["system"] == "routed"]
    assert summary["routing"]["accuracy"] == sum(row["domain"] == row["routed_to"] for row in routed) / len(routed)
    assert summary["routing"]["abstention"] == sum(row["abstained"] for row in routed) / len(routed)
    assert summary["routing"]["by_domain"] == abstentions(scored)
    assert summary["routing"]["reliability"] == reliability(scored)
    assert summary["routing"]["promises"] == read_json(workspace.mixture / MANIFEST)["router"]["promises"]
    for row in scored:
        by = {"base": BASE, "forced": row["domain"], "routed": BASE if row["abstained"] else row["routed_to"]}
        assert row["answered_by"] == by[row["system"]]


def test_experts_know_their_domain_better_than_the_base(built: tuple[Workspace, Config]) -> None:
    for domain, systems in read_json(built[0].reports / "summary.json")["domains"].items():
        assert systems["forced"]["loss"] < 0.97 * systems["base"]["loss"], domain


def test_losses_do_not_depend_on_their_neighbours(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    content = [row.messages for domain in DOMAINS for row in corpus.read(built[0].corpus(domain), "test")[:3]]
    together = mixture.losses(content * 3, [domain for domain in (*DOMAINS, BASE) for _ in content])
    for index, (loss, tokens) in enumerate(together):
        domain = (*DOMAINS, BASE)[index // len(content)]
        assert mixture.losses([content[index % len(content)]], [domain])[0] == (pytest.approx(loss, abs=1e-5), tokens)


# What is refused.

@pytest.mark.parametrize("part", ["weights", "tokenizer", "template"])
def test_another_base_is_refused_by_name(built: tuple[Workspace, Config], part: str) -> None:
    loaded = load.load(*_of(built), EXACT)
    pin = dataclasses.replace(loaded.pin, source="path:elsewhere", **{part: "0" * 64})
    with pytest.raises(ArtifactError, match=rf"path:tiny-base, and the {part} of .*\(path:elsewhere\) differ"):
        Mixture.load(built[0].mixture, dataclasses.replace(loaded, pin=pin))


def test_experts_of_another_base_are_not_assembled(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    tiny.base(workspace.root / "tiny-base", seed=1)
    base.fetch(workspace, settings.base)
    with pytest.raises(ArtifactError, match=r"'alpha' .*weights.*moa train --domain alpha"):
        assemble(workspace, settings)
    with pytest.raises(ArtifactError, match="the weights of this workspace's base"):
        Mixture.load(workspace.mixture, load.load(workspace, settings.base, EXACT))


def scale(path: Path) -> None:
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * 1.01}, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def relabel(path: Path) -> None:
    write_json(path, {**read_json(path), "labels": list(reversed(DOMAINS))})


@pytest.mark.parametrize(("file", "change"), [
    ("router.safetensors", scale), (MANIFEST, relabel), (f"experts/beta/{WEIGHTS}", scale),
    (f"experts/beta/{WEIGHTS}", cut), ("experts/beta/adapter_config.json", Path.unlink),
    (f"experts/beta/{WEIGHTS}", Path.unlink)])
def test_what_was_tampered_with_is_refused(copy: tuple[Workspace, Config], file: str,
                                           change: Callable[[Path], None]) -> None:
    workspace, settings = copy
    loaded = load.load(workspace, settings.base, EXACT)
    change(workspace.mixture / file)
    with pytest.raises(ArtifactError, match="manifest"):
        Mixture.load(workspace.mixture, loaded)
    assert Mixture.load(_again(workspace, settings), loaded).labels == list(DOMAINS)   # the base is as it was


def _again(workspace: Workspace, settings: Config) -> Path:
    assemble(workspace, settings)
    return workspace.mixture


def resealed(folder: Path, **changes: Any) -> None:
    """Change the manifest (None takes a key out), and let every digest agree with what is there now."""
    manifest = {key: value for key, value in (read_json(folder / MANIFEST) | changes).items() if value is not None}
    if manifest.get("router"):
        manifest["router"]["digest"] = digests.of_file(folder / "router.safetensors")
    for label, expert in (manifest.get("experts") or {}).items():
        if (folder / "experts" / label).is_dir():
            expert["digest"] = digests.of_expert(folder / "experts" / label)
    manifest.pop("digest", None)
    write_json(folder / MANIFEST, {**manifest, "digest": digests.of_json(manifest)})


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "router.safetensors")), folder / "router.safetensors")
    resealed(folder)


def pinned(folder: Path, file: str, content: str | bytes) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    resealed(folder)


def facts(folder: Path, **changes: Any) -> None:
    resealed(folder, router=read_json(folder / MANIFEST)["router"] | changes)


def deeper(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([tensor, tensor[:1]]) if name in ("mean", "scale", "weight", "bias") else tensor
            for name, tensor in found.items()}


@pytest.mark.parametrize(("change", "message"), [
    *((lambda folder, key=key: resealed(folder, **{key: None}), rf"no manifest of a mixture: {key}: Field required")
      for key in ("kind", "base", "prompt", "labels", "experts", "router")),
    (lambda folder: resealed(folder, kind="expert"), "no manifest of a mixture: kind"),
    (lambda folder: resealed(folder, base={"source": "x"}), r"no manifest of a mixture: base\.weights"),
    (lambda folder: resealed(folder, prompt={"sistem": ""}), r"no manifest of a mixture: prompt\.sistem"),
    (lambda folder: resealed(folder, labels=["../x", "beta"]), r"labels\.0: .*a domain name is"),
    (lambda folder: resealed(folder, labels=["base", "beta"]), r"labels\.0: .*reserved"),
    (lambda folder: resealed(folder, labels=["alpha"]), "labels and its experts differ"),
    (lambda folder: resealed(folder, labels=["alpha", "alpha", "beta"]), "labels and its experts differ"),
    (lambda folder: (folder / MANIFEST).write_text("{"), r"manifest\.json cannot be read: JSONDecodeError"),
    (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), r"manifest\.json cannot be read: UnicodeDecodeError"),
    (lambda folder: (folder / MANIFEST).write_text("[]"), "no manifest of a mixture: the whole"),
    (lambda folder: (folder / "router.safetensors").unlink(), "The router in .* is not there"),
    (lambda folder: pinned(folder, "router.safetensors", "?"), "The router in .* cannot be read: SafetensorError"),
    (lambda folder: tensors(folder, lambda found: {k: v for k, v in found.items() if k != "bias"}),
     "The router in .* cannot be read: KeyError"),
    (lambda folder: tensors(folder, lambda found: found | {"bias": found["bias"][:, :1].contiguous()}), "does not fit"),
    (lambda folder: tensors(folder, lambda found: found | {"mean": found["mean"] * math.nan}), "does not fit"),
    (lambda folder: tensors(folder, deeper), "reads 3 levels of width 32, and the base has 2 of 32"),
    (lambda folder: facts(folder, rule="best"), "does not fit"),
    (lambda folder: facts(folder, layer=2), "does not fit"),
    (lambda folder: facts(folder, layer="1"), "The router in .* cannot be read: TypeError"),
    (lambda folder: facts(folder, stream="water"), "does not fit"),
    (lambda folder: facts(folder, temperature="high"), "The router in .* cannot be read: TypeError"),
    (lambda folder: tensors(folder, lambda found: {k: v for k, v in found.items() if k != "seen"}), "does not fit"),
    (lambda folder: tensors(folder, lambda found: found | {"threshold": found["threshold"].repeat(2)}), "does not fit"),
    (lambda folder: pinned(folder, f"experts/beta/{WEIGHTS}", "?"), r"beta/adapter_model\.safetensors cannot be read"),
    (lambda folder: pinned(folder, "experts/beta/adapter_config.json", "{"), r"beta/.*json is no LoRA configuration"),
    (lambda folder: pinned(folder, "experts/beta/adapter_config.json", "[]"), r"beta/.*json is no LoRA configuration"),
    (lambda folder: (folder / "experts/beta/more.txt").write_text("?"), "'beta' in .* is not the one"),
    (lambda folder: (folder / "experts/beta/more").mkdir(), "'beta' that the manifest in .* cannot be read: IsADir"),
    (lambda folder: shutil.rmtree(folder / "experts/beta"), "'beta' that the manifest in .* is not there")])
def test_what_cannot_be_used_is_refused_in_one_sentence(built: tuple[Workspace, Config], plain: load.Base,
                                                        tmp_path: Path, change: Callable[[Path], None],
                                                        message: str) -> None:
    folder = tmp_path / "mixture"
    shutil.copytree(built[0].mixture, folder)
    change(folder)
    names = list(plain.model.state_dict())
    with pytest.raises(ArtifactError, match=message) as caught:
        Mixture.load(folder, plain)
    assert "\n" not in str(caught.value) and list(plain.model.state_dict()) == names


def test_other_files_beside_a_mixture_do_not_matter(built: tuple[Workspace, Config], tmp_path: Path) -> None:
    shutil.copytree(built[0].mixture, tmp_path / "mixture")
    (tmp_path / "mixture" / "README.md").write_text("mine")
    (tmp_path / "mixture" / "experts" / "gamma").mkdir()
    assert artifact.read(tmp_path / "mixture", base.pin(built[0]))[1].labels == list(DOMAINS)


def test_an_altered_expert_is_not_assembled(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    scale(workspace.expert("alpha") / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"expert of 'alpha' is not the one .*moa train --domain alpha --fresh"):
        assemble(workspace, settings)


def test_an_expert_that_is_no_number_is_refused(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    folder = workspace.expert("beta")
    save_file({name: tensor * float("nan") for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    content = [path for path in folder.iterdir() if path.name != MANIFEST]
    write_json(folder / MANIFEST, {**read_json(folder / MANIFEST), "digest": digests.of_files(content, folder)})
    assemble(workspace, settings)
    loaded = load.load(workspace, settings.base, EXACT)
    names = list(loaded.model.state_dict())
    with pytest.raises(ArtifactError, match="not finite"):
        Mixture.load(workspace.mixture, loaded)
    assert list(loaded.model.state_dict()) == names


def test_a_missing_expert_is_named(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    shutil.rmtree(workspace.expert("beta"))
    with pytest.raises(ArtifactError, match="'beta' has no expert: run `moa train --domain beta`"):
        assemble(workspace, settings)


def test_no_mixture_says_what_to_run(built: tuple[Workspace, Config], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="run `moa assemble`"):
        Mixture.load(tmp_path, load.load(*_of(built), EXACT))


# Again, and after an interruption.

def test_assembling_again_gives_the_same_mixture(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    before = read_json(workspace.mixture / MANIFEST)
    assert assemble(workspace, settings) == before          # from cached features
    shutil.rmtree(workspace.cache)
    assert assemble(workspace, settings) == before          # from the base


def test_evaluating_again_gives_the_same_rows(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    before = {path.name: path.read_bytes() for path in workspace.reports.iterdir()}
    evaluate(workspace, settings)
    assert {path.name: path.read_bytes() for path in workspace.reports.iterdir()} == before


def test_what_is_finished_is_not_trained_again(copy: tuple[Workspace, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, settings = copy
    assert all(train.finished(workspace, settings, domain) for domain in DOMAINS)
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("the base was loaded"))
    train.train(workspace, settings, DOMAINS)


def test_other_parameters_or_rows_are_not_finished(copy: tuple[Workspace, Config]) -> None:
    workspace, settings = copy
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 1})})
    assert not train.finished(workspace, other, "alpha")
    elsewhere = settings.model_copy(update={"execution": settings.execution.model_copy(update={"workers": 7})})
    assert train.finished(workspace, elsewhere, "alpha")
    with (workspace.raw("alpha") / "rows.jsonl").open("a") as file:
        file.write(json.dumps(tiny.row("alpha", 1000)) + "\n")
    prepare.prepare(workspace, settings, "alpha")
    assert not train.finished(workspace, settings, "alpha") and train.finished(workspace, settings, "beta")


def test_fresh_begins_anew_and_ends_the_same(copy: tuple[Workspace, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, settings = copy
    before, old = expert_bytes(workspace), (workspace.expert("alpha") / MANIFEST).stat().st_ino
    monkeypatch.setattr(train.Checkpoint, "restore", lambda *_: pytest.fail("a checkpoint was read"))
    train.train(workspace, settings, DOMAINS, fresh=True)
    assert expert_bytes(workspace) == before
    assert (workspace.expert("alpha") / MANIFEST).stat().st_ino != old


class Killed(BaseException):
    """As sudden as a signal: nothing in moa catches it."""


@pytest.mark.parametrize("saves", [1, 4, 6, 7])
def test_an_interrupted_training_ends_as_if_it_had_not_been(copy: tuple[Workspace, Config], saves: int,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, settings = copy
    before = expert_bytes(workspace)
    for domain in DOMAINS:
        shutil.rmtree(workspace.expert(domain))
    save, saved = train.Checkpoint.save, []

    def save_and_die(self: train.Checkpoint, learners: Any) -> None:
        save(self, learners)
        saved.append([learner.progress.step for learner in learners])
        if len(saved) == saves:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpoint, "save_now_and_then", save_and_die)
        patch.setattr(train.Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train.train(workspace, settings, DOMAINS)
    assert not any(workspace.expert(domain).exists() for domain in DOMAINS)
    steps: list[int] = []

    def count(self: train.Checkpoint, learners: Any) -> None:
        steps.append(learners[0].progress.step)

    monkeypatch.setattr(train.Checkpoint, "save_now_and_then", count)
    train.train(workspace, settings, DOMAINS)
    assert steps[:1] == [saved[-1][0] + 1]   # not from the beginning
    assert expert_bytes(workspace) == before
    assert not list((workspace.local / "training").iterdir())


def test_one_of_two_interrupted_experts_continues_alone(copy: tuple[Workspace, Config],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, settings = copy
    before = load_file(workspace.expert("alpha") / WEIGHTS)
    for domain in DOMAINS:
        shutil.rmtree(workspace.expert(domain))
    save = train.Checkpoint.save

    def save_and_die(self: train.Checkpoint, learners: Any) -> None:
        save(self, learners)
        if learners[0].progress.step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpoint, "save_now_and_then", save_and_die)
        patch.setattr(train.Checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            train.train(workspace, settings, DOMAINS)
    train.train(workspace, settings, ["alpha"])
    after = load_file(workspace.expert("alpha") / WEIGHTS)
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 1e-3   # sums in another order

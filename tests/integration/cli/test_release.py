"""`moa gate` and `moa release ...` at work, and what the gate makes of sabotage: real mixtures on a tiny base, real
MLflow, and what is registered is downloaded again and answers in a process of its own (`moa compare`)."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from torch import Tensor

from flows.steps import release
from moa.base import load, pin
from moa.base.device import pick_device
from moa.cli import main
from moa.cli.app import place
from moa.core import config, digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, MoaError, NothingReleased, RegistryError
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import NOTHING_RELEASED
from moa.data import prepare
from moa.evaluation import gate
from moa.evaluation.scoring import pinned_rows
from moa.experts import train
from moa.experts.peft_format import CONFIG, WEIGHTS
from moa.mixture import artifact
from moa.mixture.assemble import assemble
from moa.mixture.router import Router
from moa.release.champion import champion, open_mixture
from moa.release.registry import GATE, Registry
from moa.reports.releases import gate_text
from moa.reports.text import run_summary
from tests import tiny

DOMAINS = ("alpha", "beta")
WEAK, NOISE, SWAPPED, STRANGER, EQUAL, BETTER = range(1, 7)   # the versions
SABOTAGE = (NOISE, SWAPPED, STRANGER)


class Shop:
    """A workspace, with what a person would do in it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.results: dict[int, dict[str, Any]] = {}
        self.answers: dict[int, dict[str, Any]] = {}   # what `moa compare` said of each challenger at its release
        self.refusals: dict[int, str] = {}             # what an approval was told

    @property
    def settings(self) -> Config:
        return config.load(self.workspace.params)

    @property
    def registry(self) -> Registry:
        return Registry(self.workspace, self.settings)

    def expert(self, domain: str, change: Callable[[Tensor], Tensor], source: Path) -> None:
        """An expert out of another one's weights, under a manifest that is right."""
        from safetensors.torch import load_file, save_file

        folder = self.workspace.expert(domain)
        save_file({name: change(value).contiguous() for name, value in load_file(source / WEIGHTS).items()},
                  folder / WEIGHTS, metadata={"format": "pt"})
        manifest = read_json(folder / MANIFEST)
        manifest["digest"] = digests.of_files([folder / CONFIG, folder / WEIGHTS], folder)
        write_json(folder / MANIFEST, manifest)

    def stranger(self, kept: Path) -> None:
        """The expert of alpha, trained on the corpus of beta."""
        own, other = (self.workspace.corpus(domain) for domain in DOMAINS)
        own.rename(kept)
        shutil.copytree(other, own)
        train.train(self.workspace, self.settings, ["alpha"])
        shutil.rmtree(own)
        kept.rename(own)
        learned = read_json(self.workspace.expert("alpha") / MANIFEST)["corpus"]
        assert learned == read_json(other / MANIFEST)["digest"] != read_json(own / MANIFEST)["digest"]

    def release(self) -> dict[str, Any]:
        done = release.release(self.workspace, self.settings)
        self.results[done["version"]] = done
        return done

    def params(self, **changed: Any) -> None:
        yaml = YAML()
        content = yaml.load(self.workspace.params)
        content["release"] |= changed
        yaml.dump(content, self.workspace.params)

    def swap_labels(self) -> None:
        """The mixture again, its router calling each of the two domains by the other's name."""
        folder = self.workspace.mixture
        loaded = load.load(self.workspace, self.settings.base, pick_device(["cpu"]))
        manifest, router, folders = artifact.read(folder, loaded.pin)
        router = Router.restore(router.labels[::-1], router.tensors(), manifest["router"])
        with replace_directory(folder) as new:
            artifact.write(new, base=loaded.pin, prompt=manifest["prompt"], router=router, experts=folders,
                         facts=manifest["experts"])

    def golden(self) -> list[tuple[str, float]]:
        """What the champion answers to pinned prompts, and its loss on them, to the last bit."""
        version, folder = champion(self.workspace, self.settings)
        mixture = open_mixture(folder, self.workspace)
        rows = [row for _, row in pinned_rows(self.workspace, self.settings, DOMAINS)][::6]
        answers = mixture.generate([row.prompt for row in rows], max_new_tokens=8)
        losses = mixture.losses([row.messages for row in rows], [answer.domain for answer in answers])
        assert version.version in self.results
        return [(answer.answer, loss) for answer, (loss, _) in zip(answers, losses, strict=True)]

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        import contextlib
        import io

        out, err = io.StringIO(), io.StringIO()
        code = 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.chdir(self.workspace.root)
            patch.setattr(place, "directory", None)
            patch.setattr(sys, "argv", ["moa", *words])
            try:
                main.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        return code, out.getvalue(), err.getvalue()

    def json(self, *words: str) -> Any:
        code, out, err = self.run(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Six releases: a weak one that was the first, four that should not follow it, and a better one that waits."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("shop")
        root = folder / "w"
        patch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")   # `put_back` replaces MLflow's database
        patch.setenv("GIT_CEILING_DIRECTORIES", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Shop(tiny.workspace(
            root, DOMAINS, rows=120,
            train={"rank": 2, "alpha": 4.0, "epochs": 2, "batch_rows": 4, "learning_rate": 0.02, "batch_tokens": 512},
            evaluate={"generate_rows": 2, "max_new_tokens": 8}, release={"min_rows": 4, "metric_rows": 8}))
        real = release.compare

        def compare(workspace: Workspace, incumbent: int, challenger: int) -> dict[str, Any]:
            assert BETTER in made.results or challenger not in made.answers, "the same question, asked twice"
            found = real(workspace, incumbent, challenger)
            made.answers.setdefault(challenger, found)
            return found

        patch.setattr(release, "compare", compare)
        filled(made, folder / "kept")
        shutil.copytree(root, folder / "filled")
        yield made


@pytest.fixture
def put_back(shop: Shop) -> Iterator[None]:
    """Afterwards the workspace is what it was, at the same path: MLflow's database names it."""
    yield
    root = shop.workspace.root
    shutil.rmtree(root)
    shutil.copytree(root.with_name("filled"), root)


def filled(shop: Shop, kept: Path) -> Shop:
    workspace, noise = shop.workspace, torch.Generator().manual_seed(3)
    pin.fetch(workspace, shop.settings.base)
    for domain in DOMAINS:
        prepare.prepare(workspace, shop.settings, domain)
    train.train(workspace, shop.settings, DOMAINS)
    shutil.copytree(workspace.expert("alpha"), kept / "alpha")
    steps: dict[int, Callable[[], None]] = {
        WEAK: lambda: shop.expert("alpha", lambda value: value * 0.5, kept / "alpha"),
        NOISE: lambda: shop.expert("alpha", lambda value: 0.3 * torch.randn(value.shape, generator=noise),
                                   kept / "alpha"),
        SWAPPED: lambda: shop.expert("alpha", lambda value: value * 0.5, kept / "alpha"),
        STRANGER: lambda: shop.stranger(kept / "corpus"),
        EQUAL: lambda: shop.expert("alpha", lambda value: value * 0.5 + 1e-7, kept / "alpha"),
        BETTER: lambda: shop.expert("alpha", lambda value: value, kept / "alpha")}
    for version, step in steps.items():
        if version == EQUAL:   # its manifest too is that of an expert of alpha again
            shutil.rmtree(workspace.expert("alpha"))
            shutil.copytree(kept / "alpha", workspace.expert("alpha"))
        step()
        assemble(workspace, shop.settings)
        if version == SWAPPED:
            shop.swap_labels()
        if version == BETTER:
            shop.params(approval="manual")
        assert shop.release()["version"] == version
        if version in SABOTAGE:
            with pytest.raises(RegistryError) as caught:
                release.approve(workspace, shop.settings, version)
            shop.refusals[version] = str(caught.value)
    return shop


# What the gate makes of sabotage.

@pytest.mark.parametrize(("version", "named"), [(NOISE, ["alpha"]), (SWAPPED, ["alpha", "beta"]),
                                                (STRANGER, ["alpha"])])
def test_sabotage_is_refused_and_the_domain_named(shop: Shop, version: int, named: list[str]) -> None:
    result = shop.results[version]
    assert not result["decision"]["promote"] and result["champion"] == WEAK and not result["waiting"]
    failed = [domain for domain, each in result["decision"]["domains"].items() if each["verdict"] == "fail"]
    assert failed == named
    assert all(f"{domain}: " in result["decision"]["reason"] for domain in named)
    assert ("routing accuracy fell from 100.0% to 0.0%" in result["decision"]["reason"]) == (version == SWAPPED)


@pytest.mark.parametrize(("version", "domain", "because"), [
    (NOISE, "alpha", r"because its expert changed from \w{12} to \w{12}(;|\.)"),
    (SWAPPED, "alpha", r"because the router gives \d+ of its \d+ rows to (base and )?beta now(;|\.)"),
    (SWAPPED, "beta", r"because the router gives \d+ of its \d+ rows to alpha( and base)? now(;|\.)"),
    (STRANGER, "alpha", r"because its expert changed from \w{12} to \w{12} and learned from the corpus of beta(;|\.)"),
])
def test_sabotage_is_refused_for_what_it_is(shop: Shop, version: int, domain: str, because: str) -> None:
    decision = shop.results[version]["decision"]
    assert not decision["promote"] and decision["domains"][domain]["verdict"] == "fail"
    assert re.search(rf"{domain}: [^;]*worse than the tolerance[^;]*, {because}", decision["reason"])
    assert decision["domains"][domain]["cause"] in decision["reason"]
    assert re.search(because, gate_text(decision))
    blamed = [name for name, each in decision["domains"].items() if each["cause"]]
    assert blamed == (list(DOMAINS) if version == SWAPPED else ["alpha"])
    code, out, _ = shop.run("gate", str(version))
    assert code == 3 and decision["reason"] in out


@pytest.mark.parametrize("version", SABOTAGE)
def test_sabotage_is_refused_every_time(shop: Shop, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever seed the rows are drawn again, and by every door but force."""
    compared = shop.answers[version]
    for seed in range(20):
        monkeypatch.setattr(gate, "SEED", seed)
        decision = gate.decide(map(release._score, compared["rows"]), shop.settings.release, incumbent=DOMAINS,
                               challenger=DOMAINS)
        assert not decision.promote and decision.domains["alpha"].verdict == "fail"
    assert shop.results[version]["champion"] == WEAK
    reason = shop.results[version]["decision"]["reason"].rstrip(".")
    assert shop.refusals[version].startswith(f"The gate refuses version {version}: {reason}. See `moa gate {version}`")
    assert version not in [entry.version for entry in shop.registry.history()]


def test_a_comparison_names_the_prompts_that_changed_hands(shop: Shop) -> None:
    compared = shop.json("compare", str(SWAPPED), "--against", str(WEAK))
    moved = compared["changed_hands"]["rows"]
    expected = {row["row"]: row for row in compared["rows"] if row["incumbent_by"] != row["challenger_by"]}
    assert {row["row"] for row in moved} == expected.keys() and len(moved) > 10
    assert [row["rise"] for row in moved] == sorted((row["rise"] for row in moved), reverse=True)
    for row in moved:
        assert row["question"] and (row["before"], row["after"]) == (expected[row["row"]]["incumbent_by"],
                                                                     expected[row["row"]]["challenger_by"])
    # These releases recorded no rows when they were registered.
    assert shop.json("release", "diff", str(SWAPPED), "--against", str(WEAK))["changed_hands"] is None
    code, out, _ = shop.run("compare", str(EQUAL), "--against", str(WEAK))
    assert code == 0 and out.endswith("\n\nNo known prompt changed hands.\n")


def test_an_equal_release_is_not_promoted(shop: Shop) -> None:
    decision = shop.results[EQUAL]["decision"]
    assert shop.results[EQUAL]["champion"] == WEAK and not any(each["cause"] for each in decision["domains"].values())
    assert not decision["promote"] and decision["improved"] == []
    assert {each["verdict"] for each in decision["domains"].values()} == {"pass"}
    code, out, _ = shop.run("gate", str(EQUAL))
    assert code == 0 and "none is really better" in out


def test_the_gate_reports_loss_and_metric_of_every_domain(shop: Shop) -> None:
    code, out, _ = shop.run("gate", str(BETTER), "--json")
    decision = json.loads(out)
    assert code == 0 and decision["promote"] and decision["improved"] == ["alpha"] and decision["against"] == WEAK
    for each in decision["domains"].values():
        for measure in ("loss", "metric"):
            low, high = each[measure]["interval"]
            assert low <= each[measure]["point"] <= high and each[measure]["reason"]
    assert decision["domains"]["beta"]["loss"]["interval"] == [0, 0]   # the same expert: computed once
    assert decision.pop("changed_hands") is None   # these releases have recorded no evaluation
    assert shop.registry.get(BETTER).gate == decision
    text = shop.run("gate", str(NOISE))
    assert text[0] == 3 and "alpha" in text[1] and "fail" in text[1] and "routing accuracy" in text[1]


def test_a_gate_against_another_release_decides_nothing(shop: Shop) -> None:
    before = shop.registry.get(BETTER).gate
    code, out, _ = shop.run("gate", str(BETTER), "--against", str(NOISE), "--json")
    assert code == 0 and json.loads(out)["against"] == NOISE
    version = shop.registry.get(BETTER)
    assert version.gate == before and not [tag for tag in version.tags if tag.startswith(f"{GATE}.")]
    code, out, _ = shop.run("gate", str(NOISE), "--against", str(NOISE))
    assert code == 0 and "the same release" in out
    assert shop.json("release", "list")["releases"][0]["state"] == "waiting"


# The commands.

def test_what_waits_is_said_and_listed(shop: Shop) -> None:
    result = shop.results[BETTER]
    assert result["waiting"] and result["champion"] == WEAK
    write_json(shop.workspace.reports / "summary.json", {
        "domains": {domain: {"base": {"loss": 1.0, "perplexity": 2.7, "score": 0.0}} for domain in DOMAINS},
        "routing": {"accuracy": 1.0, "abstention": 0.0}})
    said = run_summary(shop.workspace, shop.settings, result)
    assert f"`moa release promote {BETTER}` makes it champion" in said and f"champion is version {WEAK}" in said
    listed = shop.json("release", "list")
    assert [each["version"] for each in listed["releases"]] == [6, 5, 4, 3, 2, 1]
    assert [each["state"] for each in listed["releases"]] == [
        "waiting", "no better", *["refused"] * 3, "champion"]
    assert "waiting" in shop.run("release", "list")[1]


@pytest.mark.parametrize(("words", "code", "sentence"), [
    (["promote", str(NOISE)], 1, f"The gate refuses version {NOISE}: alpha: "),
    (["promote", str(EQUAL)], 1, "none is really better"),
    (["promote", str(NOISE), "--force"], 2, "--force needs --reason TEXT"),
    (["promote", str(NOISE), "--force", "--reason", " "], 2, "--force needs --reason TEXT"),
    (["promote", "9", "--force", "--reason", "x"], 1, "has no version 9; its versions: 1, 2, 3, 4, 5, 6"),
    (["rollback"], 1, "No other champion came before"),
    (["rollback", "--to", str(BETTER)], 1, f"Version {BETTER} was never champion"),
    (["rollback", "--to", str(WEAK)], 1, f"Version {WEAK} is champion already"),
    (["show", "9"], 1, "has no version 9"),
    (["diff", "9", "--against", "1"], 1, "has no version 9"),
])
def test_what_is_not_allowed_is_one_sentence_and_moves_nothing(shop: Shop, words: list[str], code: int,
                                                               sentence: str) -> None:
    before = shop.registry.history()
    ended, out, err = shop.run("release", *words)
    assert (ended, out) == (code, "") and sentence in err and err.startswith("moa: ") and err.count("\n") == 1
    assert shop.registry.history() == before and shop.registry.get("champion").version == WEAK


def test_a_gate_against_yesterdays_champion_is_not_enough(shop: Shop) -> None:
    with pytest.raises(RegistryError, match="Version 1 became champion meanwhile"):
        shop.registry.set_champion(BETTER, "better than 2", "ann", instead_of=NOISE)
    assert shop.registry.get("champion").version == WEAK and len(shop.registry.history()) == 1


def test_show_and_diff(shop: Shop) -> None:
    facts = shop.json("release", "show", str(BETTER))
    assert facts["state"] == "waiting" and set(facts["experts"]) == set(DOMAINS) and facts["gate"]["promote"]
    assert facts["corpora"]["alpha"]["moa.digest"] == read_json(shop.workspace.corpus("alpha") / MANIFEST)["digest"]
    changed = shop.json("release", "diff", str(BETTER), "--against", str(WEAK))
    assert changed["experts"]["beta"]["change"] == "same" and changed["experts"]["alpha"]["change"] == "changed"
    assert changed["experts"]["alpha"]["old"]["version"] == 1 and changed["experts"]["alpha"]["new"]["version"] == 5
    assert changed["base"]["change"] == "same" and changed["gate"]["new"]["promote"]
    swapped = shop.json("release", "diff", str(SWAPPED), "--against", str(WEAK))
    assert swapped["router"]["change"] == "changed"
    assert swapped["parameters"]["labels"] == {"old": "alpha,beta", "new": "beta,alpha"}
    text = shop.run("release", "diff", str(BETTER), "--against", str(WEAK))[1]
    assert "alpha   changed" in text and "beta    same" in text
    assert "waiting" in shop.run("release", "show", str(BETTER))[1]


@pytest.mark.usefixtures("put_back")
def test_an_approval_a_rollback_and_the_old_answers(shop: Shop) -> None:
    old = shop.golden()
    assert shop.json("release", "promote", str(BETTER), "--reason", "looks good")["changed"]
    new = shop.golden()
    assert [loss for _, loss in new] != [loss for _, loss in old]
    assert not shop.json("release", "promote", str(BETTER))["changed"]
    code, out, _ = shop.run("release", "rollback", "--reason", "users complain")
    assert code == 0
    assert out == ("version 1 is champion instead of version 6 (rollback from version 6: users complain).\n")
    assert shop.golden() == old   # to the last bit
    assert shop.run("release", "rollback")[0] == 1   # 6 was left behind: nothing came before 1
    assert shop.json("release", "rollback", "--to", str(BETTER))["version"] == BETTER
    assert shop.golden() == new
    assert shop.json("release", "rollback")["version"] == WEAK


@pytest.mark.usefixtures("put_back")
def test_a_forced_release_says_so_for_ever(shop: Shop) -> None:
    before = shop.json("release", "history")["history"]
    done = shop.json("release", "promote", str(NOISE), "--force", "--reason", "a drill")
    assert done["reason"] == "forced: a drill" and shop.registry.get("champion").version == NOISE
    shop.registry.client.delete_registered_model_alias(shop.settings.release.name, "champion")
    entries = shop.json("release", "history")["history"]
    assert entries[:-1] == before and [entry["version"] for entry in entries] == [WEAK, NOISE]
    assert "forced: a drill" in shop.run("release", "history")[1]
    assert shop.json("release", "list")["champion"] is None
    assert shop.json("release", "rollback")["version"] == WEAK   # without the alias too
    assert len(shop.json("release", "history")["history"]) == len(entries) + 1


@pytest.mark.usefixtures("put_back")
def test_a_release_whose_files_are_gone_never_becomes_champion(shop: Shop) -> None:
    shop.json("release", "promote", str(BETTER))   # so that a rollback to it is possible
    shop.json("release", "rollback")
    version = shop.registry.get(BETTER)
    shop.registry.download(version)   # what this machine keeps is no proof
    stored, = [path for path in (shop.workspace.mlflow / "artifacts").rglob("mixture/experts/alpha/*.safetensors")
               if digests.of_file(path) == json.loads(version.tags["moa.files"])["experts/alpha/" + WEIGHTS]]
    stored.unlink()
    before = shop.registry.history()
    for words in (["promote", str(BETTER), "--force", "--reason", "x"], ["rollback", "--to", str(BETTER)]):
        code, _, err = shop.run("release", *words)
        assert code == 1 and "is not what was registered: experts/alpha/adapter_model.safetensors differs" in err
    with pytest.raises(ArtifactError):
        shop.registry.set_champion(BETTER, "by the library", "ann")
    assert shop.registry.history() == before and shop.registry.get("champion").version == WEAK


def test_before_anything_was_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty = Shop(tiny.workspace(tmp_path / "empty", DOMAINS, rows=1))
    for words in (["list"], ["history"]):
        assert empty.run("release", *words) == (0, f"{NOTHING_RELEASED}\n", "")
    assert empty.run("ask", "What is 2?") == (NothingReleased.exit_code, "", f"moa: {NOTHING_RELEASED}\n")
    assert not empty.workspace.mlflow.exists()
    with pytest.raises(MoaError, match="has no version 1; its versions: none yet"):
        release.approve(empty.workspace, empty.settings, 1)

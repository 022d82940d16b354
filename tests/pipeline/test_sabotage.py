"""Sabotage through the whole release flow, every step real: what is registered is downloaded again, answers in a
process of its own (`moa compare`), and is judged. The verdict must name the domain and what went wrong with it."""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_release_commands import Shop

from flows import release
from moa import base, corpus, experts, gate
from moa.assemble import assemble
from moa.errors import RegistryError
from moa.releases import gate_text
from moa.workspace import MANIFEST, read_json

DOMAINS = ("alpha", "beta")
WEAK, NOISE, SWAPPED, STRANGER, EQUAL, BETTER = range(1, 7)   # the versions
SABOTAGE = (NOISE, SWAPPED, STRANGER)


class Bench(Shop):
    """A shop that keeps what the releases answered."""

    answers: dict[int, dict[str, Any]]
    refusals: dict[int, str]

    def stranger(self, kept: Path) -> None:
        """The expert of alpha, trained on the corpus of beta."""
        own, other = (self.workspace.corpus(domain) for domain in DOMAINS)
        own.rename(kept)
        shutil.copytree(other, own)
        experts.train(self.workspace, self.settings, ["alpha"])
        shutil.rmtree(own)
        kept.rename(own)
        learned = read_json(self.workspace.expert("alpha") / MANIFEST)["corpus"]
        assert learned == read_json(other / MANIFEST)["digest"] != read_json(own / MANIFEST)["digest"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A weak champion, five releases after it; the last one is better and became champion."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("bench")
        patch.setenv("GIT_CEILING_DIRECTORIES", str(root))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Bench(tiny.workspace(
            root, DOMAINS, rows=120,
            train={"rank": 2, "alpha": 4.0, "epochs": 2, "batch_rows": 4, "learning_rate": 0.02, "batch_tokens": 512},
            evaluate={"generate_rows": 2, "max_new_tokens": 8}, release={"min_rows": 4, "metric_rows": 8}))
        made.answers, made.refusals, real = {}, {}, release.compare

        def compare(workspace: Any, incumbent: int, challenger: int) -> dict[str, Any]:
            assert challenger not in made.answers, "the same question, asked twice"
            made.answers[challenger] = real(workspace, incumbent, challenger)
            return made.answers[challenger]

        patch.setattr(release, "compare", compare)
        yield filled(made, root / "kept")


def filled(bench: Bench, kept: Path) -> Bench:
    workspace, noise = bench.workspace, torch.Generator().manual_seed(3)
    base.fetch(workspace, bench.settings.base)
    for domain in DOMAINS:
        corpus.prepare(workspace, bench.settings, domain)
    experts.train(workspace, bench.settings, DOMAINS)
    shutil.copytree(workspace.expert("alpha"), kept / "alpha")
    steps: dict[int, Callable[[], None]] = {
        WEAK: lambda: bench.expert("alpha", lambda value: value * 0.5, kept / "alpha"),
        NOISE: lambda: bench.expert("alpha", lambda value: 0.3 * torch.randn(value.shape, generator=noise),
                                    kept / "alpha"),
        SWAPPED: lambda: bench.expert("alpha", lambda value: value * 0.5, kept / "alpha"),
        STRANGER: lambda: bench.stranger(kept / "corpus"),
        EQUAL: lambda: bench.expert("alpha", lambda value: value * 0.5 + 1e-7, kept / "alpha"),
        BETTER: lambda: bench.expert("alpha", lambda value: value, kept / "alpha")}
    for version, step in steps.items():
        if version == EQUAL:   # its manifest too is that of an expert of alpha again
            shutil.rmtree(workspace.expert("alpha"))
            shutil.copytree(kept / "alpha", workspace.expert("alpha"))
        step()
        assemble(workspace, bench.settings)
        if version == SWAPPED:
            bench.swap_labels()
        assert bench.release()["version"] == version
        if version in SABOTAGE:
            with pytest.raises(RegistryError) as caught:
                release.approve(workspace, bench.settings, version)
            bench.refusals[version] = str(caught.value)
    return bench


@pytest.mark.parametrize(("version", "domain", "because"), [
    (NOISE, "alpha", r"because its expert changed from \w{12} to \w{12}(;|\.)"),
    (SWAPPED, "alpha", r"because the router gives \d+ of its \d+ rows to (base and )?beta now(;|\.)"),
    (SWAPPED, "beta", r"because the router gives \d+ of its \d+ rows to alpha( and base)? now(;|\.)"),
    (STRANGER, "alpha", r"because its expert changed from \w{12} to \w{12} and learned from the corpus of beta(;|\.)"),
])
def test_sabotage_is_refused_for_what_it_is(bench: Bench, version: int, domain: str, because: str) -> None:
    decision = bench.results[version]["decision"]
    assert not decision["promote"] and decision["domains"][domain]["verdict"] == "fail"
    assert re.search(rf"{domain}: [^;]*worse than the tolerance[^;]*, {because}", decision["reason"])
    assert decision["domains"][domain]["cause"] in decision["reason"]
    assert re.search(because, gate_text(decision))
    blamed = [name for name, each in decision["domains"].items() if each["cause"]]
    assert blamed == (list(DOMAINS) if version == SWAPPED else ["alpha"])


@pytest.mark.parametrize("version", SABOTAGE)
def test_sabotage_is_refused_every_time(bench: Bench, version: int) -> None:
    """By whatever seed the rows are drawn again, and by every door but force."""
    compared, rules = bench.answers[version], release._rules(bench.settings)
    for seed in range(20):
        decision = gate.decide(map(release._score, compared["rows"]), replace(rules, seed=seed), incumbent=DOMAINS,
                               challenger=DOMAINS, routing=compared["routing"])
        assert not decision.promote and decision.domains["alpha"].verdict == "fail"
    assert bench.results[version]["champion"] == WEAK
    reason = bench.results[version]["decision"]["reason"].rstrip(".")
    assert bench.refusals[version].startswith(f"The gate refuses version {version}: {reason}. See `moa gate {version}`")
    assert version not in [entry.version for entry in bench.registry.history()]


def test_an_equal_release_is_not_promoted_and_a_better_one_is(bench: Bench) -> None:
    equal, better = bench.results[EQUAL], bench.results[BETTER]
    assert equal["champion"] == WEAK and not equal["decision"]["promote"] and not equal["decision"]["improved"]
    assert {each["verdict"] for each in equal["decision"]["domains"].values()} == {"pass"}
    assert not any(each["cause"] for each in equal["decision"]["domains"].values())
    assert better["champion"] == BETTER and better["decision"]["improved"] == ["alpha"]
    assert [entry.version for entry in bench.registry.history()] == [WEAK, BETTER]
    assert "better: alpha" in bench.registry.history()[-1].reason

"""From built artifacts to a champion that answers, with a real MLflow database and the tiny base; each step is real."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.artifacts import build_page
from flows.steps import release
from flows.steps.session import Result
from moa.base import pin
from moa.core import config, digests
from moa.core.config import Config
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import prepare
from moa.evaluation.evaluate import evaluate
from moa.experts import train
from moa.experts.peft_format import CONFIG, WEIGHTS
from moa.mixture.assemble import assemble
from moa.release.registry import Registry
from moa.reports import changed_hands
from moa.reports.text import run_summary
from tests import tiny

DOMAINS = ("alpha", "beta")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Config, dict[str, Any]]:
    """A first release of two toy domains."""
    workspace = tiny.workspace(
        tmp_path_factory.mktemp("released"), DOMAINS, rows=150,
        train={"rank": 2, "alpha": 4.0, "epochs": 2, "batch_rows": 4, "learning_rate": 0.02, "batch_tokens": 512},
        evaluate={"generate_rows": 2, "max_new_tokens": 8}, release={"min_rows": 4})
    settings = config.load(workspace.params)
    pin.fetch(workspace, settings.base)
    for domain in DOMAINS:
        prepare.prepare(workspace, settings, domain)
    train.train(workspace, settings, DOMAINS)
    return workspace, settings, rebuild(workspace, settings)


def rebuild(workspace: Workspace, settings: Config) -> dict[str, Any]:
    assemble(workspace, settings)
    evaluate(workspace, settings)
    return release.release(workspace, settings)


def moa(workspace: Workspace, *words: str) -> Any:
    """What a command prints as JSON."""
    done = subprocess.run([sys.executable, "-m", "moa", *words, "--json"], cwd=workspace.root, capture_output=True,
                          text=True, check=False, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(workspace.root)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def change_expert(workspace: Workspace, domain: str, scale: float) -> None:
    """Another expert under a right manifest, as somebody's careless training would leave it."""
    from safetensors.torch import load_file, save_file

    folder = workspace.expert(domain)
    noise = torch.Generator().manual_seed(3)
    tensors = {name: value + scale * torch.randn(value.shape, generator=noise)
               for name, value in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = read_json(folder / MANIFEST)
    manifest["digest"] = digests.of_files([folder / CONFIG, folder / WEIGHTS], folder)
    write_json(folder / MANIFEST, manifest)


@pytest.fixture
def put_back(released: tuple[Workspace, Config, dict[str, Any]], tmp_path: Path) -> Iterator[Path]:
    """A copy of what the first release was made of, which is there again afterwards."""
    data, kept = released[0].data, tmp_path / "data"
    shutil.copytree(data, kept)
    yield kept
    shutil.rmtree(data)
    shutil.copytree(kept, data)


def test_the_first_release_becomes_champion(released: tuple[Workspace, Config, dict[str, Any]]) -> None:
    workspace, settings, result = released
    assert result["champion"] == result["version"] == 1
    assert result["experts"] == dict.fromkeys(DOMAINS, 1)
    again = release.release(workspace, settings)
    assert (again["version"], again["created"], again["champion"]) == (1, False, 1)


def test_the_champion_answers(released: tuple[Workspace, Config, dict[str, Any]]) -> None:
    workspace = released[0]
    reply = moa(workspace, "ask", tiny.row("alpha", 7)["instruction"], "--max-new-tokens", "4")
    assert set(reply) == {"answer", "domain", "confidence", "abstained", "similarity", "threshold", "finish", "tokens",
                          "prompt_tokens", "answered_by", "release"}
    assert (reply["domain"], reply["release"]) == ("alpha", 1)
    assert moa(workspace, "ask", "anything", "--domain", "beta", "--max-new-tokens", "4")["answered_by"] == "beta"
    table = moa(workspace, "eval")
    assert table["release"] == 1
    assert set(table["domains"]) == set(DOMAINS)
    for systems in table["domains"].values():
        assert set(systems) == {"base", "routed", "forced"}
        assert all(set(figures) == {"loss", "perplexity", "score"} for figures in systems.values())
    assert set(table["routing"]) == {"accuracy", "abstention", "ece", "by_domain", "promises", "reliability"}
    assert set(table["routing"]["by_domain"]) == set(table["routing"]["promises"]) == set(DOMAINS)
    again = moa(workspace, "eval", "--rerun")
    assert again["domains"]["alpha"]["forced"]["loss"] == pytest.approx(table["domains"]["alpha"]["forced"]["loss"])


def test_mlflow_serves_chat_bodies(released: tuple[Workspace, Config, dict[str, Any]],
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    workspace, settings, _ = released
    address = Registry(workspace, settings).address
    monkeypatch.setenv("MOA_WORKSPACE", str(workspace.root))
    mlflow.set_tracking_uri(address)
    mlflow.set_registry_uri(address)
    model = mlflow.pyfunc.load_model(f"models:/{settings.release.name}@champion")
    reply = model.predict({"messages": [{"role": "user", "content": tiny.row("beta", 3)["instruction"]}],
                           "max_tokens": 4})
    assert reply["choices"][0]["message"]["role"] == "assistant"
    assert reply["moa"]["domain"] == "beta"


def test_a_spoilt_expert_is_refused_by_name_and_what_is_equal_is_not_promoted(
        released: tuple[Workspace, Config, dict[str, Any]], put_back: Path) -> None:
    workspace, settings, _ = released
    change_expert(workspace, "alpha", 0.3)
    result = rebuild(workspace, settings)
    assert (result["version"], result["champion"]) == (2, 1)
    assert not result["decision"]["promote"]
    assert result["decision"]["domains"]["alpha"]["verdict"] == "fail"
    assert result["decision"]["domains"]["beta"]["verdict"] == "pass"
    moved = changed_hands.of_releases(workspace, settings, 1, 2)   # the router is the same
    assert moved == {"before": "version 1", "now": "version 2", "rows": []}
    assert "\nNo known prompt changed hands.\n" in run_summary(workspace, settings, result)
    assert "\nNo known prompt changed hands.\n" in build_page(workspace, settings, Result(release=result))
    assert moa(workspace, "release", "diff", "2", "--against", "1")["changed_hands"] == moved
    compared = moa(workspace, "compare", "2", "--against", "1")
    beta = [row for row in compared["rows"] if row["domain"] == "beta"]
    assert beta
    assert all(row["incumbent_loss"] == row["challenger_loss"] for row in beta)

    shutil.rmtree(workspace.expert("alpha"))
    shutil.copytree(put_back / "experts" / "alpha", workspace.expert("alpha"))
    change_expert(workspace, "alpha", 1e-6)   # other bytes, the same answers
    result = rebuild(workspace, settings)
    assert (result["version"], result["champion"], result["decision"]["promote"]) == (3, 1, False)

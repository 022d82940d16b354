"""data/champion: what a calibration extends, and when it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moa.core.config import Config, load
from moa.core.errors import ArtifactError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.mixture import incumbent
from moa.mixture.calibration import Prompts, fit
from tests import tiny

PIN: Any = SimpleNamespace(weights="w", tokenizer="t", template="c")
EXPERTS = {"alpha": ("a" * 64, "1" * 64), "beta": ("b" * 64, "2" * 64)}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace whose experts are those of a mixture in data/mixture that is not champion yet."""
    made = tiny.workspace(tmp_path)
    config = load(made.params)
    for domain, (digest, corpus) in EXPERTS.items():
        write_json(made.expert(domain) / MANIFEST, {"digest": digest, "corpus": corpus})
    mixture(made, config, "m1", None)
    return made


def mixture(workspace: Workspace, config: Config, digest: str, extends: str | None, **facts: Any) -> None:
    features, targets = torch.randn(12, 2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    prompts = Prompts(features, targets, [str(number) for number in range(12)])
    router = fit(list(EXPERTS), prompts, prompts)
    router.figures |= {"extends": extends, "settings": incumbent.settings(config.assemble)}
    workspace.mixture.mkdir(parents=True, exist_ok=True)
    save_file(router.tensors(), workspace.mixture / "router.safetensors")
    write_json(workspace.mixture / MANIFEST, {
        "digest": digest, "labels": list(EXPERTS), "prompt": config.prompt.model_dump(),
        "base": {"weights": "w", "tokenizer": "t", "template": "c"},
        "experts": {domain: {"digest": own, "corpus": corpus} for domain, (own, corpus) in EXPERTS.items()},
        "router": router.facts()} | facts)


def extends(workspace: Workspace) -> str | None:
    incumbent.write_extended(workspace, load(workspace.params))
    return incumbent.extended(workspace)


def edited(workspace: Workspace, before: str, after: str) -> None:
    text = workspace.params.read_text()
    assert before in text
    workspace.params.write_text(text.replace(before, after))


def test_what_the_champion_is_made_of_extends_what_the_champion_extended(workspace: Workspace) -> None:
    assert extends(workspace) is None                       # no champion
    assert incumbent.write(workspace, workspace.mixture)
    assert not incumbent.write(workspace, workspace.mixture)
    assert extends(workspace) is None                       # the champion's own inputs: nothing is stale
    write_json(workspace.expert("beta") / MANIFEST, {"digest": "c" * 64, "corpus": "3" * 64})
    assert extends(workspace) == "m1"                       # other inputs: a successor
    mixture(workspace, load(workspace.params), "m2", "m1", experts={
        "alpha": {"digest": "a" * 64, "corpus": "1" * 64}, "beta": {"digest": "c" * 64, "corpus": "3" * 64}})
    assert extends(workspace) == "m1"                       # built and not promoted, or refused
    incumbent.write(workspace, workspace.mixture)
    assert extends(workspace) == "m1"                       # promoted: still fresh


def test_a_domain_more_or_another_bound_extends_the_champion(workspace: Workspace) -> None:
    incumbent.write(workspace, workspace.mixture)
    edited(workspace, "assemble: {}", "assemble: {max_abstention: 0.05}")
    assert extends(workspace) == "m1"
    assert incumbent.calibration(workspace, load(workspace.params), PIN)[0] is not None
    edited(workspace, "{max_abstention: 0.05}", "{}")
    assert extends(workspace) is None
    edited(workspace, "  beta:", "  gamma: {metric: rouge_l}\n  beta:")
    assert extends(workspace) == "m1"


def test_recalibration_is_asked_for_and_stays_after_its_promotion(workspace: Workspace) -> None:
    incumbent.write(workspace, workspace.mixture)
    incumbent.recalibrate(workspace, True)
    assert extends(workspace) == incumbent.AFRESH
    config = load(workspace.params)
    assert incumbent.calibration(workspace, config, PIN) == (None, "")
    mixture(workspace, config, "m2", incumbent.AFRESH)
    incumbent.recalibrate(workspace, False)
    assert extends(workspace) is None                       # refused: back to what it was
    incumbent.write(workspace, workspace.mixture)
    assert extends(workspace) == incumbent.AFRESH           # promoted: fresh


@pytest.mark.parametrize(("params", "pin", "why"), [
    ({"assemble: {}": "assemble: {rows: 12}"}, {}, "assemble.rows is now 12"),
    ({"assemble: {}": "assemble: {rule: vote}"}, {}, 'assemble.rule is now "vote"'),
    ({"assemble: {}": "assemble: {joint_epochs: 1}"}, {}, "assemble.joint_epochs is now 1"),
    ({"max_tokens: 256": "max_tokens: 200"}, {}, "the prompt's parameters changed"),
    ({}, {"weights": "other"}, "the base is another one")])
def test_why_a_calibration_cannot_be_extended(workspace: Workspace, params: dict[str, str], pin: dict[str, str],
                                              why: str) -> None:
    incumbent.write(workspace, workspace.mixture)
    write_json(workspace.expert("beta") / MANIFEST, {"digest": "c" * 64, "corpus": "3" * 64})
    for before, after in params.items():
        edited(workspace, before, after)
    assert extends(workspace) == "m1"
    changed: Any = SimpleNamespace(**vars(PIN) | pin)
    assert incumbent.calibration(workspace, load(workspace.params), changed) == (None, why)


def test_a_damaged_calibration_is_named(workspace: Workspace) -> None:
    incumbent.write(workspace, workspace.mixture)
    write_json(workspace.expert("beta") / MANIFEST, {"digest": "c" * 64, "corpus": "3" * 64})
    extends(workspace)
    found, why = incumbent.calibration(workspace, load(workspace.params), PIN)
    assert found is not None and found.labels == ["alpha", "beta"] and not why
    (workspace.champion / "router.safetensors").write_bytes(b"?")
    with pytest.raises(ArtifactError, match="champion's calibration in data/champion cannot be read"):
        incumbent.calibration(workspace, load(workspace.params), PIN)
    (workspace.champion / MANIFEST).write_text("{")
    assert extends(workspace) is None


def test_the_rows_of_the_evaluation_come_along(workspace: Workspace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert incumbent.rows(workspace) == []
    workspace.reports.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"domain": "alpha", "row": "1", "loss": 0.5}]),
                   workspace.reports / "rows.parquet")
    incumbent.write(workspace, workspace.mixture)
    assert incumbent.rows(workspace) == [{"domain": "alpha", "row": "1", "loss": 0.5}]
    assert read_json(workspace.champion / MANIFEST)["digest"] == "m1"

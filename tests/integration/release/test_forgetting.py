"""`moa release forgetting` on real releases of a tiny base: unchanged experts answer as they did, or it says so."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.steps import release
from moa.base import pin
from moa.cli import main
from moa.cli.app import place
from moa.core import config, digests
from moa.core.config import Config, PromptParams
from moa.core.errors import PipelineError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import NOTHING_RELEASED
from moa.data import prepare
from moa.evaluation.evaluate import evaluate
from moa.experts import train
from moa.experts.peft_format import CONFIG, WEIGHTS
from moa.mixture.assemble import assemble
from moa.release.registry import Registry
from tests import tiny

DOMAINS = ("alpha", "beta")
FIRST, NOISE, PROMPT = 1, 2, 3   # the versions
GOLDEN = 3


def rebuilt(workspace: Workspace, settings: Config, reason: str) -> int:
    """Assembled, evaluated, registered, and champion whatever the gate thinks of it."""
    assemble(workspace, settings)
    evaluate(workspace, settings)
    version = release.register_mixture(workspace, settings, release.register_experts(workspace, settings)).version
    release.promote(workspace, settings, version, reason)
    return version


def spoil(workspace: Workspace, domain: str) -> None:
    """Another expert, under a manifest that is right."""
    from safetensors.torch import load_file, save_file

    folder = workspace.expert(domain)
    noise = torch.Generator().manual_seed(3)
    save_file({name: 0.3 * torch.randn(value.shape, generator=noise) for name, value in
               load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = read_json(folder / MANIFEST)
    manifest["digest"] = digests.of_files([folder / CONFIG, folder / WEIGHTS], folder)
    write_json(folder / MANIFEST, manifest)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three champions: the second with another expert of beta, the third with the same experts under another prompt."""
    made = tiny.workspace(tmp_path_factory.mktemp("kept"), DOMAINS, rows=60, adapt={"golden": GOLDEN},
                          evaluate={"generate_rows": 4, "max_new_tokens": 8})
    settings = config.load(made.params)
    pin.fetch(made, settings.base)
    for domain in DOMAINS:
        prepare.prepare(made, settings, domain)
    train.train(made, settings, DOMAINS)
    assert rebuilt(made, settings, "first") == FIRST
    spoil(made, "beta")
    assert rebuilt(made, settings, "a drill") == NOISE
    other = settings.model_copy(update={"prompt": PromptParams(system="Answer in Latin.", max_tokens=256)})
    assert rebuilt(made, other, "somebody's mistake") == PROMPT
    return made


def moa(workspace: Workspace, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `moa release forgetting`."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(workspace.root)
        patch.setattr(place, "directory", None)
        patch.setattr(sys, "argv", ["moa", "release", "forgetting", *words])
        try:
            main.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


def test_what_did_not_change_answers_as_it_did(workspace: Workspace) -> None:
    found = release.forgetting(workspace, FIRST, NOISE)   # a process of its own, as a flow asks
    assert (found["old"], found["new"], found["equal"]) == (FIRST, NOISE, True)
    assert {domain: each["change"] for domain, each in found["experts"].items()} == {"alpha": "same", "beta": "changed"}
    assert found["golden"] == {"alpha": {"prompts": GOLDEN, "equal": True, "differing": []}}
    registry = Registry(workspace, config.load(workspace.params))
    assert [(each["version"], each["champion"]) for each in found["table"]] == [(1, True), (2, True), (3, True)]
    for each in found["table"]:
        summary = read_json(registry.download(each["version"]).parent / "reports" / "summary.json")["domains"]
        for domain in DOMAINS:
            for system in ("forced", "routed"):
                assert each["domains"][domain][system] == {
                    measure: pytest.approx(summary[domain][system][measure]) for measure in ("loss", "score")}
            assert each["domains"][domain]["rows"] == summary[domain]["forced"]["rows"] > 0
    first, noise = found["table"][0]["domains"], found["table"][1]["domains"]
    assert first["alpha"]["forced"] == noise["alpha"]["forced"] and first["beta"]["forced"] != noise["beta"]["forced"]
    for domain, each in found["routing"].items():
        assert each["rows"] == first[domain]["rows"] == sum(each["before"].values()) == sum(each["after"].values())


def test_the_command_shows_it(workspace: Workspace) -> None:
    code, out, err = moa(workspace, str(NOISE), "--against", str(FIRST))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"version {FIRST} -> version {NOISE}"
    assert any(line.startswith("alpha   same ") and line.endswith(f"{GOLDEN} of {GOLDEN} equal") for line in lines)
    assert any(line.startswith("beta    changed ") and line.endswith("-") for line in lines)
    assert any("its own expert" in line and line.startswith("beta ") for line in lines)
    assert any(line.startswith("alpha ") and "from " in line and " to " in line for line in lines)


def test_an_unchanged_expert_that_answers_otherwise_is_an_error(workspace: Workspace) -> None:
    code, out, err = moa(workspace, "--json")   # by default the champion, and the one before it
    found: dict[str, Any] = json.loads(out)
    assert code == 1 and (found["old"], found["new"]) == (NOISE, PROMPT)
    assert {each["change"] for each in found["experts"].values()} == {"same"} and not found["equal"]
    wrong = [domain for domain, each in found["golden"].items() if not each["equal"]]
    assert wrong and all(found["golden"][domain]["differing"] for domain in wrong)
    assert err.startswith("moa: Between versions 2 and 3 an expert that is the same bytes answers otherwise: ")
    assert err.count("\n") == 1 and all(domain in err for domain in wrong)
    assert release.forgetting(workspace, NOISE, PROMPT) == found   # for a flow to judge


@pytest.mark.parametrize(("words", "code", "sentence"), [
    (["2", "--against", "2"], 2, "Version 2 cannot be compared with itself"),
    (["--against", "9"], 1, "has no version 9; its versions: 1, 2, 3"),
    (["9"], 1, "has no version 9; its versions: 1, 2, 3")])
def test_what_cannot_be_compared_is_one_sentence(workspace: Workspace, words: list[str], code: int,
                                                 sentence: str) -> None:
    ended, out, err = moa(workspace, *words)
    assert (ended, out) == (code, "") and sentence in err and err.startswith("moa: ") and err.count("\n") == 1


def test_a_flow_gets_the_commands_own_words(workspace: Workspace) -> None:
    with pytest.raises(PipelineError, match=r"version 9 forgot of version 1 .* has no version 9"):
        release.forgetting(workspace, 1, 9)


def test_before_there_is_anything_to_forget(tmp_path: Path) -> None:
    empty = tiny.workspace(tmp_path / "empty", DOMAINS, rows=1)
    assert moa(empty) == (1, "", f"moa: {NOTHING_RELEASED}\n")
    assert not empty.mlflow.exists()

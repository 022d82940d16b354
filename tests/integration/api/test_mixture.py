"""A released mixture asked, explained, scored and saved from Python: real MLflow, a toy base."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moa
from moa.core.config import load
from moa.core.paths import Workspace
from moa.core.project import Names
from moa.release.export import export

QUESTION = "alpha: what is alpha 3 of 832?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def mixture(released: Workspace) -> moa.Mixture:
    return moa.load(released.root, device="cpu")


def test_one_prompt_gives_a_completion(mixture: moa.Mixture) -> None:
    out = mixture.generate(QUESTION, max_new_tokens=5)
    assert isinstance(out.text, str) and out.finish_reason == "length"
    assert out.usage.completion_tokens == 5 and out.usage.total_tokens == out.usage.prompt_tokens + 5
    assert out.routing.domain in mixture.domains and 0 < (out.routing.confidence or 0) <= 1
    assert out.answered_by == out.routing.expert
    assert out.routing == mixture.route(QUESTION) and -1 <= (out.routing.similarity or -2) <= 1.0001
    assert mixture.generate(MESSAGES, max_new_tokens=5) == out == mixture.generate(tuple(MESSAGES), max_new_tokens=5)


def test_a_list_gives_a_table_in_its_order(mixture: moa.Mixture) -> None:
    outs = mixture.generate([QUESTION, MESSAGES, "beta?"], domain=["alpha", None, "base"], max_new_tokens=3)
    assert [outs[0].answered_by, outs[2].answered_by] == ["alpha", "base"]
    assert outs[0].routing == moa.Routing("alpha") and outs[1] == mixture.generate(QUESTION, max_new_tokens=3)
    table = outs.to_frame()
    assert table["routing.domain"][0] == "alpha" and len(table) == 3
    assert "alpha" in outs._repr_html_() and len(outs[1:].to_frame()) == 2
    assert mixture.generate([]) == () and mixture.route([]) == ()
    assert {out.answered_by for out in mixture.generate(["a", "b"], domain="beta", max_new_tokens=1)} == {"beta"}


def test_an_answer_of_the_base_has_no_confidence_but_what_was_found(mixture: moa.Mixture,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture._mixture.router, "threshold_C", torch.full((2,), 2.0))   # no cosine reaches it
    out = mixture.generate(QUESTION, max_new_tokens=2)
    assert out.answered_by == "base" and out.routing == mixture.route(QUESTION) == mixture.explain(QUESTION).routing
    assert out.routing.abstained and out.routing.confidence is None and "confidence" not in repr(out)
    assert out.routing.domain in mixture.domains and out.routing.threshold == 2.0
    assert -1 <= (out.routing.similarity or -2) <= 1.0001 and "confidence=None" in repr(mixture.explain(QUESTION))


def test_a_stream_is_the_answer_in_pieces(mixture: moa.Mixture) -> None:
    for domain in ("alpha", None):
        pieces = list(mixture.stream(MESSAGES, domain=domain, max_new_tokens=6))
        assert "".join(pieces).strip() == mixture.generate(QUESTION, domain=domain, max_new_tokens=6).text


@pytest.mark.parametrize("prompt", [[{"content": "no role"}], [3], 3.5])
def test_what_is_no_prompt_is_refused(mixture: moa.Mixture, prompt: object) -> None:
    with pytest.raises((moa.errors.UsageError, TypeError)):
        mixture.generate(prompt)   # type: ignore[call-overload]


def test_a_wrong_domain_or_option_is_refused_at_the_call(mixture: moa.Mixture) -> None:
    for call in (mixture.generate, mixture.stream):
        with pytest.raises(moa.errors.UsageError, match="no expert 'gamma'"):
            call(QUESTION, domain="gamma")   # type: ignore[operator]
        with pytest.raises(ValueError, match="temperature"):
            call(QUESTION, temperature=-1)   # type: ignore[operator]
    with pytest.raises(moa.errors.UsageError, match="2 prompts and 1 domains"):
        mixture.generate([QUESTION, QUESTION], domain=["alpha"])


def test_routing_is_explained_level_by_level(mixture: moa.Mixture) -> None:
    one, many = mixture.route(QUESTION), mixture.route([QUESTION, MESSAGES])
    assert list(many.to_frame()["domain"]) == [one.domain] * 2
    assert [each.similarity for each in many] == [pytest.approx(one.similarity)] * 2   # a batch of two rounds otherwise
    why = mixture.explain(QUESTION)
    assert why.routing == one and [level.level for level in why.levels] == [0, 1]
    assert any(level.read for level in why.levels)
    assert len(why.to_frame()) == 2 and why.rule in repr(why) and "probability" in why._repr_html_()


def test_scores_are_losses_of_answers(mixture: moa.Mixture) -> None:
    chat = [*MESSAGES, {"role": "assistant", "content": "alpha says 4"}]
    own, base = mixture.score([chat, chat], domain=["alpha", "base"])
    assert own.tokens == base.tokens > 0 and own.loss != base.loss and own.perplexity > 1
    routed, = mixture.score([chat])
    assert routed.answered_by == mixture.route(QUESTION).expert
    assert "loss" in mixture.score([chat]).to_frame().columns
    with pytest.raises(moa.errors.DataError, match="1 of 1 must end with an answer"):
        mixture.score([MESSAGES])
    with pytest.raises(moa.errors.UsageError, match="1 conversations and 2 domains"):
        mixture.score([chat], domain=["alpha", "beta"])


def test_a_saved_mixture_is_the_mixture(mixture: moa.Mixture, released: Workspace, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """With its base it needs no workspace; without, one that has the base, or a source of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    mixture.save_pretrained("whole", include_base=True)
    mixture.save_pretrained("parts")
    asked = mixture.generate(QUESTION, max_new_tokens=5)
    for name, options in (("whole", {}), ("parts", {"workspace": released.root}),
                          ("parts", {"base": f"path:{released.root / 'tiny-base'}"})):
        again = moa.Mixture.from_pretrained(name, device="cpu", **options)   # type: ignore[arg-type]
        assert again.generate(QUESTION, max_new_tokens=5) == asked and repr(name) in repr(again)
    with pytest.raises(moa.errors.BaseModelError, match="was a folder where it was made"):
        moa.Mixture.from_pretrained("parts")
    with pytest.raises(moa.errors.UsageError, match="not an empty folder"):
        mixture.save_pretrained("whole")
    with pytest.raises(moa.errors.ArtifactError, match="holds no mixture"):
        moa.Mixture.from_pretrained("absent")


def test_an_export_loads_as_the_mixture_it_was(mixture: moa.Mixture, released: Workspace, tmp_path: Path) -> None:
    export(released, load(released.params), tmp_path / "out", "peft")
    again = moa.Mixture.from_pretrained(tmp_path / "out", workspace=released.root, device="cpu")
    assert again.generate(QUESTION, max_new_tokens=5) == mixture.generate(QUESTION, max_new_tokens=5)
    assert again.route(QUESTION) == mixture.route(QUESTION)


def test_a_registered_model_loads_with_a_workspace_or_the_registrys_address(
        mixture: moa.Mixture, released: Workspace, tmp_path: Path) -> None:
    name = Names.of(load(released.params)).mixture
    for version in ("@champion", "/1"):
        again = moa.Mixture.from_pretrained(f"models:/{name}{version}", workspace=released.root, device="cpu")
        assert again.domains == mixture.domains
    with pytest.raises(moa.errors.RegistryError, match="no version 9"):
        moa.Mixture.from_pretrained(f"models:/{name}/9", workspace=released.root)
    with pytest.raises(moa.errors.UsageError, match="is not understood"):
        moa.Mixture.from_pretrained(f"models:/{name}", workspace=released.root)
    script = (f"import moa; mixture = moa.Mixture.from_pretrained('models:/{name}@champion', device='cpu', "
              f"base='path:{released.root / 'tiny-base'}'); "
              f"print(mixture.generate({QUESTION!r}, max_new_tokens=5).usage)")
    variables = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{released.mlflow / 'mlflow.db'}",
                 "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True,
                          check=False)
    assert done.stdout.strip() == repr(mixture.generate(QUESTION, max_new_tokens=5).usage), done.stderr
    del variables["MLFLOW_TRACKING_URI"]
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=variables, capture_output=True, text=True,
                          check=False)
    assert "needs a registry" in done.stderr


def test_a_changed_file_is_found(mixture: moa.Mixture, released: Workspace, tmp_path: Path) -> None:
    mixture.save_pretrained(tmp_path / "saved")
    manifest = tmp_path / "saved" / "manifest.json"
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**facts, "labels": facts["labels"][::-1]}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="is not what its manifest says"):
        moa.Mixture.from_pretrained(tmp_path / "saved", workspace=released.root)
    shutil.rmtree(tmp_path / "saved")


def test_a_release_is_loaded_by_number(released: Workspace) -> None:
    assert repr(moa.load(released.root, version=1, device="cpu")) == (
        "Mixture('my-experts, release 1', domains=('alpha', 'beta'))")
    with pytest.raises(moa.errors.RegistryError, match="no version 7"):
        moa.load(released.root, version=7)

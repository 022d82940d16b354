"""What is refused before an outside adapter becomes an expert: each by the name of what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moa.base import pin
from moa.base.pin import BasePin
from moa.core import config
from moa.core.errors import ArtifactError, UsageError
from moa.core.files import write_json
from moa.core.paths import MANIFEST, Workspace
from moa.experts.peft_format import CONFIG, WEIGHTS
from moa.workspace import import_expert
from tests import tiny

COMMIT, OTHER = "0123456789" * 4, "9876543210" * 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    made = tiny.workspace(tmp_path_factory.mktemp("admission") / "workspace", ("alpha",))
    pin.fetch(made, config.load(made.params).base)
    return made


@pytest.fixture(scope="module")
def saved(workspace: Workspace) -> Path:
    """An adapter as PEFT itself writes it, on the tiny base."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workspace.root / "tiny-base")
    folder = workspace.root.parent / "saved"
    get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"],
                                     task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.fixture
def outside(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "outside"))


def inspect(workspace: Workspace, folder: Path, pinned: BasePin | None = None, **groups: Any) -> dict[str, Any]:
    read = config.load(workspace.params)
    for group, values in groups.items():
        read = read.model_copy(update={group: getattr(read, group).model_copy(update=values)})
    return import_expert.inspect_adapter(workspace, read, folder, pinned or pin.pin(workspace))


def edit(folder: Path, **fields: Any) -> None:
    written = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**written, **fields}))


def test_what_peft_saves_is_understood(workspace: Workspace, outside: Path) -> None:
    found = inspect(workspace, outside)
    assert (found["rank"], found["alpha"], found["targets"]) == (3, 6.0, ["down_proj", "q_proj"])
    assert found["base"] == {"said": "tiny-base", "compared_by": "shapes"}   # no path of a machine
    (outside / "training_args.bin").write_bytes(b"pickle")   # what trainers leave is not read
    assert inspect(workspace, outside) == found


def test_pickled_weights_are_refused_by_name(workspace: Workspace, outside: Path) -> None:
    (outside / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtifactError, match=r"holds adapter_model\.bin: pickled weights can run code"):
        inspect(workspace, outside)
    (outside / "adapter_model.bin").unlink()
    (outside / WEIGHTS).rename(outside / "weights.pt")
    with pytest.raises(ArtifactError, match=r"holds weights\.pt"):
        inspect(workspace, outside)
    (outside / "weights.pt").unlink()
    with pytest.raises(ArtifactError, match=r"needs adapter_config\.json and adapter_model\.safetensors"):
        inspect(workspace, outside)
    with pytest.raises(UsageError, match="is no folder"):
        inspect(workspace, outside / "nowhere")


@pytest.mark.parametrize(("fields", "named"), [
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"use_dora": True}, "use_dora = True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"bias": "all"}, "bias = 'all'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"), ({"r": 0}, "a rank is 0"),
    ({"r": 4}, r"lora_A \(3, \d+\) and lora_B \(\d+, 3\) do not fit the base's layer .* at rank 4"),
])
def test_what_a_stack_cannot_hold_is_refused_by_name(workspace: Workspace, outside: Path, fields: dict[str, Any],
                                                     named: str) -> None:
    edit(outside, **fields)
    with pytest.raises(ArtifactError, match=named):
        inspect(workspace, outside)


def test_shapes_are_held_against_the_base(workspace: Workspace, outside: Path) -> None:
    tensors = load_file(outside / WEIGHTS)
    name = next(name for name in tensors if "q_proj.lora_A" in name)

    def changed(**replaced: torch.Tensor | None) -> None:
        kept = {key: value for key, value in {**tensors, **replaced}.items() if value is not None}
        save_file(kept, outside / WEIGHTS, metadata={"format": "pt"})

    changed(**{name: torch.zeros(3, 48)})
    with pytest.raises(ArtifactError, match=r"q_proj: lora_A \(3, 48\) .* do not fit the base's layer \(32 x 32\)"):
        inspect(workspace, outside)
    changed(**{name: torch.full((3, 32), float("nan"))})
    with pytest.raises(ArtifactError, match="q_proj: the weights are not finite numbers"):
        inspect(workspace, outside)
    changed(**{name: None})
    with pytest.raises(ArtifactError, match="one of lora_A and lora_B is missing"):
        inspect(workspace, outside)
    changed(**{name.replace("layers.0", "layers.7"): torch.zeros(3, 32)})
    with pytest.raises(ArtifactError, match=r"adapts model\.layers\.7\.self_attn\.q_proj, which is no target layer"):
        inspect(workspace, outside)
    save_file({}, outside / WEIGHTS)
    with pytest.raises(ArtifactError, match="adapts no layer"):
        inspect(workspace, outside)
    (outside / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        inspect(workspace, outside)


def test_joint_training_has_room_for_its_own_targets_alone(workspace: Workspace, outside: Path) -> None:
    assert inspect(workspace, outside, train={"targets": ["q_proj"]})["rank"] == 3
    with pytest.raises(ArtifactError, match=r"adapts model\.layers\.0\.mlp\.down_proj"):
        inspect(workspace, outside, train={"targets": ["q_proj"]}, assemble={"joint_epochs": 1})


def test_a_manifest_that_names_another_base_is_refused(workspace: Workspace, outside: Path) -> None:
    pinned = pin.pin(workspace)
    own = {"weights": pinned.weights, "tokenizer": pinned.tokenizer, "template": pinned.template,
           "source": "path:other"}
    write_json(outside / MANIFEST, {"kind": "expert", "base": own})
    assert inspect(workspace, outside)["base"] == {"said": "path:other", "compared_by": "digest"}
    write_json(outside / MANIFEST, {"kind": "expert", "base": {**own, "weights": "0", "tokenizer": "0"}})
    with pytest.raises(ArtifactError, match=r"trained on path:other, and the weights and tokenizer of this workspace's "
                                            r"base \(path:tiny-base\) differ"):
        inspect(workspace, outside)
    (outside / MANIFEST).write_text("[1, 2")   # somebody else's file of that name
    assert inspect(workspace, outside)["base"]["compared_by"] == "shapes"


@pytest.mark.parametrize(("ours", "said", "revision", "by"), [
    (f"hub:Org/Base@{COMMIT}", "org/base", None, "name"), (f"hub:Org/Base@{COMMIT}", "Org/Base", COMMIT, "name"),
    (f"hub:Org/Base@{COMMIT}", "Org/Base", "main", "name"), (f"hub:Org/Base@{COMMIT}", "Org/Base", OTHER, None),
    (f"hub:Org/Base@{COMMIT}", "Org/Other", None, None), (f"hub:Org/Base@{COMMIT}", "/home/me/base", None, "shapes"),
    (f"hub:Org/Base@{COMMIT}", f"hub:Org/Base@{COMMIT}", None, "name"),
    ("wheel:llm-x==1.0", "wheel:llm-x==1.0", None, "name"), ("wheel:llm-x==1.0", "wheel:llm-x==2.0", None, None),
    ("wheel:llm-x==1.0", "Org/Base", None, "shapes"), ("path:base", "path:base", None, "shapes"),
    ("wheel:llm-x==1.0", "wheel:no version", None, "shapes"),
])
def test_a_bases_name_counts_where_names_mean_something(workspace: Workspace, outside: Path, ours: str, said: str,
                                                        revision: str | None, by: str | None) -> None:
    edit(outside, base_model_name_or_path=said, revision=revision)
    pinned = replace(pin.pin(workspace), source=ours)
    if by is None:
        with pytest.raises(ArtifactError, match=rf"was trained on {said}.* and this workspace's base is {ours}"):
            inspect(workspace, outside, pinned)
    else:
        assert inspect(workspace, outside, pinned)["base"]["compared_by"] == by

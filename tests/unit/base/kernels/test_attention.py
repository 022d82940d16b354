"""The attention of short rows in training gives what transformers' own gives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.kernels.attention import LONGEST, NAME, attend, short_rows
from tests.tiny import ARCHITECTURES


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model_of(architecture: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=40, hidden_size=32, intermediate_size=48,
                                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
                                  **ARCHITECTURES.get(architecture, {}), **more)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


@pytest.mark.parametrize(("architecture", "more"), [
    *((architecture, {}) for architecture in ARCHITECTURES), ("falcon", {}),
    ("mistral", {"sliding_window": 3, "num_key_value_heads": 2})])
def test_short_rows_get_what_transformers_gives_them(architecture: str, more: dict[str, Any]) -> None:
    """Falcon computes its attention itself; a window is narrower than the rows."""
    model = model_of(architecture, **more)
    ids = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    weights = next(iter(model.parameters()))

    def once() -> tuple[Tensor, Tensor]:
        logits = model(ids, use_cache=False).logits
        return logits.detach(), torch.autograd.grad(logits.square().mean(), weights)[0]

    plain = once()
    with short_rows(model):
        assert (model.config._attn_implementation == NAME) == (architecture != "falcon")
        quick = once()
    assert model.config._attn_implementation == "sdpa"
    for one, other in zip(plain, quick, strict=True):
        assert (one - other).abs().max() < 1e-12


def test_what_is_not_short_and_causal_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import sdpa_attention

    asked: list[int] = []
    real = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward",
                        lambda *args, **more: (asked.append(args[1].shape[2]), real(*args, **more))[1])
    module = torch.nn.Module()
    module.is_causal = True
    mask_B1TT = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for length, keys, mask in [(LONGEST + 1, LONGEST + 1, None), (1, 1, None), (2, 9, None), (4, 4, mask_B1TT),
                               (4, 4, None), (LONGEST, LONGEST, None)]:
        attend(module, draw(1, 2, length, 4), draw(1, 2, keys, 4), draw(1, 2, keys, 4), mask)
    assert asked == [LONGEST + 1, 1, 2, 4]

"""Heads find separable domains, calibration keeps its promise, and `early` computes no layer it does not read."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moa import router


def toy_model(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()


def prompts(count: int, seed: int = 0) -> tuple[list[list[int]], torch.Tensor]:
    """Three domains that use different thirds of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [(torch.randint(0, 21, (length,), generator=generator) + 21 * label).tolist()
            for length, label in zip(lengths, labels.tolist(), strict=True)], labels


def test_features_ignore_padding_and_depth() -> None:
    model, (ids, _) = toy_model(), prompts(9)
    together = router.features(model, ids)
    for index, prompt in enumerate(ids):
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0].mean(0) for state in states[1:-1]])   # the last one is after the final norm
        assert torch.allclose(together[index, :-1], expected, atol=1e-5)
        assert torch.allclose(router.features(model, [prompt], depth=2)[0], together[index, :2], atol=1e-5)


def test_layers_above_the_last_one_read_are_not_computed() -> None:
    model = toy_model()
    called: list[int] = []
    for level, layer in enumerate(router.decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, level=level: called.append(level))
    router.features(model, [[1, 2, 3]], depth=2)
    assert called == [0, 1]


@pytest.mark.parametrize("rule", ["early", "last", "vote"])
def test_distinct_domains_are_told_apart(rule: router.Literal) -> None:
    model = toy_model()
    train, labels = prompts(300)
    held, expected = prompts(60, seed=1)
    fitted = router.fit("abc", router.features(model, train), labels)
    router.calibrate(fitted, router.features(model, held), expected, rule=rule, tolerance=0.0, max_abstention=0.01)
    decisions = fitted.decide(router.features(model, held, depth=fitted.depth))
    right = sum("abc"[label] == decision.domain for label, decision in zip(expected.tolist(), decisions, strict=True))
    assert right >= 0.95 * len(held)
    assert sum(decision.abstained for decision in decisions) <= 0.01 * len(held)
    assert all(0 <= decision.confidence <= 1 for decision in decisions)


def test_a_rare_domain_counts_as_much() -> None:
    torch.manual_seed(1)
    common, rare = torch.randn(200, 1, 8), torch.randn(6, 1, 8) + 1.5
    fitted = router.fit("ab", torch.cat([common, rare]), torch.tensor([0] * 200 + [1] * 6))
    assert sum(decision.domain == "b" for decision in fitted.decide(rare)) >= 5

"""Heads find separable domains, calibration keeps its promise, and `early` computes no layer it does not read."""

import dataclasses
import json
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moa.mixture import calibration, router
from tests.tiny import ARCHITECTURES

SCORES = get_args(router.Score)
RULES = get_args(router.Rule)


def toy_model(architecture: str = "llama", layers: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        architecture, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, **ARCHITECTURES[architecture])).eval()


def prompts(count: int, seed: int = 0) -> tuple[list[list[int]], torch.Tensor]:
    """Three domains that use different thirds of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    return [(torch.randint(0, 21, (length,), generator=generator) + 21 * label).tolist()
            for length, label in zip(lengths, labels.tolist(), strict=True)], labels


def clusters(count: int, apart: float = 2.0, domains: int = 3, levels: int = 2, seed: int = 0) -> tuple:
    """Features of `domains` round clusters, whose places do not depend on the seed, and their labels."""
    places = torch.randn(domains, levels, 8, generator=torch.Generator().manual_seed(9)) * apart
    labels = torch.arange(count) % domains
    return places[labels] + torch.randn(count, levels, 8, generator=torch.Generator().manual_seed(seed)), labels


def calibrated(rule: str = "early", score: str = "max_probability", apart: float = 2.0, **how: float) -> router.Router:
    fitted = calibration.train_heads(["a", "b", "c"], *clusters(60, apart))
    how = {"tolerance": 0.0, "max_abstention": 0.05} | how
    return calibration.calibrate(fitted, *clusters(90, apart, seed=1), rule=rule, score=score, **how)


# Features.

@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_level_is_the_mean_of_what_enters_its_layer_whatever_the_padding_and_depth(architecture: str) -> None:
    model, (ids, _) = toy_model(architecture), prompts(9)
    together = router.features(model, ids)
    for index, prompt in enumerate(ids):
        states = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        expected = torch.stack([state[0].mean(0) for state in states[:-1]])   # the last one leaves the stack
        assert torch.allclose(together[index], expected, atol=1e-5)
        assert torch.allclose(router.features(model, [prompt], depth=2)[0], together[index, :2], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_deepest_layer_read_and_those_above_it_are_not_computed(architecture: str, depth: int) -> None:
    model = toy_model(architecture)
    computed: list[int] = []
    for level, layer in enumerate(router.decoder_layers(model)):
        layer.register_forward_hook(lambda *_, level=level: computed.append(level))
    router.features(model, [[1, 2, 3]], depth=depth)
    assert computed == list(range(depth - 1))
    assert not any(layer._forward_pre_hooks for layer in router.decoder_layers(model))


def test_hooks_are_gone_after_an_error() -> None:
    model = toy_model()

    def fail(level: int, _: torch.Tensor) -> None:
        if level == 1:
            raise RuntimeError("no such expert")

    with pytest.raises(RuntimeError, match="no such expert"):
        router.features(model, [[1, 2, 3]], choose=fail)
    assert not any(layer._forward_pre_hooks for layer in router.decoder_layers(model))


def test_choose_sees_each_level_before_its_layer_computes() -> None:
    model, (ids, _) = toy_model(), prompts(3)
    events: list[tuple[str, int]] = []
    seen: list[torch.Tensor] = []
    for level, layer in enumerate(router.decoder_layers(model)):
        layer.register_forward_hook(lambda *_, level=level: events.append(("computed", level)))

    def choose(level: int, pooled: torch.Tensor) -> None:
        events.append(("asked", level))
        seen.append(pooled)

    result = router.features(model, ids, depth=3, choose=choose)
    assert events == [("asked", 0), ("computed", 0), ("asked", 1), ("computed", 1), ("asked", 2)]
    assert [tuple(level.shape) for level in seen] == [(3, 32)] * 3
    assert torch.allclose(torch.stack(seen, 1).sum(0), result.sum(0), atol=1e-5)   # the batch has an order of its own


def test_hidden_states_are_found_by_place_or_name() -> None:
    hidden = torch.ones(1)
    assert router.layer_input((hidden, None), {}) is hidden
    assert router.layer_input((), {"hidden_states": hidden}) is hidden


def test_pooling_ignores_what_the_mask_hides_in_value_and_gradient() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    hidden[0, 2], hidden[1, 1:] = math.nan, math.inf
    hidden.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    pooled = router.mean_pool(hidden, mask)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.stack([hidden[0, :2].float().mean(0), hidden[1, 0].float()]))
    pooled.sum().backward()
    assert torch.equal(hidden.grad.float(), mask[..., None] / mask.sum(1)[:, None, None].expand(2, 3, 4))


# Heads and rules.

@pytest.mark.parametrize("rule", RULES)
def test_distinct_domains_are_told_apart(rule: router.Rule) -> None:
    model = toy_model()
    train, labels = prompts(600)
    held, expected = prompts(60, seed=1)
    fitted = calibration.train_heads("abc", router.features(model, train), labels)
    calibration.calibrate(fitted, router.features(model, held), expected, rule=rule, tolerance=0.0, max_abstention=0.01)
    decisions = fitted.decide(router.features(model, held, depth=fitted.depth))
    right = sum("abc"[label] == decision.domain for label, decision in zip(expected.tolist(), decisions, strict=True))
    assert right >= 0.95 * len(held)
    assert sum(decision.abstained for decision in decisions) <= 0.01 * len(held)
    assert all(0 <= decision.confidence <= 1 for decision in decisions)


def test_a_rare_domain_counts_as_much() -> None:
    torch.manual_seed(1)
    common, rare = torch.randn(200, 1, 8), torch.randn(6, 1, 8) + 1.5
    fitted = calibration.train_heads("ab", torch.cat([common, rare]), torch.tensor([0] * 200 + [1] * 6))
    assert sum(decision.domain == "b" for decision in fitted.decide(rare)) >= 5


@pytest.mark.parametrize("at_once", [calibration.LOGITS, 1])   # all levels together, each alone
def test_heads_reach_the_least_loss(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the documented loss, taken apart from the fit, is nothing at the heads that it found."""
    monkeypatch.setattr(calibration, "LOGITS", at_once)
    features, targets = clusters(61, apart=0.7)
    fitted = calibration.train_heads("abc", features, targets)
    weight, bias = fitted.weight_LCD.clone().requires_grad_(), fitted.bias_LC.clone().requires_grad_()
    logits = torch.einsum("nld,lcd->nlc", (features - features.mean(0)) / features.std(0), weight) + bias
    loss = sum(torch.nn.functional.cross_entropy(logits[targets == label].flatten(0, 1),
                                                 torch.full((int((targets == label).sum()) * 2,), label))
               for label in range(3)) / 3 * 2 + calibration.DECAY / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-3 and bias.grad.abs().max() < 1e-3


def test_early_reads_the_shallowest_level_within_tolerance_and_its_bounds() -> None:
    features, targets = clusters(60, levels=30)
    held, expected = clusters(90, levels=30, seed=1)
    features[:, 5], held[:, 5] = torch.randn(60, 8), torch.randn(90, 8)   # level 5 says nothing
    fitted = calibration.train_heads("abc", features, targets)
    strict = calibration.calibrate(dataclasses.replace(fitted), held, expected, rule="early", tolerance=0.0,
                                   max_abstention=0.0)
    accuracies = (strict.logits(held).argmax(-1) == expected[:, None]).float().mean(0)[5:8].tolist()
    assert strict.layer == 5 + accuracies.index(max(accuracies)) > 5
    lax = calibration.calibrate(fitted, held, expected, rule="early", tolerance=1.0, max_abstention=0.0)
    assert (lax.layer, lax.depth) == (5, 6)   # not 0, though it is within tolerance too
    assert calibration.calibrate(fitted, held, expected, rule="vote", tolerance=0.0, max_abstention=0.0).depth == 30


@pytest.mark.parametrize("levels", [1, 2, 4, 12, 24, 30, 32, 80])
def test_early_costs_at_most_a_quarter_of_the_layers(levels: int) -> None:
    fitted = calibration.train_heads("abc", *clusters(30, apart=0.0, levels=levels))
    calibration.calibrate(fitted, *clusters(30, apart=0.0, levels=levels, seed=1), rule="early", tolerance=0.0,
                          max_abstention=0.0)
    assert fitted.depth - 1 < levels / 4 or fitted.depth == 1


def test_vote_averages_the_levels_probabilities() -> None:
    found = calibrated("vote", apart=0.5)
    features, _ = clusters(30, 0.5, seed=2)
    expected = (found.logits(features) / found.temperature).softmax(-1).mean(1)
    assert torch.allclose(found.probabilities(features).float(), expected, atol=1e-6)


def test_trace_gives_every_level_a_choice() -> None:
    found = calibrated()
    features, labels = clusters(30, seed=2)
    for prompt, label in zip(found.trace(features), labels.tolist(), strict=True):
        assert [choice.level for choice in prompt] == [0, 1]
        assert all(1 / 3 <= choice.probability <= 1 for choice in prompt)
        assert prompt[found.layer].domain == "abc"[label]
    assert [len(prompt) for prompt in found.trace(features[:2, :1])] == [1, 1]


# Calibration and abstention.

@settings(deadline=None)
@given(st.lists(st.sampled_from([-3.0, 0.0, 0.5, 1.0, 2.0]) | st.floats(-50, 50), min_size=1, max_size=300),
       st.floats(0, 1, exclude_max=True))
def test_the_threshold_is_the_highest_that_keeps_the_promise(scores: list[float], most: float) -> None:
    ordered = torch.tensor(scores, dtype=torch.float64)
    found = calibration.abstention_threshold(ordered, most)
    assert (ordered < found).sum().item() <= most * len(scores)
    assert (ordered < math.nextafter(found, math.inf)).sum().item() > most * len(scores)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
def test_few_known_prompts_abstain_and_foreign_ones_do(rule: router.Rule, score: router.Score) -> None:
    found = calibrated(rule, score, apart=4.0)
    known = found.decide(clusters(90, 4.0, seed=1)[0])
    assert sum(decision.abstained for decision in known) <= 0.05 * 90
    assert found.figures["abstention"] == sum(decision.abstained for decision in known) / 90
    middle = clusters(30, 4.0)[0].mean(0, keepdim=True)   # between the known ones
    foreign, = found.decide(middle)
    assert foreign.abstained and foreign.score < found.threshold


def test_confidence_is_no_more_than_the_validation_rows_support() -> None:
    found = calibrated(apart=20.0)   # every validation prompt is right: 90 of 90
    assert found.figures["accuracy"] == 1.0
    confidence = found.probabilities(clusters(90, 20.0, seed=1)[0]).max(-1).values
    assert confidence.mean() == pytest.approx(91 / 92, abs=3e-3)


def test_scores_are_still_ordered_where_the_probability_rounds_to_one() -> None:
    found = calibrated(apart=20.0)
    found.temperature = 0.01
    near, = clusters(1, 20.0)[0]
    decisions = found.decide(torch.stack([near * share for share in (1.0, 1.5, 2.0)]))
    assert [decision.confidence for decision in decisions] == [1.0] * 3
    assert decisions[0].score < decisions[1].score < decisions[2].score


def test_accuracy_and_agreement_by_level_of_a_case_worked_by_hand() -> None:
    """Level 0 says a to everything, level 1 is right, level 2 takes the one b for a c, which `last` then says too."""
    features, targets = torch.eye(3)[[0, 0, 1, 2]][:, None].repeat(1, 3, 1), torch.tensor([0, 0, 1, 2])
    weight = torch.eye(3).repeat(3, 1, 1)
    weight[0] = torch.tensor([1.0, 0.0, 0.0])[:, None]
    weight[2, :, 1] = torch.tensor([0.0, 0.0, 1.0])
    heads = router.Router(list("abc"), torch.zeros(3, 3), torch.ones(3, 3), weight, torch.zeros(3, 3), rule="last")
    assert calibration.by_level(heads, features, targets) == [
        {"level": 0, "accuracy": 0.5, "agreement": 0.5}, {"level": 1, "accuracy": 1.0, "agreement": 0.75},
        {"level": 2, "accuracy": 0.75, "agreement": 1.0}]


@pytest.mark.parametrize("rule", RULES)
def test_calibration_tells_the_levels_apart_and_an_older_router_without_that_still_loads(rule: router.Rule) -> None:
    found = calibrated(rule, apart=0.5)
    levels = found.figures["levels"]
    assert [each["level"] for each in levels] == [0, 1]
    assert max(each["accuracy"] for each in levels) == found.figures["best_level_accuracy"] < 1
    if rule != "vote":   # a vote is nobody's own opinion
        assert levels[found.reads] == {"level": found.reads, "accuracy": found.figures["accuracy"], "agreement": 1.0}
    facts = {name: value for name, value in found.facts().items() if name != "levels"}
    older = router.Router.restore(found.labels, found.tensors(), facts)
    assert older.facts() == facts
    features, _ = clusters(30, 0.5, seed=2)
    assert older.decide(features) == found.decide(features)


def test_the_calibration_error_of_a_case_worked_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.52, 1.0])
    correct = torch.tensor([True, True, True, False, False, True])
    # bin 14: five rows, accuracy 4/5, confidence 4.8/5; bin 7: one row, 0 against 0.52
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx((0.8 + 0.52) / 6)
    assert math.isnan(calibration.expected_calibration_error(torch.zeros(0), torch.zeros(0)))


def test_the_temperature_lowers_the_calibration_error_of_overconfident_heads() -> None:
    fitted = calibration.train_heads("abc", *clusters(60, 0.5))
    fitted.weight_LCD *= 8
    found = calibration.calibrate(fitted, *clusters(300, 0.5, seed=1), rule="last", tolerance=0.0, max_abstention=0.0)
    assert found.temperature > 2
    assert found.figures["ece"] < 0.5 * found.figures["ece_uncalibrated"]


def test_a_single_domain_is_no_special_case() -> None:
    fitted = calibration.train_heads(["only"], *clusters(10, domains=1))
    for rule in RULES:
        for score in SCORES:
            calibration.calibrate(fitted, *clusters(8, domains=1, seed=1), rule=rule, tolerance=0.0, max_abstention=0.0,
                                  score=score)
            assert math.isfinite(fitted.threshold)
            assert not any(decision.abstained for decision in fitted.decide(clusters(8, domains=1, seed=1)[0]))


# To disk and back.

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("score", SCORES)
def test_tensors_and_facts_make_the_same_router_again(rule: router.Rule, score: router.Score) -> None:
    found = calibrated(rule, score, apart=0.7)
    found.stream = "experts"
    facts = json.loads(json.dumps(found.facts() | {"digest": "d" * 64}))
    again = router.Router.restore(found.labels, found.tensors(), facts)
    features, _ = clusters(30, 0.7, seed=2)
    assert again.decide(features) == found.decide(features)
    assert again.facts() == found.facts() and again.stream == "experts" and again.depth == found.depth
    assert not any("lora_" in name for name in found.tensors())

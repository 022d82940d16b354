"""Heads find separable domains and grow without moving, and `early` computes no layer it does not read."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from moa.mixture import calibration, router
from moa.mixture.calibration import Prompts
from tests.tiny import ARCHITECTURES

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


def labelled(features: torch.Tensor, targets: torch.Tensor) -> Prompts:
    """Prompts of which each is a group, named by its features."""
    return Prompts(features, targets, [str(total) for total in features.flatten(1).double().sum(1).tolist()])


def fit(labels: Sequence[str], train: Prompts, validation: Prompts, rule: router.Rule = "early", tolerance: float = 0.0,
        max_abstention: float | None = 0.0) -> router.Router:
    return calibration.fit(labels, train, validation, rule=rule, tolerance=tolerance, max_abstention=max_abstention)


def calibrated(rule: router.Rule = "early", apart: float = 2.0, max_abstention: float | None = 0.05) -> router.Router:
    return fit("abc", labelled(*clusters(60, apart)), labelled(*clusters(90, apart, seed=1)), rule,
               max_abstention=max_abstention)


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
    fitted = fit("abc", labelled(router.features(model, train), labels),
                 labelled(router.features(model, held), expected), rule, max_abstention=0.01)
    decisions = fitted.decide(router.features(model, held, depth=fitted.depth))
    right = sum("abc"[label] == decision.domain for label, decision in zip(expected.tolist(), decisions, strict=True))
    assert right >= 0.95 * len(held)
    assert not any(decision.abstained for decision in decisions)   # the thresholds are these prompts' lowest scores
    assert all(0 <= decision.confidence <= 1 for decision in decisions)


def test_a_rare_domain_counts_as_much() -> None:
    torch.manual_seed(1)
    common, rare = torch.randn(200, 1, 8), torch.randn(6, 1, 8) + 1.5
    fitted = calibration.train_heads("ab", labelled(torch.cat([common, rare]), torch.tensor([0] * 200 + [1] * 6)))
    assert sum(decision.domain == "b" for decision in fitted.decide(rare)) >= 5


@pytest.mark.parametrize("at_once", [calibration.LOGITS, 1])   # all levels together, each alone
def test_heads_reach_the_least_loss(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the documented loss, taken apart from the fit, is nothing at the heads that it found."""
    monkeypatch.setattr(calibration, "LOGITS", at_once)
    features, targets = clusters(61, apart=0.7)
    fitted = calibration.train_heads("abc", labelled(features, targets))
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
    train, validation = labelled(features, targets), labelled(held, expected)
    strict = fit("abc", train, validation)
    accuracies = (strict.logits(held).argmax(-1) == expected[:, None]).float().mean(0)[5:8].tolist()
    assert strict.layer == 5 + accuracies.index(max(accuracies)) > 5
    lax = fit("abc", train, validation, tolerance=1.0)
    assert (lax.layer, lax.depth) == (5, 6)   # not 0, though it is within tolerance too
    assert fit("abc", train, validation, "vote").depth == 30


@pytest.mark.parametrize("levels", [1, 2, 4, 12, 24, 30, 32, 80])
def test_early_costs_at_most_a_quarter_of_the_layers(levels: int) -> None:
    fitted = fit("abc", labelled(*clusters(30, apart=0.0, levels=levels)),
                 labelled(*clusters(30, apart=0.0, levels=levels, seed=1)))
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

@pytest.mark.parametrize("rule", RULES)
def test_few_known_prompts_abstain_and_foreign_ones_do(rule: router.Rule) -> None:
    found = calibrated(rule, apart=4.0)
    known = found.decide(clusters(90, 4.0, seed=1)[0])
    assert sum(decision.abstained for decision in known) <= 0.05 * 90
    assert found.figures["abstention"] == sum(decision.abstained for decision in known) / 90
    middle = clusters(30, 4.0)[0].mean(0, keepdim=True)   # between the known ones
    foreign, = found.decide(middle)
    assert foreign.abstained and foreign.threshold is not None and foreign.score < foreign.threshold
    for decision in known:
        assert decision.threshold is not None
        assert decision.abstained == (decision.score < decision.threshold)   # a domain that it is like answers
    never = dataclasses.replace(found, threshold_C=None)
    assert not any(decision.abstained for decision in never.decide(middle))


def test_a_domain_that_the_prompt_is_unlike_does_not_answer_while_another_can() -> None:
    heads = router.Router(["a", "b"], torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2, 2),
                          torch.tensor([[2.0, 0.0]]), seen_MD=torch.eye(2), seen_M=torch.tensor([0, 1]),
                          threshold_C=torch.tensor([0.9, 0.9]))
    like_b, like_none = heads.decide(torch.tensor([[[0.1, 1.0]], [[1.0, 1.0]]]))
    assert (like_b.domain, like_b.abstained) == ("b", False)   # the heads alone say a
    assert (like_none.domain, like_none.abstained) == ("a", True)
    assert like_b.confidence == pytest.approx(1 / (1 + math.exp(2)))


def test_a_prompt_is_measured_without_its_own_group() -> None:
    """Each further prompt has a twin: one group leaves both out, two groups find the twin."""
    train, held = labelled(*clusters(9)), labelled(*clusters(9, seed=1))
    features, targets = clusters(60, seed=2)
    twice = torch.cat([features, features])
    pairs = Prompts(twice, targets.repeat(2), [str(number) for number in range(60)] * 2)
    apart = Prompts(twice, targets.repeat(2), [str(number) for number in range(120)])
    thresholds = [calibration.fit("abc", train, held, further.at, max_abstention=0.0).threshold_C
                  for further in (pairs, apart)]   # each the lowest similarity
    assert thresholds[0] is not None and thresholds[1] is not None
    assert thresholds[0].shape == (3,) and (thresholds[0] <= thresholds[1]).all()
    assert (thresholds[0] < thresholds[1]).any()


def test_a_single_domain_knows_strange_prompts_by_those_of_no_domain() -> None:
    """Around its own mean a domain has prompts in every direction; around the mean of many kinds it has one."""
    kinds = 3 * torch.randn(6, 1, 64, generator=torch.Generator().manual_seed(9))

    def drawn(kind: int, seed: int, count: int) -> torch.Tensor:
        return kinds[kind] + torch.randn(count, 1, 64, generator=torch.Generator().manual_seed(seed))

    own = [Prompts(drawn(0, seed, count), torch.zeros(count, dtype=torch.long),
                   [f"{seed} {at}" for at in range(count)]) for seed, count in ((0, 48), (1, 30), (2, 300))]
    background = torch.cat([drawn(kind, 3, 16) for kind in (1, 2, 3, 4)])
    strange, fresh = drawn(5, 4, 100), drawn(0, 5, 100)
    caught = []
    for others in (None, background):
        found = calibration.fit(["only"], own[0], own[1], own[2].at, background_BLD=others)
        assert sum(decision.abstained for decision in found.decide(fresh)) <= 2
        caught.append(sum(decision.abstained for decision in found.decide(strange)))
    assert caught[1] >= 95 > 50 > caught[0]


def test_confidence_is_no_more_than_the_validation_rows_support() -> None:
    found = calibrated(apart=20.0)   # every validation prompt is right: 90 of 90
    assert found.figures["accuracy"] == 1.0
    confidence = found.probabilities(clusters(90, 20.0, seed=1)[0]).max(-1).values
    assert confidence.mean() == pytest.approx(91 / 92, abs=3e-3)


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
    train, validation = labelled(*clusters(60, 0.5)), labelled(*clusters(300, 0.5, seed=1))
    fitted = calibration.train_heads("abc", train)
    fitted.weight_LCD *= 8
    calibration.choose_level(fitted, "last", 0.0, validation)
    calibration.calibrate(fitted, validation)
    assert fitted.temperature > 2
    assert fitted.figures["ece"] < 0.5 * fitted.figures["ece_uncalibrated"]


@pytest.mark.parametrize("rule", RULES)
def test_a_single_domain_is_no_special_case(rule: router.Rule) -> None:
    train, validation = labelled(*clusters(40, domains=1)), labelled(*clusters(20, domains=1, seed=1))
    found = fit(["only"], train, validation, rule)
    assert not any(decision.abstained for decision in found.decide(validation.features_NLD))
    fresh = found.decide(clusters(400, domains=1, seed=2)[0])
    promised = found.figures["promises"]["only"]["share"]
    assert promised == pytest.approx(1 - 0.05 ** (1 / 20))   # the training prompts look more alike than fresh ones
    assert sum(decision.abstained for decision in fresh) / 400 <= promised


# A successor.

def prompts_of(labels: str, seed: int, count: int = 30, apart: float = 2.0) -> Prompts:
    """Prompts of some of six clusters, a to f, numbered as in `labels`."""
    features, targets = clusters(6 * count, apart, domains=6, seed=seed)
    kept = torch.tensor(["abcdef"[target] in labels for target in targets.tolist()])
    numbers = torch.tensor([labels.index("abcdef"[target]) for target in targets[kept].tolist()])
    return labelled(features[kept], numbers)


def grown(incumbent: router.Router, labels: str, apart: float = 2.0, most: float | None = 0.05) -> router.Router:
    train, validation, further = (prompts_of(labels, seed, apart=apart) for seed in (0, 1, 3))
    return calibration.fit(labels, train, validation, further.at, max_abstention=most, extends=incumbent)


def domains_of(found: router.Router, prompts: Prompts) -> list[str]:
    return ["base" if decision.abstained else decision.domain for decision in found.decide(prompts.features_NLD)]


@settings(deadline=None, max_examples=25)
@given(old=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True),
       apart=st.sampled_from([0.3, 1.0, 3.0]), most=st.sampled_from([0.05, None]), data=st.data())
def test_an_arrival_takes_no_known_prompt_and_moves_none_between_the_others(
        old: list[str], apart: float, most: float | None, data: st.DataObject) -> None:
    arrivals = data.draw(st.lists(st.sampled_from(sorted({*"abcdef"} - {*old})), min_size=1, unique=True))
    before, labels = "".join(old), "".join(sorted([*old, *arrivals]))
    train, validation = prompts_of(before, 0, apart=apart), prompts_of(before, 1, apart=apart)
    incumbent = calibration.fit(before, train, validation, prompts_of(before, 3, apart=apart).at, max_abstention=most)
    successor = grown(incumbent, labels, apart, most)
    assert domains_of(successor, validation) == domains_of(incumbent, validation)
    assert (successor.rule, successor.layer) == (incumbent.rule, incumbent.layer)
    fresh = prompts_of(before, 2, apart=apart)
    for was, now in zip(domains_of(incumbent, fresh), domains_of(successor, fresh), strict=True):
        assert now == was or now in arrivals   # no fresh prompt goes to another old domain, or to the base


def test_a_newcomer_gets_its_own_prompts_where_it_is_told_apart() -> None:
    incumbent = fit("abc", prompts_of("abc", 0), prompts_of("abc", 1), max_abstention=0.05)
    successor = grown(incumbent, "abcd")
    assert domains_of(successor, prompts_of("d", 2)).count("d") >= 0.9 * 30
    later = grown(successor, "abcde")
    assert later.generation_C is not None and later.generation_C.tolist() == [0, 0, 0, 1, 2]
    assert domains_of(later, prompts_of("e", 2)).count("e") >= 0.9 * 30
    assert domains_of(later, prompts_of("abcd", 1)) == domains_of(successor, prompts_of("abcd", 1))


def test_a_twin_of_a_known_domain_gets_next_to_nothing() -> None:
    """The twin's prompts come from the same cluster: only one of them in sixty lies beyond those of the known one."""
    features, targets = clusters(1200, apart=2.0, domains=2)
    twins, numbers = features[targets == 0], torch.arange(600) % 2
    train, validation, rest = (labelled(twins[some], numbers[some]) for some in (
        slice(0, 120), slice(120, 240), slice(240, 480)))
    older = [part.where(part.targets_N == 0) for part in (train, validation, rest)]
    incumbent = calibration.fit("a", older[0], older[1], older[2].at, max_abstention=0.05)
    successor = calibration.fit("ab", train, validation, rest.at, max_abstention=0.05, extends=incumbent)
    assert domains_of(successor, labelled(twins[480:], numbers[480:])).count("b") <= 0.05 * 120


@given(st.lists(st.floats(-30, 30), max_size=200))
def test_a_head_is_lowered_beyond_every_known_prompt_and_never_raised(scores: list[float]) -> None:
    found = calibration.farthest(torch.tensor(scores))
    assert found >= 0 and all(score < found or score <= 0 for score in torch.tensor(scores).tolist())
    assert found == 0 or max(scores) > -60
    assert calibration.farthest(torch.tensor([*scores, 40.0])) >= 40


def test_a_removed_domain_leaves_the_others_where_they_are() -> None:
    train, validation, further = (prompts_of("abc", seed) for seed in (0, 1, 3))
    incumbent = calibration.fit("abc", train, validation, further.at, max_abstention=0.05)
    successor, fresh = grown(incumbent, "ac"), prompts_of("ac", 2)
    moved = [(was, now) for was, now in zip(domains_of(incumbent, fresh), domains_of(successor, fresh), strict=True)
             if was != now]
    assert all(was == "b" for was, _ in moved)


def test_a_successor_of_equal_domains_is_the_incumbent() -> None:
    train, validation, further = (prompts_of("abc", seed) for seed in (0, 1, 3))
    incumbent = calibration.fit("abc", train, validation, further.at, max_abstention=0.05)
    again = grown(incumbent, "abc")
    assert again.tensors().keys() == incumbent.tensors().keys()
    assert all(torch.equal(tensor, incumbent.tensors()[name]) for name, tensor in again.tensors().items())
    assert again.temperature == incumbent.temperature and again.figures == incumbent.figures


# To disk and back.

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("most", [0.05, None])
def test_tensors_and_facts_make_the_same_router_again(rule: router.Rule, most: float | None) -> None:
    found = calibrated(rule, apart=0.7, max_abstention=most)
    found.stream = "experts"
    facts = json.loads(json.dumps(found.facts() | {"digest": "d" * 64}))
    again = router.Router.restore(found.labels, found.tensors(), facts)
    features, _ = clusters(30, 0.7, seed=2)
    assert again.decide(features) == found.decide(features)
    assert again.facts() == found.facts() and again.stream == "experts" and again.depth == found.depth
    assert not any("lora_" in name for name in found.tensors())


def test_a_router_with_one_threshold_and_usual_cosines_still_loads() -> None:
    found = calibrated(apart=0.7)
    tensors = {name: tensor for name, tensor in found.tensors().items() if name != "threshold"}
    older = router.Router.restore(found.labels, tensors | {"usual": torch.tensor([0.4, 0.2, 0.0])},
                                  found.facts() | {"threshold": 0.1, "score": "nearest"})
    assert older.threshold_C is not None and older.threshold_C.tolist() == pytest.approx([0.3, 0.2, 0.1])
    with pytest.raises(KeyError):
        router.Router.restore(found.labels, tensors, found.facts() | {"threshold": 0.1, "score": "max_probability"})


def test_what_an_export_says_about_decisions_is_what_the_router_does() -> None:
    """router.json of `moa export`, followed by hand with the saved tensors alone."""
    first = fit("abc", prompts_of("abc", 0), prompts_of("abc", 1), max_abstention=0.3)
    found = grown(first, "abcd", most=0.3)
    saved = {name: tensor.double() for name, tensor in found.tensors().items()}
    features, level = prompts_of("abcdef", 2).features_NLD.double(), found.reads
    standard = (features[:, level] - saved["mean"][level]) / saved["scale"][level]
    shorter = standard - (standard @ saved["within"].T) @ saved["within"]
    shorter /= shorter.norm(dim=-1, keepdim=True)
    cosine = shorter @ saved["seen"].T
    similarity = torch.stack([cosine[:, saved["seen_of"] == domain].amax(1) for domain in range(4)], 1)
    for row, decision in enumerate(found.decide(features.float())):
        logits = saved["weight"][level] @ standard[row] + saved["bias"][level]
        possible = similarity[row] >= saved["threshold"]
        allowed = logits.where(possible, -math.inf) if possible.any() else logits
        older = allowed[saved["generation"] == 0].amax()
        allowed = allowed + torch.where(saved["generation"] > 0, older if older.isfinite() else 0.0, 0.0)
        assert decision.abstained == (not possible.any())
        assert decision.domain == "abcd"[int(allowed.argmax())]
        assert decision.score == pytest.approx(similarity[row, int(allowed.argmax())].item(), abs=1e-5)

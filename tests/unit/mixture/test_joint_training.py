"""Joint training reaches exactly experts and heads; heads inside a forward choose as they would layer by layer."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from moa.base.encoding import Encoded
from moa.core.config import TrainParams
from moa.experts.batches import Batch, collate, row_losses
from moa.experts.cotraining import Learner, recomputing
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture import joint_training
from moa.mixture.calibration import Prompts, train_heads
from moa.mixture.joint_training import forget_labels, train_jointly
from moa.mixture.layer_routing import Heads, Use, layer_routing, layer_selector, prompt_mask
from moa.mixture.router import Router, decoder_layers, features, mean_pool
from tests.tiny import ARCHITECTURES

LABELS = ["a", "b", "c"]
SHARE, LAYERS = 20, 3   # words of a domain; decoder layers
PARAMS = TrainParams.model_construct(**{**TrainParams().model_dump(), "epochs": 1, "batch_rows": 4,
                                        "learning_rate": 0.1, "batch_tokens": 120, "validation_rows": 4})


def with_params(**changes: Any) -> TrainParams:
    return PARAMS.model_copy(update=changes)


def toy_rows(domain: int, count: int, seed: int = 0) -> list[Encoded]:
    """Rows in a domain's own words; all have its one answer of three tokens, so that all weigh the same."""
    generator = torch.Generator().manual_seed(100 * seed + domain)
    lengths = torch.randint(4, 9, (count,), generator=generator).tolist()
    return [Encoded([*(torch.randint(0, SHARE, (length,), generator=generator) + SHARE * domain).tolist(),
                     *range(SHARE * domain, SHARE * domain + 3)], [False] * length + [True] * 3) for length in lengths]


def prompts_of(rows: Sequence[Encoded]) -> list[list[int]]:
    return [row.ids[:row.question_tokens] for row in rows]


class Scene:
    """A base with three experts of random numbers, a router fitted on the base, and learners."""

    def __init__(self, architecture: str = "llama", stream: Any = "experts", owners: Sequence[int] = (0, 1, 2),
                 params: TrainParams = PARAMS, spread: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            architecture, vocab_size=SHARE * 3, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=64, initializer_range=0.2,
            **ARCHITECTURES[architecture])).double().eval()
        self.rows = [toy_rows(domain, 8) for domain in range(3)]
        self.validation = [toy_rows(domain, 4, seed=1) for domain in range(3)]
        targets = torch.arange(3).repeat_interleave(8)
        groups = [str(number) for number in range(len(targets))]
        self.router = train_heads(LABELS, Prompts(features(self.model, self.prompts), targets, groups))
        self.router.stream = stream
        self.stack = ExpertStack(self.model, [LoraSpec(2, 4.0), LoraSpec(3, 3.0), LoraSpec(1, 2.0)],
                                 dtype=torch.float64)
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()
                     if not name.endswith(("a_ERI", "b_EOR"))}
        for expert in range(3):
            self.stack.initialise(expert, expert)
        for layer in self.stack.layers.values():
            for expert, spec in enumerate(self.stack.specs):
                part = layer.b_EOR.detach()[expert, :, :spec.rank]
                part.copy_(torch.randn(part.shape) * spread)
        self.stack.trainable(True)
        self.owners, self.params = owners, params
        self.learners = self.beginning()

    def beginning(self) -> list[Learner]:
        """Learners that start from what the experts are now."""
        return [Learner(LABELS[expert], expert, self.stack, self.rows[domain], self.validation[domain], self.params)
                for domain, expert in enumerate(self.owners)]

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt for rows in self.rows for prompt in prompts_of(rows)]

    def batch(self, split: str = "validation") -> Batch:
        return collate([(domain, row) for domain, rows in enumerate(getattr(self, split)) for row in rows])

    def routing_loss(self) -> float:
        """Mean over levels and prompts, as joint training sees it: under each row's own expert."""
        batch, heads = self.batch(), Heads(self.router)
        self.stack.select(batch.owners)
        with torch.no_grad(), layer_routing(self.model, self.stack, heads, prompt_mask(batch), "labels") as logits:
            self.model(batch.ids)
        self.stack.select(None)
        return nn.functional.cross_entropy(torch.cat(logits), batch.owners.repeat(LAYERS)).item()

    def train(self, eta: float = 1.0, **more: Any) -> None:
        train_jointly(self.model, self.stack, self.router, self.learners, self.params, eta, **more)

    def base_is_unchanged(self) -> bool:
        after = self.model.state_dict()
        return all(torch.equal(after[name], value) for name, value in self.base.items())


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[Tensor]]]:
    """What joint training's steps see: of the heads' weights and biases, and of each expert, step by step."""
    seen: dict[str, list[Tensor]] = {"weight_LCD": [], "bias_LC": [], **{label: [] for label in LABELS}}
    step, update = torch.optim.AdamW.step, Learner.update

    def spy_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        heads = [each for group in self.param_groups for each in group["params"] if each.shape[:2] == (LAYERS, 3)]
        for name, parameter in zip(("weight_LCD", "bias_LC"), heads, strict=False):
            seen[name].append(parameter.grad.clone())
        return step(self, *args, **kwargs)

    def spy_update(self: Learner, *args: Any) -> None:
        assert self.weights.grad is not None
        seen[self.name].append(self.weights.grad.clone())
        update(self, *args)

    monkeypatch.setattr(joint_training.torch.optim.AdamW, "step", spy_step)
    monkeypatch.setattr(Learner, "update", spy_update)
    yield seen


# What the gradient reaches.

@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use", ["labels", "blend"])
def test_gradients_reach_exactly_experts_and_heads(architecture: str, use: Use) -> None:
    scene = Scene(architecture)
    heads, batch = Heads(scene.router), scene.batch("rows")
    scene.stack.select(batch.owners)
    with layer_routing(scene.model, scene.stack, heads, prompt_mask(batch), use) as logits:
        losses = row_losses(scene.model, batch)
    assert [tuple(each.shape) for each in logits] == [(24, 3)] * LAYERS
    routing = nn.functional.cross_entropy(torch.cat(logits), batch.owners.repeat(LAYERS))
    (losses.mean() + (routing if use == "labels" else 0.0)).backward()
    experts = {id(each) for each in scene.stack.parameters()}
    for name, parameter in scene.model.named_parameters():
        if id(parameter) in experts:
            assert parameter.grad is not None and parameter.grad.flatten(1).abs().amax(1).gt(0).all(), name
        else:
            assert parameter.grad is None and not parameter.requires_grad, name
    for name, parameter in heads.named_parameters():   # every level's
        assert parameter.grad is not None and parameter.grad.flatten(1).abs().amax(1).gt(0).all(), name


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_a_joint_epoch_moves_experts_and_heads_and_not_the_base(eta: float, gradients: dict[str, list[Tensor]]) -> None:
    scene = Scene()
    before, mean = scene.router.weight_LCD.clone(), scene.router.mean_LD.clone()
    scene.train(eta, keep_start=False)
    assert all(len(found) == 2 and all(each.abs().max() > 0 for each in found) for found in gradients.values())
    assert not torch.equal(scene.router.weight_LCD, before) and torch.equal(scene.router.mean_LD, mean)
    assert all(learner.progress.best_epoch == 1 for learner in scene.learners) and scene.base_is_unchanged()
    assert scene.router.stream == ("experts" if eta else "blend")
    assert scene.stack.selection.batch is None and not hooks(scene.model)


def hooks(model: nn.Module) -> bool:
    return any(layer._forward_pre_hooks for layer in decoder_layers(model))


def test_labels_teach_the_heads_and_the_answers_the_experts() -> None:
    scene = Scene(params=with_params(epochs=10))
    forget_labels(scene.router)
    before = scene.routing_loss()
    scene.train(eta=1.0)
    assert before == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)
    assert scene.routing_loss() < 0.7 * before
    for learner in scene.learners:
        losses = [epoch["train_loss"] for epoch in learner.progress.curve]
        assert losses[-1] < losses[0]


def test_eta_weighs_the_routing_loss(gradients: dict[str, list[Tensor]]) -> None:
    for eta in (0.5, 2.0):
        scene = Scene()
        forget_labels(scene.router)
        scene.train(eta)
    first, second = gradients["weight_LCD"][0], gradients["weight_LCD"][2]
    assert torch.allclose(4 * first, second, rtol=1e-4) and first.abs().max() > 1e-3


# What is kept.

def test_an_expert_that_gets_worse_keeps_its_start() -> None:
    scene = Scene(params=with_params(epochs=3))
    scene.train()   # now there is something to lose
    scene.params = with_params(epochs=2, learning_rate=0.02)
    scene.learners = scene.beginning()
    start = scene.stack.weights.clone()
    scene.learners[1].params = with_params(epochs=2, learning_rate=100.0)
    scene.train()
    progress = [learner.progress for learner in scene.learners]
    assert [each.best_epoch > 0 for each in progress] == [True, False, True]
    assert not any(each.failure for each in progress)
    assert torch.equal(scene.stack.weights[1], start[1])
    assert not torch.equal(scene.stack.weights[0], start[0]) and not torch.equal(scene.stack.weights[2], start[2])
    assert progress[1].curve[0]["validation_loss"] > progress[1].best_loss


def test_a_start_that_is_not_kept_is_left_for_the_first_epoch() -> None:
    scene = Scene()
    start = scene.stack.weights.clone()
    scene.learners[1].params = with_params(learning_rate=100.0)
    scene.train(keep_start=False)
    assert scene.learners[1].progress.best_epoch == 1 and not torch.equal(scene.stack.weights[1], start[1])


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_without_a_learning_rate_the_heads_alone_learn(eta: float, gradients: dict[str, list[Tensor]]) -> None:
    scene = Scene(params=with_params(learning_rate=0.0, weight_decay=0.1))
    start, heads = scene.stack.weights.clone(), scene.router.weight_LCD.clone()
    scene.train(eta)
    assert torch.equal(scene.stack.weights, start) and not torch.equal(scene.router.weight_LCD, heads)
    assert all(each.abs().max() == 0 for label in LABELS for each in gradients[label])
    assert not any(learner.progress.failure for learner in scene.learners)


def test_an_expert_that_is_no_number_fails_and_takes_neither_heads_nor_others_along() -> None:
    scene = Scene(params=with_params(epochs=3))
    scene.stack.weights[1] = float("nan")
    scene.train()
    assert "not finite" in str(scene.learners[1].progress.failure)
    assert [scene.learners[expert].progress.best_epoch > 0 for expert in (0, 2)] == [True, True]
    assert scene.router.weight_LCD.isfinite().all() and scene.stack.weights[[0, 2]].isfinite().all()


# Without labels.

def test_without_labels_none_enters_the_gradient(gradients: dict[str, list[Tensor]]) -> None:
    """Rows of one domain given to another's expert: the heads learn the same, for each layer blends all experts."""
    for owners in ((0, 1, 2), (2, 0, 1)):   # all rows in one step: their order is an expert's own
        Scene(owners=owners, params=with_params(batch_rows=8)).train(eta=0.0)
    for name in ("weight_LCD", "bias_LC"):
        ours, theirs = gradients[name]
        assert ours.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7), name


def test_with_labels_they_do(gradients: dict[str, list[Tensor]]) -> None:
    for owners in ((0, 1, 2), (2, 0, 1)):
        Scene(owners=owners, params=with_params(batch_rows=8)).train(eta=1.0)
    ours, theirs = gradients["weight_LCD"]
    assert (ours - theirs).norm() > 0.1 * ours.norm()


def test_forgotten_labels_prefer_nobody_and_blend_all_evenly() -> None:
    scene = Scene()
    forget_labels(scene.router)
    batch, heads = scene.batch(), Heads(scene.router)
    with torch.no_grad():
        with layer_routing(scene.model, scene.stack, heads, prompt_mask(batch), "blend"):
            ours = scene.model(batch.ids).logits
        scene.stack.blend(torch.full((12, 3), 1 / 3, dtype=torch.float64))
        even = scene.model(batch.ids).logits
    assert (ours - even).abs().max() < 1e-6   # the heads' probabilities are single precision


@pytest.mark.parametrize("eta", [1.0, 0.0])
def test_recomputing_changes_nothing_of_joint_training(eta: float, gradients: dict[str, list[Tensor]]) -> None:
    for wanted in (False, True):
        scene = Scene()
        with recomputing(scene.model, wanted):
            scene.train(eta)
    for found in gradients.values():
        for kept, recomputed in zip(found[:2], found[2:], strict=True):   # the heads' are single precision
            assert kept.abs().max() > 0 and (kept - recomputed).abs().max() < 1e-6 * kept.abs().max()


# Heads inside a forward.

def by_hand(scene: Scene, router: Router, ids: Tensor, mask: Tensor, blend: bool) -> list[Tensor]:
    """What each level's head says, found one layer at a time from the hidden states of ever longer forwards."""
    said: list[Tensor] = []
    for level in range(LAYERS):
        with torch.no_grad(), chosen_by_hand(scene, said, blend):
            entering = scene.model(ids, output_hidden_states=True).hidden_states[level]
        standard = (mean_pool(entering, mask) - router.mean_LD[level]) / router.scale_LD[level]
        said.append(standard @ router.weight_LCD[level].T + router.bias_LC[level])
    return said


class chosen_by_hand:
    """Inside, layer l uses the experts that `said[l]` names, and the base alone where nothing is said yet."""

    def __init__(self, scene: Scene, said: list[Tensor], blend: bool) -> None:
        self.scene, self.said, self.blend = scene, said, blend

    def __enter__(self) -> None:
        def choose(level: int) -> None:
            if level >= len(self.said):
                self.scene.stack.select(None)
            elif self.blend:
                self.scene.stack.blend(self.said[level].softmax(-1))
            else:
                self.scene.stack.select(self.said[level].argmax(-1))

        self.hooks = [layer.register_forward_pre_hook(lambda *_, level=level: choose(level))
                      for level, layer in enumerate(decoder_layers(self.scene.model))]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        self.scene.stack.select(None)


def unsure(scene: Scene) -> Router:
    """Heads of random numbers, which choose differently layer by layer."""
    generator = torch.Generator().manual_seed(3)
    scene.router.weight_LCD = torch.randn(scene.router.weight_LCD.shape, generator=generator)
    return scene.router


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("use", ["choose", "blend"])
def test_one_forward_chooses_as_layer_by_layer(architecture: str, use: Use) -> None:
    scene = Scene(architecture, spread=0.5)
    router, batch = unsure(scene), scene.batch()
    mask = prompt_mask(batch)
    said = by_hand(scene, router, batch.ids, mask, use == "blend")
    with torch.no_grad():
        with chosen_by_hand(scene, said, use == "blend"):
            manual = scene.model(batch.ids).logits
        with layer_routing(scene.model, scene.stack, Heads(router), mask, use) as logits:
            ours = scene.model(batch.ids).logits
        scene.stack.select(None)
        plain = scene.model(batch.ids).logits
    assert torch.stack(said).argmax(-1).unique(dim=0).shape[0] > 1   # not one expert through all layers
    assert torch.allclose(torch.stack(logits), torch.stack(said), rtol=1e-4, atol=1e-4)
    assert (ours - manual).abs().max() < (1e-9 if use == "choose" else 1e-5) < (ours - plain).abs().max()
    assert not hooks(scene.model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("stream", "use"), [("experts", "choose"), ("blend", "blend")])
def test_the_router_reads_what_the_heads_read_and_neither_sees_the_answer(architecture: str, stream: str,
                                                                          use: Use) -> None:
    scene = Scene(architecture, stream=stream, spread=0.5)
    router, rows = unsure(scene), [row for rows in scene.validation for row in rows]
    seen = router.logits(features(scene.model, prompts_of(rows), choose=layer_selector(scene.stack, router)))
    scene.stack.select(None)
    others = [Encoded(row.ids[:row.question_tokens] + [7] * 3, row.targets) for row in rows]
    for content in (rows, others):
        batch = collate([(0, row) for row in content])
        with torch.no_grad(), layer_routing(scene.model, scene.stack, Heads(router), prompt_mask(batch), use) as logits:
            scene.model(batch.ids)
        assert torch.allclose(torch.stack(logits, 1), seen, rtol=1e-4, atol=1e-4)
    scene.stack.select(None)
    alone = router.logits(features(scene.model, prompts_of(rows)))
    assert torch.allclose(alone[:, 0], seen[:, 0]) and not torch.allclose(alone[:, 1:], seen[:, 1:], atol=1e-2)


def test_a_router_of_the_base_chooses_nothing_on_the_way() -> None:
    scene = Scene(stream="base")
    assert layer_selector(scene.stack, scene.router) is None


@pytest.mark.parametrize("use", ["choose", "blend"])
def test_what_the_prompt_chose_holds_while_decoding(use: Use) -> None:
    scene = Scene(spread=0.5)
    router, ids = unsure(scene), torch.tensor([row.ids[:7] for rows in scene.rows for row in rows[:2]])
    mask = torch.ones(6, 4, dtype=torch.bool)
    said = by_hand(scene, router, ids[:, :4], mask, use == "blend")
    with torch.no_grad():
        with chosen_by_hand(scene, said, use == "blend"):
            whole = scene.model(ids).logits
        with layer_routing(scene.model, scene.stack, Heads(router), mask, use) as logits:
            cache = scene.model(ids[:, :4], use_cache=True).past_key_values
            steps = [scene.model(ids[:, t:t + 1], past_key_values=cache, use_cache=True).logits for t in range(4, 7)]
    assert len(logits) == LAYERS
    assert (torch.cat(steps, 1) - whole[:, 4:]).abs().max() < (1e-9 if use == "choose" else 1e-5)


def test_the_mask_is_the_prompt_before_the_last_answer() -> None:
    rows = [Encoded([1, 2, 3, 4], [False, False, True, True]),
            Encoded([1, 2, 3, 4, 5, 6], [False, True, False, False, True, True])]   # two turns
    mask = prompt_mask(collate([(0, row) for row in rows]))
    assert mask.tolist() == [[True] * 2 + [False] * 4, [True] * 4 + [False] * 2]

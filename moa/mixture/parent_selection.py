"""Selection of the expert that a new domain's training starts from: few experts, tried on few rows of the new corpus.

The mixture's router names the candidates: the experts that it would send the new domain's prompts to. So the cost does
not grow with the number of experts. The base alone is tried as well: an expert must have a lower loss than it, else the
training starts afresh. `moa.workspace.warm_starts` records the choice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base, load, pick_device
from moa.base.pin import BasePin
from moa.core import digests
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.experts import warm_start

if TYPE_CHECKING:
    from moa.experts.lora import ExpertStack
    from moa.mixture.router import Router

TOKENS = 2048   # padded tokens in one forward without gradients


def candidates(workspace: Workspace, config: Config, domain: str) -> dict[str, Any]:
    """The experts tried as parents of `domain`, each one's loss (nats per completion token, over the same validation
    rows), and the choice with its reason.

    `shortlisted_by` is the router's mean probability for the domain's prompts, null without a mixture. An expert is
    chosen if it saves at least `adapt.candidate_gain` of the base's loss. Raises ArtifactError without a corpus.
    """
    config.require_domain(domain)
    adapt = config.adapt
    validation = corpus.read(workspace.corpus(domain), "validation")[:adapt.candidate_rows]
    found: dict[str, Any] = {"domain": domain, "rows": len(validation), "table": [], "chosen": None}
    others = sorted(name for name in config.domains
                    if name != domain and (workspace.expert(name) / MANIFEST).is_file())
    if not (adapt.candidates and others):
        why = "There is no other expert" if adapt.candidates else "adapt.candidates is 0"
        return found | {"reason": f"{why}: the training begins afresh."}
    base = load(workspace, config.base, pick_device(config.execution.devices))
    encoder = ChatEncoder(base.tokenizer, config.prompt.system, config.prompt.max_tokens)
    similar = _similarity(workspace, base, [encoder.prompt(row.prompt)[-encoder.max_tokens:] for row in validation])
    if similar is not None:
        others = sorted((name for name in others if name in similar), key=lambda name: -similar[name])
    stack, tried = _stack(workspace, config, base, others)
    measured = losses(base, stack, len(tried), [encoder.row(row.messages) for row in validation])
    stack.remove()
    found["table"] = [{"parent": name, "loss": loss, "shortlisted_by": similar[name] if name and similar else None}
                      for name, loss in zip([None, *tried], measured, strict=True)]
    return found | choose(found["table"], adapt.candidate_gain)


def _similarity(workspace: Workspace, base: Base, prompts: Sequence[list[int]]) -> dict[str, float] | None:
    """Mean probability that the mixture's router gives each domain, over prompts; None without a mixture.

    After joint training the heads read the base under experts; here they read the base alone, which is near enough for
    a shortlist, and spares loading every expert.
    """
    from moa.mixture.router import features

    if (router := _router(workspace, base.pin)) is None:
        return None
    mean_C = router.probabilities(features(base.model, prompts, router.depth)).mean(0)
    return dict(zip(router.labels, mean_C.tolist(), strict=True))


def _router(workspace: Workspace, base: BasePin) -> "Router | None":
    """The mixture's router alone: its experts need not be read. None where it is missing, damaged, or another base's;
    the next `assemble` makes it anew."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from moa.mixture.artifact import ROUTER
    from moa.mixture.router import Router

    path = workspace.mixture / ROUTER
    try:
        manifest = read_json(workspace.mixture / MANIFEST)
        if manifest["base"]["digest"] != base.digest or digests.of_file(path) != manifest["router"]["digest"]:
            return None
        return Router.restore(manifest["labels"], load_file(path), manifest["router"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _stack(workspace: Workspace, config: Config, base: Base, names: Sequence[str]) -> tuple["ExpertStack", list[str]]:
    """The first experts that a training could begin at, `adapt.candidates` at most, on the base; and their names."""
    from moa.experts import peft_format
    from moa.experts.lora import ExpertStack, LoraSpec

    train = config.train
    wanted = LoraSpec(train.rank, train.alpha, train.rslora)
    stack = ExpertStack(base.model, [wanted] * config.adapt.candidates, train.targets)
    tried: list[str] = []
    for name in names:
        if len(tried) < len(stack) and warm_start.misfit(workspace.expert(name), stack, wanted, base.pin) is None:
            peft_format.load(stack, len(tried), workspace.expert(name))
            tried.append(name)
    return stack, tried


def losses(base: Base, stack: "ExpertStack", tried: int, content: Sequence[Encoded]) -> list[float]:
    """Mean loss over all completion tokens of the rows: of the base, then of each expert tried, in mixed batches."""
    import torch

    from moa.experts.batches import collate, microbatches, row_losses
    from moa.experts.lora import BASE_ONLY

    systems = [BASE_ONLY, *range(tried)]
    work = [(system, row) for system in systems for row in content]
    sums = dict.fromkeys(systems, 0.0)
    with torch.no_grad():
        for group in microbatches(work, TOKENS):
            batch = collate([work[index] for index in group], base.device.device)
            stack.select(batch.owners)
            for index, loss in zip(group, row_losses(base.model, batch).tolist(), strict=True):
                sums[work[index][0]] += loss
    stack.select(None)
    tokens = sum(sum(row.targets[1:]) for row in content)
    return [sums[system] / tokens for system in systems]


def choose(table: Sequence[Mapping[str, Any]], gain: float) -> dict[str, Any]:
    """The best expert, if it saves enough of the base's loss."""
    base, *others = table
    usable = [each for each in others if math.isfinite(each["loss"])]
    if not usable:
        return {"chosen": None, "reason": "No other expert has this base, rank, alpha and targets: "
                                          "the training begins afresh."}
    best = min(usable, key=lambda each: (each["loss"], each["parent"]))
    saved = (base["loss"] - best["loss"]) / base["loss"]
    what = (f"{best['parent']} is the best, {best['loss']:.3f} against the base's {base['loss']:.3f}: it saves "
            f"{saved:.1%} of the base's loss, and adapt.candidate_gain asks for {gain:.1%}")
    if saved < gain:
        return {"chosen": None, "reason": f"{what}, so the training begins afresh."}
    return {"chosen": best["parent"], "reason": f"{what}."}


def text(found: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    lines = [f"{'start':<24} {'loss':>8}  similarity"] if found["table"] else []
    for each in found["table"]:
        similar = "" if each["shortlisted_by"] is None else f"{each['shortlisted_by']:.3f}"
        lines.append(f"{each['parent'] or 'none (the base)':<24} {each['loss']:>8.3f}  {similar}".rstrip())
    if lines:
        lines += ["", f"Nats per completion token, over {found['rows']} validation rows of {found['domain']}."]
    return "\n".join([*lines, found["reason"]])

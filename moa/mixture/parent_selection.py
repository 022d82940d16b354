"""Selection of the parent expert from which the training of a new domain starts.

The mixture's router shortlists the experts to which it routes the new domain's prompts, so the cost does not grow with
the number of experts. Each candidate's loss is measured on some validation rows of the new domain. An expert becomes
the parent if its loss is sufficiently below that of the base without an expert, else the training starts afresh.
`moa.workspace.warm_starts` records the choice.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moa.base.device import pick_device
from moa.base.encoding import ChatEncoder, Encoded
from moa.base.load import Base, load
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

FORWARD_TOKENS = 2048   # most padded tokens in one forward without gradients


def candidates(workspace: Workspace, config: Config, domain: str) -> dict[str, Any]:
    """Measure candidates for the parent of `domain` and choose one, or none.

    An expert is chosen if its loss is lower than the base's by at least the share `adapt.candidate_gain` of it.

    Returns:
        `domain`, `rows` (number of validation rows), `table`, `chosen` (a domain or None) and `reason` (a sentence).
        `table` has an entry for the base, whose `parent` is None, and for each candidate: its `loss` in nats per
        completion token, and `shortlisted_by`, the router's mean probability for it, None without a mixture.

    Raises:
        ConfigError: the domain is not configured.
        ArtifactError: the domain has no prepared corpus.
    """
    config.require_domain(domain)
    adapt = config.adapt
    validation = corpus.read(workspace.corpus(domain), "validation")[:adapt.candidate_rows]
    report: dict[str, Any] = {"domain": domain, "rows": len(validation), "table": [], "chosen": None}
    others = sorted(name for name in config.domains
                    if name != domain and (workspace.expert(name) / MANIFEST).is_file())
    if not (adapt.candidates and others):
        cause = "There is no other expert" if adapt.candidates else "adapt.candidates is 0"
        return report | {"reason": f"{cause}: the training begins afresh."}
    base = load(workspace, config.base, pick_device(config.execution.devices))
    encoder = ChatEncoder(base.tokenizer, config.prompt.system, config.prompt.max_tokens)
    similar = _similarity(workspace, base, [encoder.prompt(row.prompt)[-encoder.max_tokens:] for row in validation])
    if similar is not None:
        others = sorted((name for name in others if name in similar), key=lambda name: -similar[name])
    stack, tried = _stack_candidates(workspace, config, base, others)
    measured = losses(base, stack, len(tried), [encoder.row(row.messages) for row in validation])
    stack.remove()
    report["table"] = [{"parent": name, "loss": loss, "shortlisted_by": similar[name] if name and similar else None}
                       for name, loss in zip([None, *tried], measured, strict=True)]
    return report | choose(report["table"], adapt.candidate_gain)


def _similarity(workspace: Workspace, base: Base, prompts: Sequence[list[int]]) -> dict[str, float] | None:
    """The router's mean probability of each domain over prompts in token ids; None without a mixture.

    A jointly trained router reads hidden states that experts have changed. Here it reads those of the base alone, which
    spares loading every expert and is exact enough for a shortlist.
    """
    from moa.mixture.router import features

    if (router := _router(workspace, base.pin)) is None:
        return None
    mean_C = router.probabilities(features(base.model, prompts, router.depth)).mean(0)
    return dict(zip(router.labels, mean_C.tolist(), strict=True))


def _router(workspace: Workspace, base: BasePin) -> "Router | None":
    """The mixture's router, without reading the experts. None where it is missing, damaged or of another base: the next
    `moa assemble` replaces it."""
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


def _stack_candidates(workspace: Workspace, config: Config, base: Base,
                      names: Sequence[str]) -> tuple["ExpertStack", list[str]]:
    """A stack on the base with the first of the named experts that training can start from, and their names.

    There are at most `adapt.candidates` of them.
    """
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
    """Mean loss in nats per completion token of the base, then of the stack's first `tried` experts, over `content`."""
    import torch

    from moa.experts.batches import collate, microbatches, row_losses
    from moa.experts.lora import BASE_ONLY

    systems = [BASE_ONLY, *range(tried)]
    work = [(system, row) for system in systems for row in content]
    sums = dict.fromkeys(systems, 0.0)
    with torch.no_grad():
        for group in microbatches(work, FORWARD_TOKENS):
            batch = collate([work[index] for index in group], base.device.device)
            stack.select(batch.owners)
            for index, loss in zip(group, row_losses(base.model, batch).tolist(), strict=True):
                sums[work[index][0]] += loss
    stack.select(None)
    tokens = sum(sum(row.targets[1:]) for row in content)
    return [sums[system] / tokens for system in systems]


def choose(table: Sequence[Mapping[str, Any]], gain: float) -> dict[str, Any]:
    """Choose the candidate with the lowest loss, if that is below the base's by at least the share `gain`.

    Args:
        table: entries with `parent` and `loss`, as in `candidates`; the first is the base's.
        gain: the least share of the base's loss that the parent must save.

    Returns:
        `chosen`, a domain or None, and `reason`, a sentence.
    """
    base, *others = table
    usable = [entry for entry in others if math.isfinite(entry["loss"])]
    if not usable:
        return {"chosen": None, "reason": "No other expert has this base, rank, alpha and targets: "
                                          "the training begins afresh."}
    best = min(usable, key=lambda entry: (entry["loss"], entry["parent"]))   # ties go to the first name
    saved = (base["loss"] - best["loss"]) / base["loss"]
    comparison = (f"{best['parent']} is the best, {best['loss']:.3f} against the base's {base['loss']:.3f}: it saves "
                  f"{saved:.1%} of the base's loss, and adapt.candidate_gain asks for {gain:.1%}")
    if saved < gain:
        return {"chosen": None, "reason": f"{comparison}, so the training begins afresh."}
    return {"chosen": best["parent"], "reason": f"{comparison}."}


def text(report: Mapping[str, Any]) -> str:
    """The result of `candidates` as a table for a terminal."""
    lines = [f"{'start':<24} {'loss':>8}  similarity"] if report["table"] else []
    for entry in report["table"]:
        similar = "" if entry["shortlisted_by"] is None else f"{entry['shortlisted_by']:.3f}"
        lines.append(f"{entry['parent'] or 'none (the base)':<24} {entry['loss']:>8.3f}  {similar}".rstrip())
    if lines:
        lines += ["", f"Nats per completion token, over {report['rows']} validation rows of {report['domain']}."]
    return "\n".join([*lines, report["reason"]])

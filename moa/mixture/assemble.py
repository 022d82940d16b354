"""The stage `assemble`: experts and a router to one mixture, pinned by digest.

    data/mixture/    what `moa.mixture.artifact` says
    data/champion/   read only: the calibration that this one extends (`moa.mixture.incumbent`)
    .moa/cache/features/    router features by digest of what they come from, never recomputed for an old domain
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moa.base.device import pick_device
from moa.base.encoding import ChatEncoder
from moa.base.load import Base, load
from moa.base.pin import pin
from moa.core import code_version, digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, TrainingError
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.data.corpus import Row
from moa.mixture import artifact, incumbent
from moa.mixture.background import BACKGROUND

if TYPE_CHECKING:
    from moa.mixture.calibration import Prompts

Part = Literal["train", "validation", "further"]   # heads, level and temperature, thresholds
Content = dict[Part, dict[str, list[Row]]]         # the router's rows, by domain
LEARNING: tuple[Literal["train"], Literal["validation"]] = ("train", "validation")
# Groups that a domain's threshold rests on. 299 groups can promise 1 %, 473 the same with one prompt left to the base;
# each costs a quarter of a prefill, once.
PROMISING = 480


def assemble(workspace: Workspace, config: Config) -> dict[str, Any]:
    """Train the router, after joint training if asked for, and write `data/mixture`; returns its manifest.

    Raises ArtifactError when an expert is missing or was trained on another base.
    """
    from moa.mixture.calibration import choose_level, complete, successor, train_heads

    labels = sorted(config.domains)
    params = config.assemble
    facts = {domain: {key: manifest[key] for key in ("digest", "corpus", "rank")}
             for domain, manifest in ((domain, _expert(workspace, domain)) for domain in labels)}
    folders = {domain: workspace.expert(domain) for domain in labels}
    base = load(workspace, config.base, pick_device(config.execution.devices))
    encoder = ChatEncoder(base.tokenizer, config.prompt.system, config.prompt.max_tokens)
    content = _content(workspace, labels, params.rows)
    features = _FrozenFeatures(workspace, base, encoder)
    prompts: dict[Part, Prompts] = {part: features.prompts(content[part]) for part in LEARNING}
    champion, unfit = incumbent.calibration(workspace, config, base.pin)
    if unfit:
        print(f"The router is calibrated afresh, and not as the champion's successor: {unfit}.")
    background = features.background()
    grows = champion is not None and not set(labels).isdisjoint(champion.labels)
    router = (successor(champion, labels) if champion is not None and grows else
              train_heads(labels, prompts["train"], background))
    further: Callable[[slice], Prompts] = partial(features.prompts, content["further"])
    with tempfile.TemporaryDirectory() as temporary:
        if params.joint_epochs:
            folders, facts, seen, background = _joined(workspace, config, base, encoder, router, content, facts,
                                                       Path(temporary))
            prompts = {part: _labelled(content[part], seen[part]) for part in LEARNING}
            further = _labelled(content["further"], seen["further"]).at
        if not grows:
            choose_level(router, params.rule, params.tolerance, prompts["validation"])
        complete(router, prompts["train"], prompts["validation"], further, params.max_abstention,
                 champion if grows else None, background)
        router.figures |= {"extends": incumbent.extended(workspace), "settings": incumbent.settings(params)}
        with replace_directory(workspace.mixture) as folder:
            return artifact.write(folder, base=base.pin, prompt=config.prompt.model_dump(), router=router,
                                  experts=folders, facts=facts)


def _expert(workspace: Workspace, domain: str) -> dict[str, Any]:
    folder, again = workspace.expert(domain), f"run `moa train --domain {domain}"
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"Domain {domain!r} has no expert: {again}` first.")
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    base = pin(workspace)
    if other := [part for part in ("weights", "tokenizer", "template")
                 if manifest["base"][part] != getattr(base, part)]:
        raise ArtifactError(f"The expert of {domain!r} was trained on {manifest['base']['source']}, and the "
                            f"{' and '.join(other)} of this workspace's base ({base.source}) differ: {again}`.")
    if digests.of_expert(folder) != manifest["digest"]:
        raise ArtifactError(f"The expert of {domain!r} is not the one its manifest names: {again} --fresh`.")
    return manifest


# What the router sees.

def _content(workspace: Workspace, labels: Sequence[str], rows: int) -> Content:
    """The router's rows. They are ordered by their digests, so that the first ones are a random sample.

    `further` has a row of each other group, until it and the validation rows have PROMISING groups.
    """
    content: Content = {"train": {}, "validation": {}, "further": {}}
    for domain in labels:
        train, validation = (corpus.read(workspace.corpus(domain), split) for split in LEARNING)
        content["train"][domain], content["validation"][domain] = train[:rows], validation
        held, known = ({row.group or row.id for row in part} for part in (validation, train[:rows]))
        others = {row.group or row.id: row for row in reversed(train[rows:])}   # the first row of each group
        fresh = [row for group, row in reversed(others.items()) if group not in held | known]
        content["further"][domain] = fresh[:max(PROMISING - len(held), 0)]
    return content


def _labelled(content: Mapping[str, list[Row]], features: Any) -> "Prompts":
    """Rows with the number of each one's domain and with their features, (N, L, D)."""
    import torch

    from moa.mixture.calibration import Prompts

    numbers = [label for label, rows in enumerate(content.values()) for _ in rows]
    return Prompts(features, torch.tensor(numbers, dtype=torch.long),
                   [row.group or row.id for rows in content.values() for row in rows])


def _encoded(encoder: ChatEncoder, content: list[Row]) -> list[list[int]]:
    return [encoder.prompt(row.prompt)[-encoder.max_tokens:] for row in content]


def _encoded_texts(encoder: ChatEncoder, texts: Sequence[str]) -> list[list[int]]:
    return [encoder.prompt([{"role": "user", "content": text}])[-encoder.max_tokens:] for text in texts]


@dataclass(frozen=True)
class _FrozenFeatures:
    """Features of prompts under the base alone, from the cache when they were computed before."""

    workspace: Workspace
    base: Base
    encoder: ChatEncoder

    def prompts(self, content: Mapping[str, list[Row]], levels: slice | None = None) -> "Prompts":
        """The rows of each domain with their features of some levels; None = of all."""
        import torch

        from moa.core.progress import track

        found = []
        with track("router features", total=len(content), unit="domains") as bar:
            for rows in content.values():
                found.append(self._cached(_encoded(self.encoder, rows), levels or slice(0, self._levels)))
                bar.advance(1)
        return _labelled(content, torch.cat(found))

    def background(self) -> Any:
        """The features of the prompts of no domain: (B, L, D)."""
        return self._cached(_encoded_texts(self.encoder, BACKGROUND), slice(0, self._levels))

    @property
    def _levels(self) -> int:
        return int(self.base.model.config.num_hidden_layers)

    def _cached(self, prompts: list[list[int]], levels: slice) -> Any:
        """The features of some prompts' tokens, (N, L, D)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        from moa.mixture.router import features

        if not prompts:
            return features(self.base.model, [], levels.stop)[:, levels]
        key = digests.of_json({"base": self.base.pin.digest, "dtype": self.base.device.dtype,
                               "code": code_version.of_modules("moa.mixture.router"),
                               "levels": [levels.start, levels.stop], "prompts": prompts})
        path = self.workspace.cache / "features" / f"{key[:32]}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):   # absent or damaged: it can be computed again
            return load_file(path)["features"]
        result = features(self.base.model, prompts, levels.stop)[:, levels].contiguous()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features": result}, temporary)
        temporary.replace(path)
        return result


# Joint training.

def _joined(workspace: Workspace, config: Config, base: Base, encoder: ChatEncoder, router: Any, content: Content,
            facts: dict[str, dict[str, Any]], temporary: Path) -> tuple[
                dict[str, Path], dict[str, dict[str, Any]], dict[Part, Any], Any]:
    """Continue all experts together with the router's heads.

    Returns directories and facts of the new experts, features by part, and those of the prompts of no domain.

    The experts as they were stay where they are: the mixture gets its own, and names their parents.
    """
    from moa.core.progress import track
    from moa.experts import peft_format
    from moa.experts.cotraining import Learner, recomputing, seed_for
    from moa.experts.lora import ExpertStack
    from moa.mixture.joint_training import forget_labels, train_jointly
    from moa.mixture.layer_routing import layer_selector
    from moa.mixture.router import features

    labels, params = list(facts), config.assemble
    specs = [peft_format.read_spec(workspace.expert(domain)) for domain in labels]
    stack = ExpertStack(base.model, specs, config.train.targets)
    train = config.train.model_copy(update={"epochs": params.joint_epochs,
                                            "learning_rate": params.joint_learning_rate})
    learners = []
    for expert, domain in enumerate(labels):
        if params.joint_start == "experts":
            peft_format.load(stack, expert, workspace.expert(domain))
        else:
            stack.initialise(expert, seed_for(domain, train.seed))
    stack.trainable(True)
    for expert, domain in enumerate(labels):
        training, validation = ([encoder.row(row.messages) for row in corpus.read(workspace.corpus(domain), split)]
                                for split in LEARNING)
        learners.append(Learner(domain, expert, stack, training, validation, train))
    if not params.eta:
        forget_labels(router)
    steps = sum(len(learner.order) for learner in learners)
    with track("joint training", total=steps, unit="steps") as bar, recomputing(base.model, train.recompute):
        train_jointly(base.model, stack, router, learners, train, params.eta,
                      lambda active: bar.advance(len(active)), keep_start=params.joint_start == "experts")
    if failed := {learner.name: learner.progress.failure for learner in learners if learner.progress.failure}:
        raise TrainingError(f"Joint training failed for {', '.join(failed)} ({'; '.join(map(str, failed.values()))}): "
                            "lower assemble.joint_learning_rate.")
    stack.trainable(False)
    seen = {part: features(base.model, _encoded(encoder, [row for rows in domains.values() for row in rows]),
                           choose=layer_selector(stack, router)) for part, domains in content.items()}
    background = features(base.model, _encoded_texts(encoder, BACKGROUND), choose=layer_selector(stack, router))
    folders, joined = {}, {}
    for learner in learners:
        domain, at = learner.name, learner.progress
        folders[domain] = temporary / domain
        peft_format.save(stack, learner.expert, folders[domain], base.pin.source)
        news = {"digest": digests.of_expert(folders[domain]), "parent": facts[domain]["digest"]}
        joined[domain] = facts[domain] | news
        alone = {key: value for key, value in read_json(workspace.expert(domain) / MANIFEST).items()
                 if key != "fingerprint"}
        write_json(folders[domain] / MANIFEST, alone | news | {
            "joint": params.model_dump(), "best_epoch": at.best_epoch, "best_loss": at.best_loss, "curve": at.curve})
    stack.remove()
    return folders, joined, seen, background

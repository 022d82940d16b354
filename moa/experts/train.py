"""The stage `train`: trains one expert on the corpus of each domain. An interrupted training resumes.

    data/experts/NAME/    adapter_config.json, adapter_model.safetensors, manifest.json (written last)
    .moa/training/        checkpoints of unfinished trainings, one file per process, replaced atomically
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa.base.device import pick_device
from moa.base.encoding import ChatEncoder
from moa.base.load import load
from moa.base.pin import BasePin, pin
from moa.core import code_version, digests
from moa.core.config import Config, TrainParams
from moa.core.errors import TrainingError
from moa.core.files import read_json, replace_directory, write_json
from moa.core.paths import MANIFEST, Workspace
from moa.data import corpus
from moa.experts import warm_start

CHECKPOINT_SECONDS = 20.0   # between two checkpoints


def fingerprint(workspace: Workspace, config: Config, domain: str) -> str:
    """Digest of all inputs of a domain's training: corpus, base, parent, parameters and code."""
    start = warm_start.read(workspace).get(domain)
    return digests.of_json({
        "domain": domain, "start": asdict(start) if start else None, "base": pin(workspace).digest,
        "corpus": corpus_digest(workspace, domain), "prompt": config.prompt.model_dump(),
        "train": config.train.model_dump(), "code": code_version.digest("train")})


def corpus_digest(workspace: Workspace, domain: str) -> str:
    """Digest of a domain's prepared corpus. Raises TrainingError without one."""
    path = workspace.corpus(domain) / MANIFEST
    if not path.is_file():
        raise TrainingError(f"Domain {domain!r} has no prepared corpus: run `moa prepare --domain {domain}` first.")
    digest: str = read_json(path)["digest"]
    return digest


def finished(workspace: Workspace, config: Config, domain: str) -> bool:
    """Whether the domain's expert on disk was trained on the current inputs (`fingerprint`)."""
    path = workspace.expert(domain) / MANIFEST
    return path.is_file() and read_json(path).get("fingerprint") == fingerprint(workspace, config, domain)


def train(workspace: Workspace, config: Config, domains: Sequence[str], fresh: bool = False) -> None:
    """Co-train the experts of `domains` on one copy of the base, and write them.

    Experts that were trained on the current inputs are skipped, and unfinished trainings resume from their checkpoint.
    With `fresh`, all are trained from the beginning.

    Raises:
        ConfigError: a domain is not configured.
        ArtifactError: the files of a parent expert are missing or changed.
        TrainingError: a corpus is missing, or the training of an expert failed; the message names the experts, and the
            others have been written.
    """
    for domain in domains:
        config.require_domain(domain)
    prints = {domain: fingerprint(workspace, config, domain) for domain in domains}
    todo = [domain for domain in domains if fresh or not finished(workspace, config, domain)]
    if not todo:
        return
    starts = {domain: start for domain, start in warm_start.read(workspace).items() if domain in todo}
    for start in starts.values():
        warm_start.folder(workspace, start)   # raises for a missing parent before the base is loaded
    from moa.core.progress import track
    from moa.experts.cotraining import cotrain, recomputing
    from moa.experts.lora import ExpertStack, LoraSpec

    device = pick_device(config.execution.devices)
    base = load(workspace, config.base, device)
    encoder = ChatEncoder(base.tokenizer, config.prompt.system, config.prompt.max_tokens)
    params = config.train
    specs = [LoraSpec(params.rank, params.alpha, params.rslora)] * len(todo)
    stack = ExpertStack(base.model, specs, params.targets).trainable(True)
    parents = {domain: _initialise(workspace, stack, expert, domain, starts.get(domain), config, base.pin)
               for expert, domain in enumerate(todo)}
    learners = [_learner(workspace, stack, expert, domain, encoder, params, bool(parents[domain]["parent"]))
                for expert, domain in enumerate(todo)]
    checkpoint = Checkpoint(workspace, prints)
    if not fresh:
        checkpoint.restore(learners)

    total = sum(len(learner.order) for learner in learners)
    done = sum(learner.progress.step for learner in learners)
    started, seen_before = time.monotonic(), sum(learner.progress.seen_tokens for learner in learners)
    with track("train " + ", ".join(todo), total=total, unit="steps") as bar:
        bar.advance(done)

        def after_step(active: Sequence[Any]) -> None:
            bar.advance(len(active), note=_note(active))
            checkpoint.save_now_and_then(learners)

        with recomputing(base.model, params.recompute):
            cotrain(base.model, stack, learners, params.batch_tokens, after_step)
    checkpoint.save(learners)   # if writing the experts is interrupted, none has to be trained again
    _record_rate(workspace, sum(learner.progress.seen_tokens for learner in learners) - seen_before,
                 time.monotonic() - started)
    for learner in learners:
        if learner.progress.failure is None:
            _write(workspace, config, learner, stack, base.pin,
                   {**parents[learner.name], "fingerprint": prints[learner.name]})
    checkpoint.clear()
    if failed := {learner.name: learner.progress.failure for learner in learners if learner.progress.failure}:
        detail = "; ".join(f"{name}: {failure}" for name, failure in failed.items())
        raise TrainingError(f"No expert for {', '.join(failed)} ({detail}). Lower train.learning_rate, or look at its "
                            "longest and strangest rows; the other experts are done.")


def _initialise(workspace: Workspace, stack: Any, expert: int, domain: str, start: warm_start.InitialExpert | None,
                config: Config, base: BasePin) -> dict[str, Any]:
    """Set an expert's initial weights. Returns the fields of its manifest that record them."""
    from moa.experts import peft_format
    from moa.experts.cotraining import seed_for

    reason = None
    if start is not None:
        folder = warm_start.folder(workspace, start)
        reason = warm_start.misfit(folder, stack, stack.specs[expert], base)
        if reason is None:
            peft_format.load(stack, expert, folder)
            return {"parent": asdict(start)}
        print(f"train {domain}: afresh, not from the expert of {start.domain} ({start.digest[:12]}): {reason}.",
              file=sys.stderr)
    stack.initialise(expert, seed_for(domain, config.train.seed))
    return {"parent": None, **({"parent_refused": reason} if reason else {})}


def _learner(workspace: Workspace, stack: Any, expert: int, domain: str, encoder: ChatEncoder, params: TrainParams,
             warm: bool) -> Any:
    """The learner of a domain's expert on its corpus; `warm` if the expert has a parent's weights."""
    from moa.experts.cotraining import Learner

    encoded = {split: [encoder.row(row.messages) for row in corpus.read(workspace.corpus(domain), split)]
               for split in ("train", "validation")}
    if warm:
        params = params.model_copy(update={"patience": params.warm_patience})
    return Learner(domain, expert, stack, encoded["train"], encoded["validation"], params, warm=warm)


def _note(active: Sequence[Any]) -> str:
    """Mean training loss so far in this epoch, by domain."""
    return " ".join(f"{learner.name} {learner.progress.epoch_loss / learner.progress.epoch_tokens:.2f}"
                    for learner in active if learner.progress.epoch_tokens)


def _write(workspace: Workspace, config: Config, learner: Any, stack: Any, base: BasePin,
           more: dict[str, Any]) -> None:
    """Write a learner's expert, with the fields `more` in its manifest."""
    from moa.experts import peft_format

    progress = learner.progress
    with replace_directory(workspace.expert(learner.name)) as directory:
        peft_format.save(stack, learner.expert, directory, base.source)
        write_json(directory / MANIFEST, {
            "kind": "expert", "domain": learner.name,
            "digest": digests.of_files(sorted(directory.iterdir()), directory),
            "base": asdict(base), "corpus": corpus_digest(workspace, learner.name),
            "rank": config.train.rank, "alpha": config.train.alpha,
            "targets": sorted({name.rsplit(".", 1)[-1] for name in stack.layers}),
            "train": config.train.model_dump(), "prompt": config.prompt.model_dump(),
            "best_epoch": progress.best_epoch, "best_loss": progress.best_loss, "curve": progress.curve, **more})


def _record_rate(workspace: Workspace, tokens: int, seconds: float) -> None:
    """Record the speed in tokens per second, from which `moa plan` estimates durations."""
    path = workspace.cache / "rates.json"
    rates: dict[str, float] = {}
    with suppress(OSError, ValueError):
        rates = read_json(path)
    if tokens:
        write_json(path, {**rates, "train": tokens / max(seconds, 1e-9)})


class Checkpoint:
    """The state of all learners of one process, in one file that is replaced atomically.

    `restore` searches the files of all processes for each learner's name and fingerprint. So a training resumes even if
    its learners were grouped differently before.

    Args:
        workspace: its folder `.moa/training` has the files.
        prints: fingerprint of each learner, by name.
    """

    def __init__(self, workspace: Workspace, prints: dict[str, str]) -> None:
        self.folder = workspace.local / "training"
        self.prints = prints
        self.path = self.folder / f"{digests.of_json(prints)[:16]}.safetensors"
        self.last = time.monotonic()

    def save_now_and_then(self, learners: Sequence[Any]) -> None:
        """Save, unless the last save was less than `CHECKPOINT_SECONDS` ago."""
        if time.monotonic() - self.last >= CHECKPOINT_SECONDS:
            self.save(learners)

    def save(self, learners: Sequence[Any]) -> None:
        """Write the state of the learners."""
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{learner.name}/{key}": value.cpu().contiguous().clone()
                   for learner in learners for key, value in learner.tensors().items()}
        meta = {learner.name: {"fingerprint": self.prints[learner.name], "progress": asdict(learner.progress)}
                for learner in learners}
        temporary = self.path.with_suffix(".tmp")   # no other process writes it: the name is of these learners
        save_file(tensors, temporary, metadata={"learners": json.dumps(meta)})
        temporary.replace(self.path)
        self.last = time.monotonic()

    def restore(self, learners: Sequence[Any]) -> None:
        """Restore each learner to the latest state saved for its fingerprint; failed states are not restored."""
        from safetensors import safe_open

        from moa.experts.cotraining import Progress

        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(OSError, ValueError), safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("learners", "{}"))
                for learner in learners:
                    saved = meta.get(learner.name)
                    if (saved and saved["fingerprint"] == self.prints[learner.name]
                            and not saved["progress"]["failure"] and saved["progress"]["step"] > learner.progress.step):
                        prefix = f"{learner.name}/"
                        learner.restore(Progress(**saved["progress"]), {
                            key.removeprefix(prefix): file.get_tensor(key) for key in file.keys()  # noqa: SIM118 - no mapping

                            if key.startswith(prefix)})

    def clear(self) -> None:
        """Delete the checkpoints that are no longer needed once the experts of these learners are written.

        These are this process's file, and files of earlier processes that have no other learner.
        """
        self.path.with_suffix(".tmp").unlink(missing_ok=True)
        for path in self.folder.glob("*.safetensors"):
            if path == self.path or self._names(path) <= self.prints.keys():
                path.unlink(missing_ok=True)

    @staticmethod
    def _names(path: Path) -> set[str]:
        """Names of the learners in a checkpoint; empty if it cannot be read."""
        from safetensors import safe_open

        with suppress(OSError, ValueError), safe_open(path, framework="pt") as file:
            return set(json.loads((file.metadata() or {}).get("learners", "{}")))
        return set()

"""A mixture as a directory: its files, and the checks before they are used.

    experts/NAME/         PEFT directories as trained
    router.safetensors    the router's tensors
    manifest.json         base pin, prompt, labels, every digest, the router's scalars, its own digest (last)

With the base it can be loaded from any folder, offline.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ValidationError

from moa.base.pin import BasePin
from moa.core import digests
from moa.core.config import DomainName, PromptParams
from moa.core.errors import ArtifactError
from moa.core.files import read_json, write_json
from moa.core.paths import MANIFEST

if TYPE_CHECKING:
    from moa.mixture.router import Router

EXPERTS, ROUTER = "experts", "router.safetensors"
AGAIN = "run `moa assemble` again"


class _Base(BaseModel):
    source: str
    weights: str
    tokenizer: str
    template: str


class _Pinned(BaseModel):
    digest: str


class _Manifest(BaseModel):
    """What a manifest must have; it may have more. Labels are names, so none leads out of the directory."""

    kind: Literal["mixture"]
    base: _Base
    prompt: PromptParams
    labels: list[DomainName]
    experts: dict[str, _Pinned]
    router: _Pinned
    digest: str


def write(folder: Path, *, base: BasePin, prompt: Mapping[str, Any], router: "Router", experts: Mapping[str, Path],
          facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write a mixture into the empty `folder` and return its manifest.

    `experts` are the directories to copy, by label; `facts` is what the manifest says of each beside its digest. Raises
    ArtifactError when an expert is no longer the one whose digest `facts` names.
    """
    from safetensors.torch import save_file

    assert set(experts) == set(facts) == set(router.labels), "one expert a label"
    pinned = {}
    for label in router.labels:
        copied = folder / EXPERTS / label
        shutil.copytree(experts[label], copied)
        digest = digests.of_expert(copied)
        if facts[label].get("digest", digest) != digest:
            raise ArtifactError(f"The expert of {label!r} changed while the mixture was written: {AGAIN}.")
        pinned[label] = {"digest": digest, **facts[label]}
    save_file(router.tensors(), folder / ROUTER)
    manifest = {"kind": "mixture", "base": asdict(base), "prompt": dict(prompt), "labels": list(router.labels),
                "experts": pinned, "router": {"digest": digests.of_file(folder / ROUTER), **router.facts()}}
    manifest["digest"] = digests.of_json(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read(folder: Path, pin: BasePin, *, check: bool = True) -> tuple[dict[str, Any], "Router", dict[str, Path]]:
    """Manifest, router and the experts' directories by label, once everything is what the manifest says.

    Without `check`, the experts have to pass through `VerifiedExperts` before they are used. Raises ArtifactError when
    anything is missing, unreadable or changed, or made for another base, tokenizer or template than those of `pin`; the
    message says which.
    """
    manifest = _manifest(folder)
    if other := [part for part in ("weights", "tokenizer", "template") if manifest["base"][part] != getattr(pin, part)]:
        raise ArtifactError(f"The mixture was made for {manifest['base']['source']}, and the {' and '.join(other)} "
                            f"of this workspace's base ({pin.source}) differ.")
    router = folder / ROUTER
    with artifact_errors(f"The router in {folder}"):
        found = digests.of_file(router)
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if digests.of_json(content) != manifest["digest"] or found != manifest["router"]["digest"]:
        raise ArtifactError(f"The mixture in {folder} is not what its manifest says: its router or manifest changed; "
                            f"{AGAIN}.")
    checked = VerifiedExperts(folder, manifest)
    experts = {label: checked.expert(label) if check else checked.folder / label for label in manifest["labels"]}
    return manifest, _router(folder, manifest), experts


class VerifiedExperts:
    """The experts of a mixture. Each is compared with its digest before its first use, and again when its files' inode,
    size or times changed."""

    def __init__(self, mixture: Path, manifest: Mapping[str, Any]) -> None:
        self.mixture, self.folder, self.pinned = mixture, mixture / EXPERTS, manifest["experts"]
        self._known: dict[str, list[tuple[object, ...]]] = {}   # by label, the files that the digest was made of

    def expert(self, label: str) -> Path:
        """Directory of an expert whose digest is the pinned one. Raises ArtifactError otherwise."""
        expert = self.folder / label
        with artifact_errors(f"The expert {label!r} that the manifest in {self.mixture} pins"):
            files = _files(expert)
            if self._known.get(label) == files:
                return expert
            digest = digests.of_expert(expert)
        if digest != self.pinned[label]["digest"]:
            raise ArtifactError(f"The expert {label!r} in {self.mixture} is not the one its manifest pins.")
        self._known[label] = files
        return expert


def _files(folder: Path) -> list[tuple[object, ...]]:
    """Name, inode, size and times of every file that an expert's digest covers."""
    found = [(path, path.stat()) for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    return [(path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in found]


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no mixture: run `moa assemble` first.")
    with artifact_errors(str(path)):
        manifest: dict[str, Any] = read_json(path)
    try:
        checked = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise ArtifactError(f"{path} is no manifest of a mixture: {where}: {first['msg']}; {AGAIN}.") from None
    if sorted(checked.labels) != sorted(checked.experts) or not checked.labels:
        raise ArtifactError(f"{path} is no manifest of a mixture: its labels and its experts differ; {AGAIN}.")
    return manifest


def _router(folder: Path, manifest: dict[str, Any]) -> "Router":
    """The router, when its tensors fit each other, the labels and its scalars."""
    from safetensors.torch import load_file

    from moa.mixture.router import Router

    what = f"The router in {folder}"
    with artifact_errors(what):
        tensors = load_file(folder / ROUTER)
        router = Router.restore(manifest["labels"], tensors, manifest["router"])
        if all(tensor.isfinite().all() for tensor in tensors.values()) and _decides(router):
            return router
    raise ArtifactError(f"{what} does not fit its manifest: {AGAIN}.")


def _decides(router: "Router") -> bool:
    """Whether the scalars mean something and the heads fit them; the rest shows in one decision on nothing."""
    import torch

    from moa.mixture.router import Rule, Score, Stream

    L, C, D = (*router.weight_LCD.shape, 0, 0, 0)[:3]
    known = ((router.rule, Rule), (router.score, Score), (router.stream, Stream))
    shapes = [tuple(each.shape) for each in (router.mean_LD, router.scale_LD, router.bias_LC)]
    if not (all(value in get_args(kind) for value, kind in known) and 0 <= router.layer < L
            and len(router.labels) == C and shapes == [(L, D), (L, D), (L, C)] and router.temperature > 0):
        return False
    try:
        return router.decide(torch.zeros(1, router.depth, D))[0].domain in router.labels
    except (RuntimeError, AssertionError, IndexError):   # tensors of a score are missing, or of another width
        return False


@contextmanager
def artifact_errors(what: str) -> Iterator[None]:
    """Raise an ArtifactError about `what` in place of the errors of reading a file."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{what} is not there: {error.filename}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ArtifactError(f"{what} cannot be read: {type(error).__name__}: {first}") from None

"""The directory of a mixture: its files, their writing, and their verification against the manifest.

    experts/NAME/         PEFT directories as trained
    router.safetensors    the router's tensors
    manifest.json         base pin, prompt, labels, every digest, the router's scalars, its own digest (written last)

The directory can be moved, and loads offline. The base is not in it.
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
ASSEMBLE_AGAIN = "run `moa assemble` again"


class _ManifestBase(BaseModel):
    source: str
    weights: str
    tokenizer: str
    template: str


class _ManifestDigest(BaseModel):
    digest: str


class _Manifest(BaseModel):
    """Required fields of a manifest, which may have others. A label names a folder: `DomainName` admits no path."""

    kind: Literal["mixture"]
    base: _ManifestBase
    prompt: PromptParams
    labels: list[DomainName]
    experts: dict[str, _ManifestDigest]
    router: _ManifestDigest
    digest: str


def write(folder: Path, *, base: BasePin, prompt: Mapping[str, Any], router: "Router", experts: Mapping[str, Path],
          facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write a mixture into a folder and return its manifest.

    Args:
        folder: an empty directory.
        base: the pin of the base.
        prompt: the prompt's parameters (`PromptParams`) as a mapping.
        router: its labels are the experts' domains.
        experts: the directory of each expert, which is copied, by label.
        facts: further fields of each expert's entry in the manifest, by label.

    Raises:
        ArtifactError: an expert's files do not have the digest that `facts` has for them.
    """
    from safetensors.torch import save_file

    assert set(experts) == set(facts) == set(router.labels), "each label of the router needs one expert"
    entries = {}
    for label in router.labels:
        target = folder / EXPERTS / label
        shutil.copytree(experts[label], target)
        digest = digests.of_expert(target)
        if facts[label].get("digest", digest) != digest:
            raise ArtifactError(f"The expert of {label!r} changed while the mixture was written: {ASSEMBLE_AGAIN}.")
        entries[label] = {"digest": digest, **facts[label]}
    save_file(router.tensors(), folder / ROUTER)
    manifest = {"kind": "mixture", "base": asdict(base), "prompt": dict(prompt), "labels": list(router.labels),
                "experts": entries, "router": {"digest": digests.of_file(folder / ROUTER), **router.facts()}}
    manifest["digest"] = digests.of_json(manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def read(folder: Path, pin: BasePin, *, check: bool = True) -> tuple[dict[str, Any], "Router", dict[str, Path]]:
    """Read a mixture and verify it against its manifest.

    Args:
        folder: the mixture's directory.
        pin: the pin of the base that the mixture will be used with.
        check: whether to compare the experts with their digests. If not, verify each by `VerifiedExperts` before use.

    Returns:
        The manifest, the router, and the directory of each expert by label.

    Raises:
        ArtifactError: a file is missing, unreadable or changed, or the mixture was made for another base, tokenizer or
            chat template; the message says which.
    """
    manifest = _manifest(folder)
    parts = ("weights", "tokenizer", "template")
    if different := [part for part in parts if manifest["base"][part] != getattr(pin, part)]:
        raise ArtifactError(f"The mixture was made for {manifest['base']['source']}, and the {' and '.join(different)} "
                            f"of this workspace's base ({pin.source}) differ.")
    router = folder / ROUTER
    with artifact_errors(f"The router in {folder}"):
        router_digest = digests.of_file(router)
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if digests.of_json(content) != manifest["digest"] or router_digest != manifest["router"]["digest"]:
        raise ArtifactError(f"The mixture in {folder} is not what its manifest says: its router or manifest changed; "
                            f"{ASSEMBLE_AGAIN}.")
    verified = VerifiedExperts(folder, manifest)
    experts = {label: verified.expert(label) if check else verified.folder / label for label in manifest["labels"]}
    return manifest, _router(folder, manifest), experts


class VerifiedExperts:
    """Verifies the experts of a mixture when they are used.

    An expert's files are compared with its digest before the first use, and again whenever an inode, a size or a time
    of theirs has changed.

    Args:
        mixture: the mixture's directory.
        manifest: the mixture's manifest.
    """

    def __init__(self, mixture: Path, manifest: Mapping[str, Any]) -> None:
        self.mixture, self.folder, self.pinned = mixture, mixture / EXPERTS, manifest["experts"]
        self._verified: dict[str, list[tuple[object, ...]]] = {}   # `_files` of each verified expert, by label

    def expert(self, label: str) -> Path:
        """Directory of the expert of a label. Raises ArtifactError when its files do not have the manifest's digest."""
        expert = self.folder / label
        with artifact_errors(f"The expert {label!r} that the manifest in {self.mixture} pins"):
            files = _files(expert)
            if self._verified.get(label) == files:
                return expert
            digest = digests.of_expert(expert)
        if digest != self.pinned[label]["digest"]:
            raise ArtifactError(f"The expert {label!r} in {self.mixture} is not the one its manifest pins.")
        self._verified[label] = files
        return expert


def _files(folder: Path) -> list[tuple[object, ...]]:
    """Name, inode, size and times of every file that an expert's digest covers."""
    files = [(path, path.stat()) for path in sorted(folder.iterdir()) if path.name != MANIFEST]
    return [(path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in files]


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if it has the fields of `_Manifest`. Raises ArtifactError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no mixture: run `moa assemble` first.")
    with artifact_errors(str(path)):
        manifest: dict[str, Any] = read_json(path)
    try:
        validated = _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise ArtifactError(f"{path} is no manifest of a mixture: {field}: {first['msg']}; {ASSEMBLE_AGAIN}.") from None
    if sorted(validated.labels) != sorted(validated.experts) or not validated.labels:
        raise ArtifactError(f"{path} is no manifest of a mixture: its labels and its experts differ; {ASSEMBLE_AGAIN}.")
    return manifest


def _router(folder: Path, manifest: dict[str, Any]) -> "Router":
    """The router, if its tensors fit each other, the labels and its scalars. Raises ArtifactError."""
    from safetensors.torch import load_file

    from moa.mixture.router import Router

    subject = f"The router in {folder}"
    with artifact_errors(subject):
        tensors = load_file(folder / ROUTER)
        router = Router.restore(manifest["labels"], tensors, manifest["router"])
        if all(tensor.isfinite().all() for tensor in tensors.values()) and _can_decide(router):
            return router
    raise ArtifactError(f"{subject} does not fit its manifest: {ASSEMBLE_AGAIN}.")


def _can_decide(router: "Router") -> bool:
    """Whether the router's scalars are valid, its heads fit them, and a decision on features of zeros succeeds."""
    import torch

    from moa.mixture.router import Rule, Stream

    L, C, D = (*router.weight_LCD.shape, 0, 0, 0)[:3]
    choices = ((router.rule, Rule), (router.stream, Stream))
    shapes = [tuple(tensor.shape) for tensor in (router.mean_LD, router.scale_LD, router.bias_LC)]
    if not (all(value in get_args(literal) for value, literal in choices) and 0 <= router.layer < L
            and len(router.labels) == C and shapes == [(L, D), (L, D), (L, C)] and router.temperature > 0
            and (router.threshold_C is None or router.seen_MD is not None)):
        return False
    try:
        return router.decide(torch.zeros(1, router.depth, D))[0].domain in router.labels
    except (RuntimeError, AssertionError, IndexError):   # the score's tensors are missing or have another width
        return False


@contextmanager
def artifact_errors(subject: str) -> Iterator[None]:
    """Within the block, replace errors of reading a file by an ArtifactError whose message begins with `subject`."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{subject} is not there: {error.filename}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ArtifactError(f"{subject} cannot be read: {type(error).__name__}: {first}") from None

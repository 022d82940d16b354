"""Which code makes which artifact: one digest a stage, over the modules of `moa` that can change its result.

dvc.yaml names the digests as parameters of its stages. So in any workspace an upgrade of `moa` makes stale just the
stages whose code is another, and `moa plan` says so before anything runs. tests/unit/test_rooms.py holds the lists
against what the modules import.
"""

from functools import cache
from pathlib import Path

from moa import digests
from moa.workspace import Workspace, bring

BASE = ("base.py", "sources.py", "template.py")
MODEL = (*BASE, "tokens.py", "rows.py")
LAYER = ("lora.py", "product.py", "adapters.py", "batches.py", "native.py", "csrc")
ROUTING = ("router.py", "calibration.py", "heads.py", "bundle.py")
SOURCES = (".py", ".c", ".h")
MODULES: dict[str, tuple[str, ...]] = {
    "base": BASE,
    "quickstart": ("quickstart",),
    "prepare": ("corpus.py", "reading.py", "names.py", "conversation.py", "redact.py", "splits.py", "staging.py",
                "similar.py", "quality.py", "concerns.py", *MODEL),
    "train": ("experts.py", "training.py", "attention.py", "fused.py", "shelf.py", "warm.py", *LAYER, *MODEL),
    "assemble": ("assemble.py", "joint.py", "training.py", "attention.py", "fused.py", "shelf.py", *ROUTING, *LAYER,
                 *MODEL),
    "evaluate": ("evaluate.py", "remembered.py", "metrics.py", "mixture.py", "paging.py", "mapped.py",
                 "generation.py", "decoding.py", "llama.py", "compiled.py", "packing.py", "sampling.py", *ROUTING,
                 *LAYER, *MODEL),
}


@cache
def digest(stage: str) -> str:
    """Digest of the code behind `stage`, as it is installed here."""
    here = Path(__file__).parent
    paths = [here / name for name in MODULES[stage]]
    files = [file for path in paths for file in (sorted(each for each in path.rglob("*") if each.suffix in SOURCES)
                                                 if path.is_dir() else [path])]
    return digests.of_files(files, here)[:32]


def write(workspace: Workspace) -> None:
    """Bring `.moa/code.json` up to date, where DVC looks when it decides what is stale."""
    bring(workspace.code, {stage: digest(stage) for stage in MODULES})

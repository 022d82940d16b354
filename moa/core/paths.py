"""Every path of a workspace, from one root.

    params.yaml dvc.yaml dvc.lock   what to build, and what was built (git)
    data/                           artifacts, each complete once its manifest exists (DVC)
    .moa/                           this machine's own: databases, caches, locks, unfinished work (not kept)
"""

import os
from dataclasses import dataclass
from pathlib import Path

from moa.core import layout
from moa.core.errors import UsageError

MANIFEST = "manifest.json"


def user_cache() -> Path:
    """What this user's workspaces share and may lose at any time: compiled libraries, digests of code."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa"


@dataclass(frozen=True)
class Workspace:
    """The paths under one root. Nothing is created before the first write."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Workspace":
        """The workspace at `start` or the nearest folder above it.

        Raises UsageError when there is none, and ConfigError when a newer moa has made it.
        """
        here = (start or Path.cwd()).resolve()
        for folder in (here, *here.parents):
            if (folder / "params.yaml").is_file() and (folder / "dvc.yaml").is_file():
                layout.check_layout(folder)
                return cls(folder)
        raise UsageError(
            f"No workspace at {here} or above it: a workspace is a folder with params.yaml and dvc.yaml. "
            "Change into one, name it with --workspace DIR, or make one with `moa init`."
        )

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    # Artifacts: the outputs of the stages of dvc.yaml.

    @property
    def base(self) -> Path:
        """Weights and tokenizer of a base that was fetched (for `hub:` and `path:` bases, tokenizer only)."""
        return self.data / "base" / "model"

    @property
    def base_manifest(self) -> Path:
        return self.data / "base" / MANIFEST

    def raw(self, domain: str) -> Path:
        return self.data / "raw" / domain

    def tracked(self, domain: str) -> Path:
        """DVC's own file for rows that were added, in git."""
        return self.data / "raw" / f"{domain}.dvc"

    @property
    def incoming(self) -> Path:
        """What has arrived and is not yet learned: a folder of files for each domain."""
        return self.data / "incoming"

    @property
    def quarantine(self) -> Path:
        """What arrived and could not be used, or was refused, each file with its reason beside it."""
        return self.incoming / ".rejected"

    def corpus(self, domain: str) -> Path:
        return self.data / "corpora" / domain

    def expert(self, domain: str) -> Path:
        return self.data / "experts" / domain

    @property
    def starts(self) -> Path:
        """Which experts' training begins at which parent; absent when every one begins afresh (git)."""
        return self.data / "starts.json"

    @property
    def parents(self) -> Path:
        return self.data / "parents"

    def parent(self, digest: str) -> Path:
        """An expert as it was when another's training, or its own, was to begin at it."""
        return self.parents / digest[:16]

    @property
    def mixture(self) -> Path:
        return self.data / "mixture"

    @property
    def reports(self) -> Path:
        return self.data / "reports"

    # This machine's own.

    @property
    def local(self) -> Path:
        return self.root / ".moa"

    @property
    def code(self) -> Path:
        """Digest of the code behind each stage, which dvc.yaml names among the parameters."""
        return self.local / "code.json"

    @property
    def projection(self) -> Path:
        """The starts, with null for every other domain, which dvc.yaml names among the parameters."""
        return self.local / "starts.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that builds in this workspace."""
        return self.local / "build.lock"

    @property
    def journal(self) -> Path:
        """Names the paths of a change that is being made, or was interrupted: see moa/core/transaction.py."""
        return self.local / "change.json"

    @property
    def adaptation_state(self) -> Path:
        """The adaptation that is under way, or was interrupted: see flows/steps/adaptation_state.py."""
        return self.local / "attempt.json"

    @property
    def retraining(self) -> Path:
        """Where experts began before a retraining from scratch, until its end."""
        return self.local / "retraining.json"

    @property
    def up(self) -> Path:
        """Where the servers of `moa up` are, as long as it runs."""
        return self.local / "up.json"

    def removed(self, domain: str) -> Path:
        """Digests of what a removed domain had, for deleting it from DVC's cache later."""
        return self.local / "removed" / f"{domain}.json"

    @property
    def prompt_log(self) -> Path:
        """Files of others that stood where the undoing of a change put its own."""
        return self.local / "kept"

    @property
    def event_log(self) -> Path:
        """What set runs off, and what was decided: a line each, only ever added to."""
        return self.local / "ledger.jsonl"

    @property
    def mlflow(self) -> Path:
        """MLflow's default home: `mlflow.db` and `artifacts/`."""
        return self.local / "mlflow"

    @property
    def prefect(self) -> Path:
        """Home of the Prefect server that `moa run` starts when none is running."""
        return self.local / "prefect"

    @property
    def prefect_password(self) -> Path:
        """What `moa up`'s own Prefect server asks its clients and pages for, as long as it runs: user:password."""
        return self.local / "prefect-password"

    @property
    def cache(self) -> Path:
        """What can be computed again: router features, downloaded releases."""
        return self.local / "cache"

    @property
    def logs(self) -> Path:
        return self.local / "logs"

    def relative(self, path: Path) -> str:
        """`path` as it is written in dvc.yaml."""
        return path.relative_to(self.root).as_posix()

"""The paths of a workspace, all derived from its root.

    params.yaml dvc.yaml dvc.lock   what to build, and what was built (git)
    data/                           artifacts, each complete once its manifest exists (DVC)
    .moa/                           files of this machine alone: databases, caches, locks, unfinished work (not kept)
"""

import os
from dataclasses import dataclass
from pathlib import Path

from moa.core import layout
from moa.core.errors import UsageError

MANIFEST = "manifest.json"   # of every artifact; written last


def user_cache() -> Path:
    """Cache folder of this user's workspaces, which may be deleted at any time: compiled libraries, code digests.

    Raises RuntimeError where the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moa"


@dataclass(frozen=True)
class Workspace:
    """The paths of the workspace at `root`. No folder is created before the first write into it."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Workspace":
        """The workspace at `start` or the nearest folder above it.

        Args:
            start: the folder to search from; None = the current folder.

        Raises:
            UsageError: there is no workspace.
            ConfigError: a newer moa has made it.
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
        """The configuration, params.yaml (git)."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """Folder of all rows and artifacts."""
        return self.root / "data"

    # Artifacts: the outputs of the stages of dvc.yaml.

    @property
    def base(self) -> Path:
        """Folder of the fetched base: weights and tokenizer (of a `hub:` or `path:` base, the tokenizer only)."""
        return self.data / "base" / "model"

    @property
    def base_manifest(self) -> Path:
        """The pin of the fetched base, which `moa.base.pin` reads."""
        return self.data / "base" / MANIFEST

    def raw(self, domain: str) -> Path:
        """Folder of a domain's row files as the user added them."""
        return self.data / "raw" / domain

    def tracked(self, domain: str) -> Path:
        """DVC's file that names the version of `raw` (git)."""
        return self.data / "raw" / f"{domain}.dvc"

    @property
    def incoming(self) -> Path:
        """Row files that have arrived and that no expert has learned yet: a folder for each domain."""
        return self.data / "incoming"

    @property
    def quarantine(self) -> Path:
        """Arrived files that cannot be used or were refused, each with its reason in a file beside it."""
        return self.incoming / ".rejected"

    @property
    def deferrals(self) -> Path:
        """The domains whose rows in `incoming` wait for more, and for how many: see flows/steps/deferral.py."""
        return self.incoming / ".waiting.json"

    def corpus(self, domain: str) -> Path:
        """Folder of a domain's prepared corpus."""
        return self.data / "corpora" / domain

    def expert(self, domain: str) -> Path:
        """Folder of a domain's expert."""
        return self.data / "experts" / domain

    @property
    def starts(self) -> Path:
        """The parent that each warm-started expert's training begins at; absent when none is warm-started (git)."""
        return self.data / "starts.json"

    @property
    def parents(self) -> Path:
        """Folder of the parents: copies of experts that other experts' training begins at."""
        return self.data / "parents"

    def parent(self, digest: str) -> Path:
        """Folder of the parent with this expert digest."""
        return self.parents / digest[:16]

    @property
    def mixture(self) -> Path:
        """Folder of the assembled mixture: experts and router."""
        return self.data / "mixture"

    @property
    def champion(self) -> Path:
        """Folder of what the stages know of the champion: see moa/mixture/incumbent.py (DVC)."""
        return self.data / "champion"

    @property
    def reports(self) -> Path:
        """Folder of the results of stage `evaluate`."""
        return self.data / "reports"

    # Files of this machine alone.

    @property
    def local(self) -> Path:
        """Folder of the files that git and DVC do not keep."""
        return self.root / ".moa"

    @property
    def code(self) -> Path:
        """The code digest of each stage (`moa.core.code_version`), which stages of dvc.yaml have as parameters."""
        return self.local / "code.json"

    @property
    def projection(self) -> Path:
        """The entries of `starts`, with null for every other domain, which stages of dvc.yaml have as parameters."""
        return self.local / "starts.json"

    @property
    def calibration(self) -> Path:
        """Which calibration stage `assemble` extends (moa/mixture/incumbent.py), a parameter of the stage."""
        return self.local / "calibration.json"

    @property
    def lock(self) -> Path:
        """Lock file, held by the one process that builds in this workspace or changes its files."""
        return self.local / "build.lock"

    @property
    def journal(self) -> Path:
        """The journal of a transaction that is running or was interrupted: see moa/core/transaction.py."""
        return self.local / "change.json"

    @property
    def adaptation_state(self) -> Path:
        """The state of an adaptation that is running or was interrupted: see flows/steps/adaptation_state.py."""
        return self.local / "attempt.json"

    @property
    def retraining(self) -> Path:
        """During a retraining from scratch, the content of `starts` from before it: see flows/steps/retraining.py."""
        return self.local / "retraining.json"

    @property
    def up(self) -> Path:
        """Process id of `moa up` and addresses of its servers, while it runs."""
        return self.local / "up.json"

    def removed(self, domain: str) -> Path:
        """Digests of a removed domain's data, so that they can be deleted from DVC's cache later."""
        return self.local / "removed" / f"{domain}.json"

    @property
    def displaced(self) -> Path:
        """Folder of files edited after an interrupted transaction, which undoing it moved out of the way."""
        return self.local / "kept"

    @property
    def event_log(self) -> Path:
        """Append-only JSON lines: what started each run of a flow, and what it decided (flows/steps/event_log.py)."""
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
        """User and password (user:password) of `moa up`'s own Prefect server, while it runs."""
        return self.local / "prefect-password"

    @property
    def cache(self) -> Path:
        """Folder of files that can be computed or downloaded again: router features, wheels, releases."""
        return self.local / "cache"

    @property
    def logs(self) -> Path:
        """Folder of the log files of stages and servers."""
        return self.local / "logs"

    def relative(self, path: Path) -> str:
        """`path` relative to the root, with forward slashes, as dvc.yaml and messages name it."""
        return path.relative_to(self.root).as_posix()

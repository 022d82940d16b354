"""Experts and mixtures as MLflow versions, and who is champion.

A registration leaves a run (how it came about), a logged model (the files) and last of all a version, whose tags pin
the content. A version's existence means that it is complete; what a crash leaves before that is found by its digest
and continued. With `moa.release.mlflow_client` and `moa.serving.pyfunc`, the only modules that use MLflow.

    moa-PROJECT-expert-NAME    adapter and manifest of one expert, without base weights
    moa-PROJECT-mixture        the whole mixture and its reports, answering chat bodies; its tags hold the champion's
                               history

What these are called, and whose they are, is decided by `moa.core.project` and `moa.release.ownership`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, RegistryError
from moa.core.files import read_json, replace_directory
from moa.core.paths import MANIFEST, Workspace
from moa.core.project import Names
from moa.release import mlflow_client
from moa.release.champion_history import HISTORY, Entry, next_entry, parse

CHAMPION = "champion"
CURRENT_CHAMPION = -1         # whichever release is champion
GATE = "moa.gate"   # tag of a version; with a number behind it, against that version


@dataclass(frozen=True)
class ExpertVersion:
    name: str
    version: int
    digest: str
    run_id: str
    created: bool = False   # by this call


@dataclass(frozen=True)
class MixtureVersion:
    name: str
    version: int
    digest: str
    run_id: str
    tags: dict[str, str]
    created_at: int         # milliseconds since 1970
    created: bool = False   # by this call

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """`name`, `version` and `digest` of each domain's expert."""
        return json.loads(self.tags["moa.experts"])

    @property
    def gate(self) -> dict[str, Any] | None:
        """The decision whether it may follow the champion, if one was made."""
        return json.loads(self.tags[GATE]) if GATE in self.tags else None

    def gate_against(self, version: int) -> dict[str, Any] | None:
        """The decision against another release, which `moa gate --against` asked for."""
        found = self.tags.get(f"{GATE}.{version}")
        return json.loads(found) if found else None


class Registry:
    """Opens MLflow at the first call that needs it. Methods raise RegistryError when MLflow refuses or is gone."""

    def __init__(self, workspace: Workspace, config: Config) -> None:
        self.workspace = workspace
        self.config = config
        self.address = mlflow_client.uri(workspace)
        self.private = mlflow_client.private(workspace)
        self._client: Any = None
        self._names: Names | None = None
        self._experiment: str | None = None

    @property
    def client(self) -> Any:
        """MLflow's client."""
        if self._client is None:
            self._client = mlflow_client.connect(self.workspace)
        return self._client

    def open(self) -> tuple[Any, str]:
        """MLflow's client and the id of our experiment."""
        if self._experiment is None:
            self._experiment = mlflow_client.experiment(self.workspace, self.client, self.names.experiment)
        return self.client, self._experiment

    @property
    def names(self) -> Names:
        """What this project's things are called here. Raises RegistryError when they are another project's."""
        if self._names is not None:
            return self._names
        from moa.release import ownership

        names, settled = ownership.resolve(self)
        if settled:   # before the first release another process may still decide it
            self._names = names
        return names

    @property
    def mixture_name(self) -> str:
        return self.names.mixture

    # Registration.

    def register_expert(self, domain: str) -> ExpertVersion:
        """The version that holds the expert of `domain`, made if its content has none yet."""
        from moa.release.registration import register_expert

        with self._alone():
            return _expert(*register_expert(self, domain))

    def register_mixture(self, experts: dict[str, ExpertVersion], page: Callable[[], str] = str) -> MixtureVersion:
        """The version that holds `data/mixture`, pinned to these versions of its experts.

        `page` makes the HTML page that a new version's run keeps as report.html; an empty text is not kept.
        """
        from moa.release.registration import register_mixture

        with self._alone():
            found, created = register_mixture(self, experts, page)
            return replace(_mixture(found), created=created)

    # Versions.

    def versions(self) -> list[MixtureVersion]:
        """Every release, oldest first."""
        with mlflow_client.mlflow_errors(self.address):
            found = self.client.search_model_versions(f"name='{self.mixture_name}'", max_results=10_000)
        return sorted((_mixture(each) for each in found), key=lambda version: version.version)

    def get(self, version: int | str) -> MixtureVersion:
        """A release by number, or by alias ("champion")."""
        if (number := str(version)).isdigit():
            with mlflow_client.mlflow_errors(self.address):
                try:
                    return _mixture(self.client.get_model_version(self.mixture_name, number))
                except Exception as error:
                    if not mlflow_client.missing(error):
                        raise
        elif (found := self._by_alias(number)) is not None:
            return found
        known = ", ".join(str(each.version) for each in self.versions()) or "none yet: run `moa run`"
        raise RegistryError(f"{self.mixture_name} has no version {version}; its versions: {known}.")

    def exists(self) -> bool:
        """Whether anything may have been registered; asking any other way makes a new database."""
        return self.workspace.mlflow.exists() or bool(os.environ.get("MLFLOW_TRACKING_URI"))

    def corpora(self, version: MixtureVersion) -> dict[str, dict[str, str]]:
        """What each domain's expert of a release learned from: `moa.digest` and, if DVC knew it, `dvc.md5`."""
        with mlflow_client.mlflow_errors(self.address):
            inputs = self.client.get_run(version.run_id).inputs.dataset_inputs
        return {each.dataset.name: {tag.key: tag.value for tag in each.tags} for each in inputs}

    def _by_alias(self, alias: str) -> MixtureVersion | None:
        with mlflow_client.mlflow_errors(self.address):
            try:
                return _mixture(self.client.get_model_version_by_alias(self.mixture_name, alias))
            except Exception as error:
                # An alias that was never set is an invalid parameter to MLflow, not a missing resource.
                if mlflow_client.missing(error) or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                    return None
                raise

    def record_gate(self, version: int, decision: dict[str, Any], against: int | None = None) -> None:
        """Keep the decision with the version it is about; the newest one counts. `against` another release than the
        champion it decides nothing, and is kept beside."""
        tag = GATE if against is None else f"{GATE}.{against}"
        with mlflow_client.mlflow_errors(self.address):
            self.client.set_model_version_tag(self.mixture_name, str(version), tag, json.dumps(decision))

    def params(self, version: MixtureVersion) -> dict[str, str]:
        """Parameters of a release and of its experts' trainings; an expert's are named `DOMAIN.train.KEY`."""
        with mlflow_client.mlflow_errors(self.address):
            found = dict(self.client.get_run(version.run_id).data.params)
            for domain, pin in version.experts.items():
                expert = self.client.get_model_version(pin["name"], str(pin["version"]))
                trained = self.client.get_run(expert.run_id).data.params
                found |= {f"{domain}.train.{key}": value for key, value in trained.items()}
        return found

    def metrics(self, version: MixtureVersion) -> dict[str, float]:
        """What `moa evaluate` measured before it was registered, such as `math/routed/loss`."""
        with mlflow_client.mlflow_errors(self.address):
            return dict(self.client.get_run(version.run_id).data.metrics)

    def download(self, version: int | str) -> Path:
        """The mixture's directory as it was released, `reports` beside it. Raises ArtifactError when it was altered.

        Kept under the digest of its content, and put there whole.
        """
        from filelock import FileLock

        wanted = version if isinstance(version, MixtureVersion) else self.get(version)
        target = self.workspace.cache / "releases" / wanted.digest
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{wanted.digest}.lock"):
            if not target.is_dir():
                with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as temporary:
                    fetched = self._fetch(wanted, Path(temporary))
                    verify(fetched / "mixture", wanted)
                    with replace_directory(target) as folder:
                        for part in fetched.iterdir():
                            shutil.move(part, folder / part.name)
        return target / "mixture"

    def check(self, version: MixtureVersion) -> None:
        """Raise ArtifactError unless MLflow still has every file of a release; what this machine keeps is no proof."""
        self.workspace.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.workspace.cache, prefix=".check-") as temporary:
            verify(self._fetch(version, Path(temporary)) / "mixture", version)

    def _fetch(self, version: MixtureVersion, folder: Path) -> Path:
        self.open()   # quiet before the import
        with mlflow_client.mlflow_errors(self.address), mlflow_client.default_uri(self.address):
            from mlflow.artifacts import download_artifacts

            return Path(download_artifacts(
                artifact_uri=f"models:/{version.name}/{version.version}", dst_path=str(folder),
                tracking_uri=self.address, registry_uri=self.address)) / "artifacts"

    # The champion.

    def champion(self) -> MixtureVersion | None:
        """The release that serves; None before the first, or when the alias was deleted."""
        return self._by_alias(CHAMPION)

    def set_champion(self, version: int, reason: str, by: str, *, instead_of: int | None = CURRENT_CHAMPION) -> Entry:
        """Move the alias and record the move. Repeated after a crash, it completes what was begun.

        Raises, before anything changes, ArtifactError when the version's files are no longer what was registered, and
        RegistryError when the champion is no longer `instead_of`, which the gate compared it with.

        The record comes first: a move without a record would hide who did it and why, while a record without its move
        shows as not effective, because its successor (or the alias) names another predecessor.
        """
        from moa.release.ownership import claim

        with self._alone():
            wanted, current = self.get(version), self.champion()
            if instead_of != CURRENT_CHAMPION and current is not None and current.version not in (instead_of,
                                                                                                  wanted.version):
                raise RegistryError(f"Version {current.version} became champion meanwhile, and the gate has not "
                                    f"compared version {wanted.version} with it: run the same command again.")
            self.check(wanted)
            claim(self, self.mixture_name)
            entry, new = next_entry(self.history(), wanted.version, wanted.digest,
                                    current.version if current else None, reason, by)
            with mlflow_client.mlflow_errors(self.address):
                if new:
                    self.client.set_registered_model_tag(self.mixture_name, entry.key, entry.as_json())
                if current is None or current.version != wanted.version:
                    self.client.set_registered_model_alias(self.mixture_name, CHAMPION, str(wanted.version))
        return entry

    def history(self) -> list[Entry]:
        """Every change of champion, oldest first; kept in tags of the registered model, out of reach of the alias."""
        with mlflow_client.mlflow_errors(self.address):
            try:
                tags = self.client.get_registered_model(self.mixture_name).tags
            except Exception as error:
                if mlflow_client.missing(error):
                    return []
                raise
        current = self.champion()
        return parse({key: value for key, value in tags.items() if key.startswith(HISTORY)},
                     current.version if current else None)

    def _alone(self) -> Any:
        """One writer at a time on this machine: two that do not find a digest would both register it."""
        from filelock import FileLock

        self.open()
        return FileLock(self.workspace.mlflow / "write.lock")


def verify(mixture: Path, version: MixtureVersion) -> None:
    """Raise ArtifactError unless `mixture` holds exactly the files that were registered as `version`."""
    recorded: dict[str, str] = json.loads(version.tags["moa.files"])
    found = digests.by_name(mixture)
    wrong = sorted(name for name in recorded.keys() | found.keys() if recorded.get(name) != found.get(name))
    if wrong or read_json(mixture / MANIFEST)["digest"] != version.digest:
        raise ArtifactError(f"{version.name} version {version.version} is not what was registered: "
                            f"{', '.join(wrong) or MANIFEST} differs. Register it again with `moa run`.")


def _expert(found: Any, created: bool) -> ExpertVersion:
    return ExpertVersion(found.name, int(found.version), found.tags["moa.digest"], found.run_id or "", created)


def _mixture(found: Any) -> MixtureVersion:
    return MixtureVersion(found.name, int(found.version), found.tags.get("moa.digest", ""), found.run_id or "",
                          dict(found.tags), int(found.creation_timestamp))

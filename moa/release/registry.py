"""The registry of releases: experts and mixtures as MLflow versions, and which version is champion.

A registration creates a run (parameters, curves, inputs), a logged model (the files) and last a version, whose tags pin
the content. A version that exists is complete; a later attempt finds by its digest what a crash left, and continues it.
With `moa.release.mlflow_client` and `moa.serving.pyfunc`, the only modules that use MLflow.

    moa-PROJECT-expert-NAME    adapter and manifest of one expert, without base weights
    moa-PROJECT-mixture        the whole mixture and its reports, answering chat bodies; its tags hold the champion's
                               history

`moa.core.project` makes the models' names, and `moa.release.ownership` decides which project a model belongs to.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from moa.core import digests
from moa.core.config import Config
from moa.core.errors import ArtifactError, RegistryError
from moa.core.files import read_json, replace_directory
from moa.core.paths import MANIFEST, Workspace
from moa.core.project import Names
from moa.release import mlflow_client
from moa.release.champion_history import HISTORY, Entry, next_entry, parse

CHAMPION = "champion"
CURRENT_CHAMPION = -1   # for `instead_of`: whichever release is champion now
GATE = "moa.gate"   # tag of the decision against the champion
TAG_CHARACTERS = 90_000   # longest value of a tag here; MLflow allows 100,000


@dataclass(frozen=True)
class ExpertVersion:
    """A registered version of one domain's expert."""

    name: str               # of the registered model
    version: int
    digest: str
    run_id: str
    created: bool = False   # whether this call registered it


@dataclass(frozen=True)
class MixtureVersion:
    """A release: a registered version of the mixture."""

    name: str               # of the registered model
    version: int
    digest: str
    run_id: str
    tags: dict[str, str]
    created_at: int         # milliseconds since 1970
    created: bool = False   # whether this call registered it

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """`name`, `version` and `digest` of each domain's expert."""
        return json.loads(self.tags["moa.experts"])

    @property
    def gate(self) -> dict[str, Any] | None:
        """The gate's decision whether this release may become champion; None where the gate has not run."""
        if GATE not in self.tags:
            return None
        decision: dict[str, Any] = json.loads(self.tags[GATE])
        if "parts" in decision:
            decision = json.loads("".join(self.tags[f"{GATE}.part.{part}"] for part in range(decision["parts"])))
        return decision


class Registry:
    """The releases of one workspace in MLflow, which is opened at the first call that needs it.

    Methods raise RegistryError when MLflow refuses a request or cannot be reached.
    """

    def __init__(self, workspace: Workspace, config: Config) -> None:
        self.workspace = workspace
        self.config = config
        self.address = mlflow_client.uri(workspace)
        self.private = mlflow_client.private(workspace)
        self._client: Any = None
        self._names: Names | None = None
        self._experiment: str | None = None

    @classmethod
    def of_model(cls, workspace: Workspace, config: Config, mixture: str) -> Self:
        """A registry that reads the versions of the registered model `mixture`, whichever project it belongs to."""
        registry = cls(workspace, config)
        registry._names = Names(None, mixture)
        return registry

    @property
    def client(self) -> Any:
        """The `MlflowClient`, connected at first use."""
        if self._client is None:
            self._client = mlflow_client.connect(self.workspace)
        return self._client

    def open(self) -> tuple[Any, str]:
        """The `MlflowClient` and the id of this project's experiment, which is created at first use."""
        if self._experiment is None:
            self._experiment = mlflow_client.experiment(self.workspace, self.client, self.names.experiment)
        return self.client, self._experiment

    @property
    def names(self) -> Names:
        """The names of this project's models in the registry. Raises RegistryError when they are another project's."""
        if self._names is not None:
            return self._names
        from moa.release import ownership

        names, settled = ownership.resolve(self)
        if settled:   # until the first release, another process may register under other names
            self._names = names
        return names

    @property
    def mixture_name(self) -> str:
        """The name of the registered model of this project's releases."""
        return self.names.mixture

    # Registration.

    def register_expert(self, domain: str) -> ExpertVersion:
        """Register the expert of `domain` and return its version; an existing one if its content was registered."""
        from moa.release.registration import register_expert

        with self._write_lock():
            return _expert(*register_expert(self, domain))

    def register_mixture(self, experts: dict[str, ExpertVersion], page: Callable[[], str] = str) -> MixtureVersion:
        """Register `data/mixture` as a release and return its version; an existing one if its content was registered.

        Args:
            experts: the versions of its experts, by domain, which the release pins.
            page: makes the HTML page that a new version's run keeps as report.html; "" is not kept.
        """
        from moa.release.registration import register_mixture

        with self._write_lock():
            version, created = register_mixture(self, experts, page)
            return replace(_mixture(version), created=created)

    # Versions.

    def versions(self) -> list[MixtureVersion]:
        """Every release, oldest first."""
        with mlflow_client.mlflow_errors(self.address):
            versions = self.client.search_model_versions(f"name='{self.mixture_name}'", max_results=10_000)
        return sorted((_mixture(version) for version in versions), key=lambda release: release.version)

    def get(self, version: int | str) -> MixtureVersion:
        """A release by number, or by alias ("champion")."""
        if (number := str(version)).isdigit():
            with mlflow_client.mlflow_errors(self.address):
                try:
                    return _mixture(self.client.get_model_version(self.mixture_name, number))
                except Exception as error:
                    if not mlflow_client.missing(error):
                        raise
        elif (release := self._by_alias(number)) is not None:
            return release
        known = ", ".join(str(each.version) for each in self.versions()) or "none yet: run `moa run`"
        raise RegistryError(f"{self.mixture_name} has no version {version}; its versions: {known}.")

    def exists(self) -> bool:
        """Whether anything may have been registered. Any other query would create a new database."""
        return self.workspace.mlflow.exists() or bool(os.environ.get("MLFLOW_TRACKING_URI"))

    def corpora(self, version: MixtureVersion) -> dict[str, dict[str, str]]:
        """The corpora that a release's experts learned from, by domain: `moa.digest` and, if DVC knew it, `dvc.md5`."""
        with mlflow_client.mlflow_errors(self.address):
            inputs = self.client.get_run(version.run_id).inputs.dataset_inputs
        return {corpus.dataset.name: {tag.key: tag.value for tag in corpus.tags} for corpus in inputs}

    def _by_alias(self, alias: str) -> MixtureVersion | None:
        with mlflow_client.mlflow_errors(self.address):
            try:
                return _mixture(self.client.get_model_version_by_alias(self.mixture_name, alias))
            except Exception as error:
                # An alias that was never set is an invalid parameter to MLflow, not a missing resource.
                if mlflow_client.missing(error) or getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                    return None
                raise

    def record_gate(self, version: int, decision: dict[str, Any]) -> None:
        """Store the gate's decision on `version` as a tag, in the place of an older one.

        One on dozens of domains is longer than a tag may be. It is stored in parts, before the tag that counts them.
        """
        text = json.dumps(decision)
        parts = [text[begin:begin + TAG_CHARACTERS] for begin in range(0, len(text), TAG_CHARACTERS)]
        tags = {GATE: text} if len(parts) == 1 else {
            **{f"{GATE}.part.{number}": part for number, part in enumerate(parts)},
            GATE: json.dumps({"parts": len(parts)} | {key: decision[key] for key in ("promote", "reason")})}
        with mlflow_client.mlflow_errors(self.address):
            for key, value in tags.items():
                self.client.set_model_version_tag(self.mixture_name, str(version), key, value)

    def params(self, version: MixtureVersion) -> dict[str, str]:
        """The parameters of a release and of its experts' training, the latter named `DOMAIN.train.KEY`."""
        with mlflow_client.mlflow_errors(self.address):
            params = dict(self.client.get_run(version.run_id).data.params)
            for domain, pin in version.experts.items():
                expert = self.client.get_model_version(pin["name"], str(pin["version"]))
                trained = self.client.get_run(expert.run_id).data.params
                params |= {f"{domain}.train.{key}": value for key, value in trained.items()}
        return params

    def metrics(self, version: MixtureVersion) -> dict[str, float]:
        """The metrics that `moa evaluate` measured of a release before its registration, such as `math/routed/loss`."""
        with mlflow_client.mlflow_errors(self.address):
            return dict(self.client.get_run(version.run_id).data.metrics)

    def download(self, version: int | str) -> Path:
        """Download a release: the folder of its mixture, with the folder `reports` beside it.

        The workspace's cache holds it under the digest of its content, and never in part. Raises RegistryError when
        there is no such version, and ArtifactError when its files are not those that were registered.
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
        """Raise ArtifactError unless MLflow still has every file of a release unaltered. Does not read the cache."""
        self.workspace.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.workspace.cache, prefix=".check-") as temporary:
            verify(self._fetch(version, Path(temporary)) / "mixture", version)

    def lists_files(self, version: MixtureVersion) -> bool:
        """Whether MLflow's artifact store lists files of a release. Reads none of them; `check` reads all."""
        _ = self.client   # connects, which quiets MLflow before it is imported
        with mlflow_client.mlflow_errors(self.address), mlflow_client.default_uri(self.address):
            from mlflow.artifacts import list_artifacts

            return bool(list_artifacts(artifact_uri=f"models:/{version.name}/{version.version}",
                                       tracking_uri=self.address))

    def _fetch(self, version: MixtureVersion, folder: Path) -> Path:
        _ = self.client   # connects, which quiets MLflow before it is imported
        with mlflow_client.mlflow_errors(self.address), mlflow_client.default_uri(self.address):
            from mlflow.artifacts import download_artifacts

            return Path(download_artifacts(
                artifact_uri=f"models:/{version.name}/{version.version}", dst_path=str(folder),
                tracking_uri=self.address, registry_uri=self.address)) / "artifacts"

    # The champion.

    def champion(self) -> MixtureVersion | None:
        """The release that has the alias `champion`; None before the first promotion, or when the alias was deleted."""
        return self._by_alias(CHAMPION)

    def set_champion(self, version: int, reason: str, by: str, *, instead_of: int | None = CURRENT_CHAMPION) -> Entry:
        """Make `version` champion: record the change, then move the alias. Returns the entry of the history.

        Calling it again after a crash completes the change. The record is written first: an alias moved without a
        record would hide who moved it and why, while a record whose alias did not move is recognised as not effective
        (`moa.release.champion_history.parse`).

        Args:
            by: the user or program that makes the change.
            instead_of: the champion that the gate compared `version` with; None = there was none.

        Raises:
            ArtifactError: the version's files are not those that were registered. Nothing has changed.
            RegistryError: the champion is no longer `instead_of`, and nothing has changed; or MLflow refuses.
        """
        from moa.release.ownership import claim

        with self._write_lock():
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
        """Every change of champion, oldest first.

        Tags of the registered model hold the entries, so that deleting the alias deletes no history.
        """
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

    def _write_lock(self) -> Any:
        """The lock of processes on this machine that write: two that both miss a digest would register it twice."""
        from filelock import FileLock

        self.open()
        return FileLock(self.workspace.mlflow / "write.lock")


def verify(mixture: Path, version: MixtureVersion) -> None:
    """Raise ArtifactError unless `mixture` holds exactly the files that were registered as `version`."""
    recorded: dict[str, str] = json.loads(version.tags["moa.files"])
    present = digests.by_name(mixture)
    wrong = sorted(name for name in recorded.keys() | present.keys() if recorded.get(name) != present.get(name))
    if wrong or read_json(mixture / MANIFEST)["digest"] != version.digest:
        raise ArtifactError(f"{version.name} version {version.version} is not what was registered: "
                            f"{', '.join(wrong) or MANIFEST} differs. Register it again with `moa run`.")


def _expert(version: Any, created: bool) -> ExpertVersion:
    """MLflow's model version of an expert as an `ExpertVersion`."""
    return ExpertVersion(version.name, int(version.version), version.tags["moa.digest"], version.run_id or "", created)


def _mixture(version: Any) -> MixtureVersion:
    """MLflow's model version of a mixture as a `MixtureVersion`."""
    return MixtureVersion(version.name, int(version.version), version.tags.get("moa.digest", ""), version.run_id or "",
                          dict(version.tags), int(version.creation_timestamp))

"""Registers an expert or a mixture as an MLflow version, so that an interrupted registration can be continued.

    run, params, curves, inputs -> logged model -> its files -> version

Runs and logged models carry the digest of their content. Each step looks for what an earlier attempt left and continues
it, so a crash between any two steps leaves no duplicates. Part of `moa.release.registry`, which holds the lock.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.core import digests
from moa.core.errors import RegistryError
from moa.core.files import read_json
from moa.core.paths import MANIFEST, Workspace
from moa.release import lineage, mlflow_client, ownership

if TYPE_CHECKING:
    from moa.release.registry import ExpertVersion, Registry

SCRIPT = '''"""Loaded by MLflow as the model's code; the rest is in the installed package."""

from mlflow.models import set_model

from moa.serving.pyfunc import python_model

set_model(python_model())
'''
ABOUT = {"expert": "LoRA experts of one domain: a version for every content, without base weights.",
         "mixture": "Releases: each version is a base, its experts and a router, pinned. The one with the alias "
                    "`champion` serves; tags `moa.champion.*` record who promoted which version, when and why."}
RUNTIME = ("mlflow", "numpy", "pydantic", "ruamel.yaml", "safetensors", "torch", "transformers")
VERSIONS = "mlflow.modelVersions"   # MLflow's own tag of a logged model


@dataclass
class Entry:
    """The metadata of one version that is being registered."""

    name: str                    # of the registered model
    run_name: str
    kind: str                    # expert or mixture
    digest: str
    tags: dict[str, str]         # of run, logged model and version
    pins: dict[str, str]         # tags of the version alone, which may be longer than tags of a run
    params: dict[str, Any]
    points: list[lineage.Point]
    corpora: dict[str, str]      # digest by domain
    sources: list[Any]           # MLflow's versions that this one was made from
    description: str = ""        # Markdown, for MLflow's pages
    page: str = ""               # HTML, kept with the run
    all_tags: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.all_tags = {"moa.kind": self.kind, "moa.model": self.name, "moa.digest": self.digest, **self.tags}


def register_expert(registry: "Registry", domain: str) -> tuple[Any, bool]:
    """Register the expert of `domain`, unless a version has its content: MLflow's version, and whether it is new.

    Raises RegistryError when the domain has no expert, or the model belongs to another project.
    """
    folder = registry.workspace.expert(domain)
    manifest = _manifest(folder, f"Domain {domain!r} has no expert: run `moa train --domain {domain}` first.")
    with mlflow_client.mlflow_errors(registry.address):
        name = registry.names.expert(domain)
        ownership.claim(registry, name)
        if (existing := _version(registry, name, manifest["digest"])) is not None:
            return _linked(registry, existing), False
        base, imported = manifest["base"], manifest.get("source") == "imported"
        parent = _digest(manifest["parent"]) if manifest.get("parent") else None
        parents = _expert_versions_of(registry, parent) if parent else []
        entry = Entry(
            name, f"expert {domain}", "expert", manifest["digest"],
            {"moa.domain": domain, "moa.corpus": manifest["corpus"], "moa.base": base["digest"],
             "moa.base.source": base["source"], **({"moa.parent": parent} if parent else {}),
             **({"moa.source": "imported"} if imported else {}), **lineage.of_workspace(registry.workspace)},
            {"moa.files": json.dumps(digests.by_name(folder))},
            {**manifest["train"], "rank": manifest["rank"], "alpha": manifest["alpha"],
             "targets": ",".join(manifest["targets"]),
             **({} if imported else {"best_epoch": manifest["best_epoch"]})},
            list(lineage.learning_curve_metrics(manifest["curve"])), {domain: manifest["corpus"]}, parents,
            f"LoRA adapter (PEFT) of domain {domain}, without base weights; "
            f"{'imported, for' if imported else 'trained on'} {base['source']}."
            + "".join(f" It continues {_link(each)}." for each in parents))
        return _register(registry, entry, lambda _: folder), True


def register_mixture(registry: "Registry", experts: Mapping[str, "ExpertVersion"],
                     page: Callable[[], str]) -> tuple[Any, bool]:
    """Register `data/mixture`, unless a version has its content: MLflow's version, and whether it is new.

    Args:
        experts: the registered versions of its experts, by domain.
        page: makes the HTML report that the run of a new version keeps; it may return "".

    Raises RegistryError when there is no mixture, or it was assembled from other experts.
    """
    workspace, folder = registry.workspace, registry.workspace.mixture
    manifest = _manifest(folder, "There is no mixture: run `moa assemble` first.")
    _check_experts(manifest, experts)
    with mlflow_client.mlflow_errors(registry.address):
        name = registry.mixture_name
        ownership.claim(registry, name)
        if (existing := _version(registry, name, manifest["digest"])) is not None:
            return _named(registry, _linked(registry, existing)), False
        router = manifest["router"]
        base = {"digest": _digest(manifest["base"]), "source": _source(manifest)}
        pins = {domain: {"name": each.name, "version": each.version, "digest": each.digest}
                for domain, each in sorted(experts.items())}
        made_of = [registry.client.get_model_version(pin["name"], str(pin["version"])) for pin in pins.values()]
        table = "".join(f"\n| {domain} | {_link(each)} | `{each.tags['moa.corpus'][:12]}` |"
                        for domain, each in zip(pins, made_of, strict=True))
        entry = Entry(
            name, "mixture", "mixture", manifest["digest"],
            {"moa.base": base["digest"], "moa.base.source": base["source"], "moa.router": _digest(router),
             **lineage.of_workspace(workspace)},
            {"moa.experts": json.dumps(pins), "moa.files": json.dumps(digests.by_name(folder))},
            {"base": base["source"], "labels": ",".join(manifest["labels"]),
             **{f"router.{key}": router[key] for key in ("rule", "layer", "temperature") if key in router},
             **{f"expert.{domain}": f"{pin['name']}/{pin['version']}" for domain, pin in pins.items()}},
            [*lineage.evaluation_metrics(workspace.reports / "summary.json"),
             *((f"router/level_{key}", each[key], each["level"]) for each in router.get("levels", ())
               for key in ("accuracy", "agreement"))],   # a layer is a step, so that MLflow draws the curve
            dict(_corpora(folder, manifest["labels"])),
            made_of,
            f"Mixture-of-LoRAs over {base['source']}.\n\n| domain | expert | corpus |\n|---|---|---|{table}",
            page())
        settings = {"base_source": base["source"], "base_digest": base["digest"], "workspace": str(workspace.root)}
        version = _register(registry, entry, lambda temporary: _chat_model(workspace, settings, temporary))
        return _named(registry, version), True


# The steps of a registration. Each continues what an interrupted registration left.

def _expert_versions_of(registry: "Registry", digest: str) -> list[Any]:
    """The oldest version of any of this project's experts with this content, as a list of at most one."""
    versions = [version for version in registry.client.search_model_versions(f"tags.`moa.digest`='{digest}'")
             if version.name.startswith(registry.names.expert(""))]
    return sorted(versions, key=lambda version: int(version.creation_timestamp))[:1]


def _version(registry: "Registry", name: str, digest: str) -> Any:
    """The oldest version of the model `name` with this content, or None."""
    versions = registry.client.search_model_versions(f"name='{name}' and tags.`moa.digest`='{digest}'")
    return min(versions, key=lambda version: int(version.version), default=None)


def _register(registry: "Registry", entry: Entry, content: Any) -> Any:
    """Create the version that `entry` describes.

    `content` is called with an empty folder where files must be uploaded, and returns the folder that holds them.
    """
    client, experiment = registry.open()
    run = _run(client, experiment, entry)
    _describe(client, run, entry, registry.workspace)
    model = _model(client, experiment, run.info.run_id, entry, content)
    outputs = client.get_run(run.info.run_id).outputs
    if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.set_terminated(run.info.run_id)
    try:
        client.create_registered_model(entry.name, ownership.tags(registry), ABOUT[entry.kind])
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
        ownership.claim(registry, entry.name)   # another project may just have created it
    with mlflow_client.default_uri(registry.address):
        return _linked(registry, client.create_model_version(
            entry.name, f"models:/{model.model_id}", run.info.run_id, tags={**entry.all_tags, **entry.pins},
            description=entry.description, model_id=model.model_id))


def _linked(registry: "Registry", version: Any) -> Any:
    """Tag the version's logged model with the version, which MLflow's pages show; the version itself."""
    model = registry.client.get_logged_model(version.source.rpartition("/")[2])
    if VERSIONS not in model.tags:
        named = json.dumps([{"name": version.name, "version": int(version.version)}])
        registry.client.set_logged_model_tags(model.model_id, {VERSIONS: named})
    return version


def _named(registry: "Registry", mixture: Any) -> Any:
    """Tag each expert's version with the newest mixture that pins it, which MLflow's pages show; the mixture itself."""
    tag, client = f"moa.in.{mixture.name}", registry.client
    for pin in json.loads(mixture.tags["moa.experts"]).values():
        expert = client.get_model_version(pin["name"], str(pin["version"]))
        if int(expert.tags.get(tag, 0)) < int(mixture.version):
            client.set_model_version_tag(expert.name, str(expert.version), tag, str(mixture.version))
    return mixture


def _run(client: Any, experiment: str, entry: Entry) -> Any:
    """The run of this content that an interrupted registration left, or a new one."""
    same_content = f"tags.`moa.digest`='{entry.digest}' and tags.`moa.model`='{entry.name}'"
    if existing := client.search_runs([experiment], same_content, max_results=1):
        return existing[0]
    mlflow_tags = {"mlflow.source.name": "moa", "mlflow.source.type": "LOCAL", "mlflow.note.content": entry.description}
    if "moa.git.commit" in entry.tags:
        mlflow_tags["mlflow.source.git.commit"] = entry.tags["moa.git.commit"]
    return client.create_run(experiment, tags={**entry.all_tags, **mlflow_tags}, run_name=entry.run_name)


def _describe(client: Any, run: Any, entry: Entry, workspace: Workspace) -> None:
    """Log params, metrics and inputs of the run.

    Times of metrics derive from the run's start, so that logging again stores no metric twice: MLflow drops a metric
    with the same key, step and time.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param

    params = [Param(key, str(value)) for key, value in entry.params.items() if key not in run.data.params]
    metrics = [Metric(key, value, run.info.start_time + step, step) for key, value, step in entry.points]
    for start in range(0, max(len(params), len(metrics)), 100):
        client.log_batch(run.info.run_id, metrics[start:start + 100], params[start:start + 100])
    known = lineage.dvc_corpora(workspace, entry.corpora)
    inputs = []
    for domain, digest in entry.corpora.items():
        tags = {"mlflow.data.context": "training", "moa.digest": digest}
        if domain in known:
            tags["dvc.md5"] = known[domain]
        # MLflow's column holds 36 characters, the length of DVC's digest of a folder; the tag holds moa's whole digest.
        source = json.dumps({"path": workspace.relative(workspace.corpus(domain))})
        inputs.append(DatasetInput(Dataset(domain, known.get(domain, digest)[:36], "dvc", source),
                                   [InputTag(key, value) for key, value in tags.items()]))
    used = {each.model_id for each in client.get_run(run.info.run_id).inputs.model_inputs}   # `run` may lack them
    made_of = {each.model_id for source in entry.sources
               for each in client.get_run(source.run_id).outputs.model_outputs}
    client.log_inputs(run.info.run_id, inputs, [LoggedModelInput(model) for model in sorted(made_of - used)])
    if entry.page:
        client.log_text(run.info.run_id, entry.page, "report.html")


def _model(client: Any, experiment: str, run_id: str, entry: Entry, content: Any) -> Any:
    """The logged model with its files uploaded: the one that an interrupted registration left, or a new one."""
    same_content = f"tags.`moa.digest`='{entry.digest}' and tags.`moa.model`='{entry.name}'"
    existing = client.search_logged_models([experiment], same_content, max_results=1)
    model = existing[0] if existing else client.create_logged_model(
        experiment, name=entry.name, source_run_id=run_id, tags=entry.all_tags, model_type=f"moa-{entry.kind}")
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory() as temporary:
            client.log_model_artifacts(model.model_id, str(content(Path(temporary))))
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _chat_model(workspace: Workspace, settings: dict[str, str], temporary: Path) -> Path:
    """The mixture as a models-from-code pyfunc: MLmodel, script, artifacts/mixture and artifacts/reports."""
    from mlflow.pyfunc import save_model

    script = temporary / "chat_mixture.py"
    script.write_text(SCRIPT, encoding="utf-8")
    artifacts = {folder.name: str(folder) for folder in (workspace.mixture, workspace.reports) if folder.is_dir()}
    save_model(temporary / "model", python_model=str(script), artifacts=artifacts, model_config=settings,
               signature=False, pip_requirements=list(_requirements()))
    return temporary / "model"


def _requirements() -> Iterator[str]:
    """The packages that the model needs, pinned. moa itself is left out: an index may not have this version."""
    for package in RUNTIME:
        try:
            yield f"{package}=={installed(package).split('+')[0]}"
        except PackageNotFoundError:
            continue


# Facts from manifests.

def _manifest(folder: Path, message: str) -> dict[str, Any]:
    """The manifest in `folder`. Raises RegistryError with `message` where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        raise RegistryError(message)
    manifest: dict[str, Any] = read_json(path)
    return manifest


def _check_experts(manifest: Mapping[str, Any], experts: Mapping[str, "ExpertVersion"]) -> None:
    """Raise RegistryError unless the mixture was assembled from `experts`."""
    # Joint training changes the experts in the mixture; `parent` is the registered expert that it began with.
    pinned = {domain: pin.get("parent") or _digest(pin) if isinstance(pin, dict) else _digest(pin)
              for domain, pin in manifest["experts"].items()}
    for domain in sorted(pinned.keys() | experts.keys()):
        registered = experts[domain].digest if domain in experts else None
        if pinned.get(domain) != registered:
            raise RegistryError(
                f"The mixture was assembled from another expert of {domain!r} than the one registered "
                f"({pinned.get(domain, 'none')[:12]} and {(registered or 'none')[:12]}): run `moa assemble`.")


def _corpora(mixture: Path, labels: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Domain and digest of the corpus that each expert in the mixture learned from."""
    for domain in labels:
        path = mixture / "experts" / domain / MANIFEST
        if path.is_file():
            yield domain, read_json(path)["corpus"]


def _link(version: Any) -> str:
    """A Markdown link to the version's page in MLflow."""
    return f"[{version.name} version {version.version}](#/models/{version.name}/versions/{version.version})"


def _digest(pin: Any) -> str:
    """The digest of a manifest's pin, which is a digest, a record with a digest, or facts to compute a digest of."""
    if isinstance(pin, str):
        return pin
    return str(pin["digest"]) if "digest" in pin else digests.of_json(pin)


def _source(manifest: Mapping[str, Any]) -> str:
    """The source of the base, such as `hub:NAME@COMMIT`; old manifests have it at their top level."""
    base = manifest["base"]
    return str(base["source"] if isinstance(base, dict) else manifest.get("source", ""))

"""How an expert or a mixture becomes an MLflow version. Everything before the version itself may be done twice.

    run, params, curves, inputs -> logged model -> its files -> version

Runs and logged models carry the digest of what they are for. Where one is found, it is continued, so a crash between
any two steps costs nothing and leaves nothing twice. Part of `moa.release.registry`, which holds the lock meanwhile.
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
                    "`champion` serves; tags `moa.champion.*` say who did, when and why."}
RUNTIME = ("mlflow", "numpy", "pydantic", "ruamel.yaml", "safetensors", "torch", "transformers")
VERSIONS = "mlflow.modelVersions"   # MLflow's own tag


@dataclass
class Entry:
    """What one version will say of itself."""

    name: str                    # of the registered model
    run_name: str
    kind: str                    # expert or mixture
    digest: str
    tags: dict[str, str]         # of run, logged model and version
    pins: dict[str, str]         # tags of the version alone, which may be longer than a run's
    params: dict[str, Any]
    points: list[lineage.Point]
    corpora: dict[str, str]      # digest by domain
    sources: list[Any]           # versions that it is made of, or continues
    description: str = ""        # Markdown, for MLflow's pages
    page: str = ""               # HTML, kept with the run
    all_tags: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.all_tags = {"moa.kind": self.kind, "moa.model": self.name, "moa.digest": self.digest, **self.tags}


def register_expert(registry: "Registry", domain: str) -> tuple[Any, bool]:
    """MLflow's version of the expert of `domain`, and whether it is new."""
    folder = registry.workspace.expert(domain)
    manifest = _manifest(folder, f"Domain {domain!r} has no expert: run `moa train --domain {domain}` first.")
    with mlflow_client.mlflow_errors(registry.address):
        name = registry.names.expert(domain)
        ownership.claim(registry, name)
        if (found := _version(registry, name, manifest["digest"])) is not None:
            return _linked(registry, found), False
        base, imported = manifest["base"], manifest.get("source") == "imported"
        parent = _digest(manifest["parent"]) if manifest.get("parent") else None
        parents = _anywhere(registry, parent) if parent else []
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
    """MLflow's version of `data/mixture`, and whether it is new. `page` makes the HTML that a new one is shown by."""
    workspace, folder = registry.workspace, registry.workspace.mixture
    manifest = _manifest(folder, "There is no mixture: run `moa assemble` first.")
    _check_experts(manifest, experts)
    with mlflow_client.mlflow_errors(registry.address):
        name = registry.mixture_name
        ownership.claim(registry, name)
        if (found := _version(registry, name, manifest["digest"])) is not None:
            return _named(registry, _linked(registry, found)), False
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
             **{f"router.{key}": router[key] for key in ("rule", "layer", "temperature", "threshold") if key in router},
             **{f"expert.{domain}": f"{pin['name']}/{pin['version']}" for domain, pin in pins.items()}},
            [*lineage.evaluation_metrics(workspace.reports / "summary.json"),
             *((f"router/level_{key}", each[key], each["level"]) for each in router.get("levels", ())
               for key in ("accuracy", "agreement"))],   # a layer is a step, so that MLflow draws the curve
            dict(_corpora(folder, manifest["labels"])),
            made_of,
            f"Mixture-of-LoRAs over {base['source']}.\n\n| domain | expert | corpus |\n|---|---|---|{table}",
            page())
        settings = {"base_source": base["source"], "base_digest": base["digest"], "workspace": str(workspace.root)}
        made = _register(registry, entry, lambda temporary: _chat_model(workspace, settings, temporary))
        return _named(registry, made), True


# The steps of a registration. Each finds what an interrupted one left.

def _anywhere(registry: "Registry", digest: str) -> list[Any]:
    """The oldest of our experts' versions with this content, whatever its name; empty when there is none."""
    found = [version for version in registry.client.search_model_versions(f"tags.`moa.digest`='{digest}'")
             if version.name.startswith(registry.names.expert(""))]
    return sorted(found, key=lambda version: int(version.creation_timestamp))[:1]


def _version(registry: "Registry", name: str, digest: str) -> Any:
    """The oldest version with this content, or None."""
    found = registry.client.search_model_versions(f"name='{name}' and tags.`moa.digest`='{digest}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _register(registry: "Registry", entry: Entry, content: Any) -> Any:
    """`content` makes the folder that holds the version's files, when they must be uploaded, out of an empty one."""
    client, experiment = registry.open()
    run = _run(client, experiment, entry)
    _describe(client, run, entry, registry.workspace)
    model = _model(client, experiment, run.info.run_id, entry, content)
    outputs = client.get_run(run.info.run_id).outputs
    if model.model_id not in {each.model_id for each in (outputs.model_outputs if outputs else [])}:
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.set_terminated(run.info.run_id)
    try:
        client.create_registered_model(entry.name, ownership.tags(registry), ABOUT[entry.kind])
    except Exception as error:
        if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
        ownership.claim(registry, entry.name)   # it may be new, and another project's
    with mlflow_client.default_uri(registry.address):
        return _linked(registry, client.create_model_version(
            entry.name, f"models:/{model.model_id}", run.info.run_id, tags={**entry.all_tags, **entry.pins},
            description=entry.description, model_id=model.model_id))


def _linked(registry: "Registry", version: Any) -> Any:
    """The version, its logged model naming it, which MLflow's pages want and nothing here reads."""
    model = registry.client.get_logged_model(version.source.rpartition("/")[2])
    if VERSIONS not in model.tags:
        named = json.dumps([{"name": version.name, "version": int(version.version)}])
        registry.client.set_logged_model_tags(model.model_id, {VERSIONS: named})
    return version


def _named(registry: "Registry", mixture: Any) -> Any:
    """The mixture, each of its experts' versions naming the newest mixture that pins it, also on MLflow's pages."""
    tag, client = f"moa.in.{mixture.name}", registry.client
    for pin in json.loads(mixture.tags["moa.experts"]).values():
        expert = client.get_model_version(pin["name"], str(pin["version"]))
        if int(expert.tags.get(tag, 0)) < int(mixture.version):
            client.set_model_version_tag(expert.name, str(expert.version), tag, str(mixture.version))
    return mixture


def _run(client: Any, experiment: str, entry: Entry) -> Any:
    mine = f"tags.`moa.digest`='{entry.digest}' and tags.`moa.model`='{entry.name}'"
    if left := client.search_runs([experiment], mine, max_results=1):
        return left[0]
    shown = {"mlflow.source.name": "moa", "mlflow.source.type": "LOCAL", "mlflow.note.content": entry.description}
    if "moa.git.commit" in entry.tags:
        shown["mlflow.source.git.commit"] = entry.tags["moa.git.commit"]
    return client.create_run(experiment, tags={**entry.all_tags, **shown}, run_name=entry.run_name)


def _describe(client: Any, run: Any, entry: Entry, workspace: Workspace) -> None:
    """Params, metrics and inputs. MLflow keeps the same metric at the same time once: hence the run's own clock."""
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
        # MLflow's column holds 36 characters, as many as DVC's digest of a folder has; ours is whole in the tag.
        source = json.dumps({"path": workspace.relative(workspace.corpus(domain))})
        inputs.append(DatasetInput(Dataset(domain, known.get(domain, digest)[:36], "dvc", source),
                                   [InputTag(key, value) for key, value in tags.items()]))
    used = {each.model_id for each in client.get_run(run.info.run_id).inputs.model_inputs}   # a search leaves them out
    made_of = {each.model_id for source in entry.sources
               for each in client.get_run(source.run_id).outputs.model_outputs}
    client.log_inputs(run.info.run_id, inputs, [LoggedModelInput(model) for model in sorted(made_of - used)])
    if entry.page:
        client.log_text(run.info.run_id, entry.page, "report.html")


def _model(client: Any, experiment: str, run_id: str, entry: Entry, content: Any) -> Any:
    """The logged model with its files, ready."""
    mine = f"tags.`moa.digest`='{entry.digest}' and tags.`moa.model`='{entry.name}'"
    left = client.search_logged_models([experiment], mine, max_results=1)
    model = left[0] if left else client.create_logged_model(
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
    """What the model runs on. Not `moa`, installed by hand: a package index may hold a stranger of that name."""
    for package in RUNTIME:
        try:
            yield f"{package}=={installed(package).split('+')[0]}"
        except PackageNotFoundError:
            continue


# What manifests say.

def _manifest(folder: Path, otherwise: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise RegistryError(otherwise)
    manifest: dict[str, Any] = read_json(path)
    return manifest


def _check_experts(manifest: Mapping[str, Any], experts: Mapping[str, "ExpertVersion"]) -> None:
    # Joint training goes on from registered experts: those are what the mixture was assembled from.
    pinned = {domain: pin.get("parent") or _digest(pin) if isinstance(pin, dict) else _digest(pin)
              for domain, pin in manifest["experts"].items()}
    for domain in sorted(pinned.keys() | experts.keys()):
        given = experts[domain].digest if domain in experts else None
        if pinned.get(domain) != given:
            raise RegistryError(
                f"The mixture was assembled from another expert of {domain!r} than the one registered "
                f"({pinned.get(domain, 'none')[:12]} and {(given or 'none')[:12]}): run `moa assemble`.")


def _corpora(mixture: Path, labels: Iterable[str]) -> Iterator[tuple[str, str]]:
    for domain in labels:
        path = mixture / "experts" / domain / MANIFEST
        if path.is_file():
            yield domain, read_json(path)["corpus"]


def _link(version: Any) -> str:
    """To the page of a version, for a reader of MLflow's pages."""
    return f"[{version.name} version {version.version}](#/models/{version.name}/versions/{version.version})"


def _digest(pin: Any) -> str:
    """A pin is a digest, a record that holds one, or facts that are their own."""
    if isinstance(pin, str):
        return pin
    return str(pin["digest"]) if "digest" in pin else digests.of_json(pin)


def _source(manifest: Mapping[str, Any]) -> str:
    base = manifest["base"]
    return str(base["source"] if isinstance(base, dict) else manifest.get("source", ""))

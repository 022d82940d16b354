"""Adds, removes and checks domains: their rows in data/raw/NAME and their entry in params.yaml.

Each operation is a transaction: it changes everything or nothing. `check` reports on a domain's rows before training.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from moa.core import config as parameters
from moa.core import git
from moa.core.config import Config, Domain, DomainName
from moa.core.errors import ArtifactError, UsageError
from moa.core.files import read_json, write_json
from moa.core.names import escaped, is_valid_unicode
from moa.core.paths import MANIFEST, Workspace
from moa.core.transaction import transaction
from moa.data import overlap
from moa.data.conversations import fields
from moa.evaluation import metrics
from moa.experts.train import Checkpoint
from moa.workspace import params_editor, row_sources, warm_starts
from moa.workspace.data_versions import DataVersions
from moa.workspace.origins import note as _note_origins
from moa.workspace.origins import origins as origins
from moa.workspace.pipeline import Pipeline
from moa.workspace.row_sources import HubDataset, SourceFile
from moa.workspace.stage_graph import PER_DOMAIN

METRIC = "rouge_l"   # of a new domain
MAPPED = ("instruction", "input", "output", "system", "messages")   # keys of `map`, as in moa.core.config
# Command-line options by key of config.Domain.
OPTIONS = {"metric": "--metric", "map": "--map", "template": "--template", "group_by": "--group-by"}


def valid_name(name: str) -> str:
    """Return `name` if it can be the name of a domain. Raises UsageError saying what is allowed."""
    try:
        return TypeAdapter(DomainName).validate_python(name)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"{name!r} cannot be the name of a domain: {reason}.") from None


# Adding.

def add(workspace: Workspace, name: str, sources: Sequence[str], here: Path, reading: Mapping[str, Any],
        hub: HubDataset | None = None) -> dict[str, Any]:
    """Add the rows of `sources` to domain `name`, which is created if params.yaml lacks it.

    Args:
        sources: files, folders or data sets of a hub; with none, the files that lie in data/raw/NAME are taken.
        here: folder that relative sources start from.
        reading: fields of config.Domain that the user gave.
        hub: which part of a hub's data set to take.

    Returns:
        Facts for `moa.reports.domains.added_text`: the files, those that were skipped and why, and the changed paths.

    Raises UsageError, ConfigError or DataError, and then nothing has changed.
    """
    versions = DataVersions(workspace)
    raw, tracked = workspace.raw(valid_name(name)), workspace.tracked(name)
    with versions.lock():
        config = parameters.load(workspace.params)
        domain = reading_of(config, name, reading)
        refuse_generated(versions, config, name)
        with row_sources.gathered(workspace, sources, here, hub or HubDataset()) as gathered:
            present = raw_files(workspace, name)
            if not gathered.found and not present:
                raise UsageError(f"Name at least one file, folder or {row_sources.HUB} with rows of {name}.")
            for source in gathered.found or present:
                row_sources.check(source, domain)
            known = {source.digest for source in present}
            new = {free_name(source, raw): source for source in gathered.found if source.digest not in known}
            by_hand = [] if tracked.exists() else [source.origin for source in present]
            changed = add_files(versions, name, domain, new, f"moa domain add {name}")
    return {"domain": name, "new": name not in config.domains,
            "files": [{"name": file, "origin": source.origin, "size": source.size, "digest": source.digest}
                      for file, source in new.items()],
            "already_there": [*(source.origin for source in gathered.found if source.digest in known), *gathered.twice],
            "versioned_along": by_hand, "ignored": list(gathered.ignored), "changed": changed}


def reading_of(config: Config, name: str, given: Mapping[str, Any]) -> Domain:
    """The settings that a domain's rows are read with: those of params.yaml, or for a new domain those `given`.

    Raises UsageError when `given` contradicts params.yaml or itself.
    """
    for key, text in _texts(given):
        if not is_valid_unicode(text):
            raise UsageError(f"{OPTIONS[key]} {escaped(text)} is no UTF-8, and params.yaml cannot hold it: rename the "
                             "column in the file.")
    if name in config.domains:
        domain = config.domains[name]
        for key, value in given.items():
            if (configured := getattr(domain, key)) != value:
                raise UsageError(f"params.yaml reads {name} with {key}: {_shown(configured)}, and {OPTIONS[key]} says "
                                 f"{_shown(value)}; leave {OPTIONS[key]} out, or edit domains.{name} in params.yaml.")
        return domain
    metrics.resolve(given.get("metric", METRIC))
    if unknown_keys := [key for key in given.get("map", {}) if key not in MAPPED]:
        raise UsageError(f"--map has no key {unknown_keys[0]!r}; it has {', '.join(MAPPED)}.")
    if (template := given.get("template")) is not None:
        try:
            columns = fields(template)
        except ValueError as error:
            raise UsageError(f"--template {template!r} is not understood: {error}.") from None
        if not columns:
            raise UsageError(f"--template {template!r} names no column; write {{column}} where a column's text goes.")
        if contradicting := [key for key in ("instruction", "input") if key in given.get("map", {})]:
            raise UsageError(f"--template and --map {contradicting[0]} contradict each other: the template is the "
                             "instruction.")
    return Domain(**{"metric": METRIC, **given})


def _texts(given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and text of every text among the options, the columns of a mapping included."""
    for key, value in given.items():
        yield from ((key, text) for text in (value.values() if isinstance(value, Mapping) else (value,))
                    if isinstance(text, str))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={column}" for key, column in value.items()) or "not set"
    return "not set" if value is None else str(value)


def refuse_generated(versions: DataVersions, config: Config, name: str) -> None:
    """Raise UsageError if a stage generates the rows of `name`: it would overwrite what is added."""
    raw = versions.workspace.relative(versions.workspace.raw(name))
    makers = [stage.name for stage in versions.snapshot().graph.stages.values()
              if stage.command and raw in stage.outputs]
    if name in config.quickstart or makers:
        raise UsageError(f"The rows of {name} are generated by {makers[0] if makers else 'quickstart in params.yaml'}: "
                         f"add yours under another name, or run `moa domain remove {name}` first.")


def raw_files(workspace: Workspace, name: str) -> list[SourceFile]:
    """The files with rows in data/raw/NAME. Raises UsageError for a symbolic link, or a file name that is not UTF-8."""
    raw = workspace.raw(name)
    if raw.is_symlink() or (raw.exists() and not raw.is_dir()):
        raise UsageError(f"{workspace.relative(raw)} is not a folder of its own; move it away, and name what it leads "
                         "to as the source.")
    if odd := next((path for path in raw.rglob("*") if not is_valid_unicode(path.name)), None):
        raise UsageError(f"The name of {escaped(workspace.relative(odd))} is no UTF-8, which DVC needs: rename it, or "
                         f"move it away and name it as the source of `moa domain add {name}`.")
    return [row_sources.look(path, path.relative_to(raw).as_posix()) for path in row_sources.raw_files(raw)]


def free_name(file: SourceFile, raw: Path) -> str:
    """A name for the file in `raw` that no file has: the usual one, or one with the whole digest.

    A file of the usual name may exist with other content, because the user edited it.
    """
    return file.name() if not (raw / file.name()).exists() else file.name(64)


def add_files(versions: DataVersions, name: str, domain: Domain, new: Mapping[str, SourceFile], operation: str, *,
              link: bool = False) -> list[str]:
    """Add the files of `new` to data/raw/NAME, all or none, and the domain to params.yaml if it is not there.

    The caller holds the workspace's lock and has checked the rows.

    Args:
        new: files by their names in data/raw/NAME.
        operation: the user's command, for messages about an interrupted transaction.
        link: hard links suffice, because no other program will write to these files.

    Returns:
        The changed paths, relative to the workspace.
    """
    workspace = versions.workspace
    raw, tracked, params = workspace.raw(name), workspace.tracked(name), workspace.params
    text = params.read_bytes().decode("utf-8")
    exists = name in parameters.load(params).domains
    wanted = text if exists else params_editor.add_domain(text, name, domain.model_dump(exclude_unset=True))
    before = tracked.read_bytes() if tracked.exists() else None
    with transaction(workspace, operation, files=[params, tracked, raw.parent / ".gitignore"], folders=[raw]) as change:
        if new:
            with change.replace(raw) as folder:
                _link_tree(raw, folder)
                for file, found in new.items():
                    row_sources.copy_checked(found, folder / file, link=link)
        versions.add(raw)
        _note_origins(tracked, {file: found.origin for file, found in new.items()})
        if wanted != text:
            change.write(params, wanted)
            parameters.load(params)
    changed = {params: wanted != text, raw: bool(new), tracked: tracked.read_bytes() != before}
    return [workspace.relative(path) for path, different in changed.items() if different]


def _link_tree(source: Path, target: Path) -> None:
    """Copy the files of `source` to `target`, as hard links where the file system has them."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError:
        shutil.copy2(source, target)


# Removing.

def remove(workspace: Workspace, name: str, *, purge: bool = False) -> dict[str, Any]:
    """Remove domain `name` from the workspace, with its rows, corpus and expert.

    Args:
        purge: also delete from DVC's cache what only this domain used.

    Returns:
        Facts for `moa.reports.domains.removed_text`, with the number of `others`: domains verified to be unchanged.

    After an error nothing has changed.

    Raises:
        ConfigError: there is no such domain.
        ArtifactError: the removal would change another domain.
        UsageError: with `purge`, DVC's cache may be shared with other projects.
        GitError: with `purge`, git does not show the history of the rows.
    """
    versions = DataVersions(workspace)
    valid_name(name)
    with versions.lock():
        config = parameters.load(workspace.params)
        if not (_traces(workspace, name) or purge or name in config.quickstart):
            config.require_domain(name)
        history = _history(workspace, name, required=purge)
        if purge and not versions.cache_is_ours():
            raise UsageError("DVC's cache lies outside this workspace, where other projects may use it: run the "
                             "command without --purge, and `dvc gc` for all of these projects together.")
        removal = _remove_locked(versions, name, f"moa domain remove {name}", history)
        warm_starts.prune(versions)   # not where an attempt is undone: it may put earlier starts back
        return removal | {"purged": _purge(versions, name) | {"shallow": history.shallow} if purge else None}


def _folders(workspace: Workspace, name: str) -> list[Path]:
    return [workspace.raw(name), workspace.corpus(name), workspace.expert(name)]


def _traces(workspace: Workspace, name: str) -> list[Path]:
    return [path for path in (*_folders(workspace, name), workspace.tracked(name)) if path.exists()]


def _remove_locked(versions: DataVersions, name: str, operation: str, history: "_History") -> dict[str, Any]:
    """Remove the domain in one transaction. The caller holds the lock. Returns the facts of `remove` but `purged`."""
    workspace = versions.workspace
    folders, tracked = _folders(workspace, name), workspace.tracked(name)
    stages = [f"{step}@{name}" for step in sorted(PER_DOMAIN)]
    config, traces = parameters.load(workspace.params), _traces(workspace, name)
    roots = _versions(versions, name, stages, history)
    text = workspace.params.read_bytes().decode("utf-8")
    wanted = params_editor.remove_domain(text, name)
    others = _others(versions, config, name)
    dropped = [stage for stage in stages if stage in versions.recorded()]
    files = [workspace.params, tracked, workspace.starts, workspace.root / "dvc.lock",
             *(folder.parent / ".gitignore" for folder in folders)]
    with transaction(workspace, operation, files=files, folders=folders) as change:
        change.write(workspace.params, wanted)
        for folder in folders:
            change.take_out(folder)
        tracked.unlink(missing_ok=True)
        versions.forget(stages, folders)
        warm_starts.forget(versions, [name])
        _require_same(others, _others(versions, parameters.load(workspace.params), name))
        write_json(workspace.removed(name), roots)
    (workspace.local / "rejected" / f"{name}.jsonl").unlink(missing_ok=True)
    Checkpoint(workspace, {name: ""}).clear()
    return {"domain": name, "removed": [workspace.relative(path) for path in traces], "lock_entries": dropped,
            "params": wanted != text, "others": len(others)}


def _others(versions: DataVersions, config: Config, name: str) -> dict[str, dict[str, Any]]:
    """The state of every other domain: its entries of dvc.lock, its stale stages, its files and its .dvc file."""
    workspace, recorded, stale = versions.workspace, versions.recorded(), versions.snapshot().stale
    states: dict[str, dict[str, Any]] = {}
    for other in sorted({*config.domains, *config.quickstart} - {name}):
        stages = [f"{step}@{other}" for step in sorted(PER_DOMAIN)]
        paths = [path for folder in (workspace.raw(other), workspace.corpus(other), workspace.expert(other))
                 for path in sorted(folder.rglob("*"))]
        tracked = workspace.tracked(other)
        states[other] = {
            "its entries of dvc.lock": {stage: recorded.get(stage) for stage in stages},
            "the staleness of its steps": {stage: stale.get(stage) for stage in stages},
            "its files": {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths},
            "its data in DVC": tracked.read_bytes() if tracked.exists() else None}
    return states


def _require_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raise ArtifactError where two results of `_others` differ."""
    for other, facts in before.items():
        if other not in after:
            raise ArtifactError(f"The domain {other} would have gone, too, so nothing was changed.")
        for kind, value in facts.items():
            if after[other][kind] != value:
                raise ArtifactError(f"The domain {other} would not be untouched ({kind} would differ), so nothing was "
                                    "changed.")


def _versions(versions: DataVersions, name: str, stages: Sequence[str], history: "_History") -> list[str]:
    """DVC's digests of the domain's present and earlier data, corpora and experts, the earlier ones from `history`."""
    workspace, recorded = versions.workspace, versions.recorded()
    md5s = read_json(workspace.removed(name)) if workspace.removed(name).exists() else []
    md5s += [out["md5"] for stage in stages for out in recorded.get(stage, {}).get("outs", ()) if "md5" in out]
    tracked = workspace.tracked(name)
    texts = [tracked.read_text(encoding="utf-8")] if tracked.exists() else []
    md5s += re.findall(r"md5: ([0-9a-f]{32}(?:\.dir)?)", "\n".join([*texts, history.text]))
    return sorted(set(md5s))


class _History(NamedTuple):
    """The history of data/raw/NAME.dvc in git."""

    text: str       # every line that the file ever had
    shallow: bool   # whether the repository is a shallow clone, which lacks older commits


def _history(workspace: Workspace, name: str, *, required: bool = False) -> _History:
    """The history of the domain's .dvc file; empty where there is no repository.

    Where git fails, raises GitError if the history is `required`; otherwise the result is empty.
    """
    root = workspace.root
    try:
        if git.repository(root) is None:
            return _History("", shallow=False)
        # --all and --reflog include every branch and amended commits; --full-history and -m include merges and side
        # branches, which a file's log omits; the other options override git settings that change how diffs are shown.
        text = git.run(root, "log", "--all", "--reflog", "--full-history", "-m", "-p", "--text", "--no-ext-diff",
                       "--no-textconv", "--format=", "--", workspace.relative(workspace.tracked(name)))
        return _History(text, git.is_shallow(root))
    except git.GitError:
        if required:
            raise
        return _History("", shallow=False)


def _purge(versions: DataVersions, name: str) -> dict[str, Any]:
    workspace = versions.workspace
    folders, roots = _folders(workspace, name), read_json(workspace.removed(name))
    shutil.rmtree(workspace.cache / "features", ignore_errors=True)   # of the domain's prompts; they are computed again
    purged = versions.purge({workspace.relative(folder) for folder in folders}, roots)
    if not purged["kept"]:
        workspace.removed(name).unlink()
    return purged


# Reverting rows.

def version_rows(versions: DataVersions, name: str) -> None:
    """Version the present rows in data/raw/NAME, so that `revert_rows` can restore them.

    Does nothing for a domain that is not in params.yaml, has no rows, or has generated rows. The caller holds the lock.
    """
    config = parameters.load(versions.workspace.params)
    if name in config.domains and raw_files(versions.workspace, name):
        try:
            refuse_generated(versions, config, name)
        except UsageError:
            return
        add_files(versions, name, config.domains[name], {}, f"moa domain add {name}")


def revert_rows(versions: DataVersions, name: str, before: str | None) -> None:
    """Restore an earlier version of data/raw/NAME from DVC's cache.

    Args:
        before: the earlier text of data/raw/NAME.dvc; "" = the domain had no rows; None = there was no such domain, so
            it is removed.

    The caller holds the lock. Raises ArtifactError when DVC's cache lacks a file, and then nothing has changed.
    """
    workspace, operation = versions.workspace, f"going back to the earlier rows of {name}"
    raw, tracked = workspace.raw(name), workspace.tracked(name)
    if before is None:
        if name in parameters.load(workspace.params).domains or _traces(workspace, name):
            _remove_locked(versions, name, operation, _history(workspace, name))
        return
    if not before:
        with transaction(workspace, operation, files=[tracked, raw.parent / ".gitignore"], folders=[raw]) as change:
            change.take_out(raw)
            tracked.unlink(missing_ok=True)
            versions.forget([], [raw])
        return
    md5, files = _tracked_digest(before)
    cached = versions.cached(md5)
    if len(cached) < files:
        raise ArtifactError(f"DVC's cache lacks {files - len(cached)} of the {files} earlier files of {name}: run "
                            f"`dvc fetch`, or put them back into {workspace.relative(raw)} yourself.")
    with transaction(workspace, operation, files=[tracked, raw.parent / ".gitignore"], folders=[raw]) as change:
        with change.replace(raw) as folder:
            for file, path in cached.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, folder / file)   # not a link: editing the file would change the cache
        versions.add(raw)
        if _tracked_digest(tracked.read_text(encoding="utf-8"))[0] != md5:
            raise ArtifactError(f"DVC's cache holds other bytes for {name} than their digests say")
        change.write(tracked, before)


def _tracked_digest(text: str) -> tuple[str, int]:
    """DVC's digest of the folder that a .dvc file names, and its number of files."""
    out = YAML(typ="safe").load(text)["outs"][0]
    return out["md5"], int(out.get("nfiles", 0))


def check(workspace: Workspace, config: Config, domain: str, tell: Callable[[str], None]) -> dict[str, Any]:
    """Report on the quality of a domain's rows, after running the stages that prepare them where these are stale.

    Args:
        tell: called with the name of each stage before it runs.

    Returns:
        The content of the corpus's quality.json, with the comparison to other domains under `across`, under `power` a
        sentence on what the gate can tell from the domain's test rows, and under `promise` one on what the router can
        promise of prompts that it leaves to the base.

    Raises PipelineError when the corpus cannot be prepared.
    """
    from moa.evaluation import power, promises  # imports scipy, which takes long

    pipeline = Pipeline(workspace)
    with pipeline.lock():
        _bring_up_to_date(pipeline, f"prepare@{config.require_domain(domain)}", tell)
        report: dict[str, Any] = read_json(workspace.corpus(domain) / "quality.json")
        compared = overlap.domain_overlap(workspace, config, domain)
        manifest = read_json(workspace.corpus(domain) / MANIFEST)
        resolution = power.resolution(manifest, config.release)
    promise = promises.expected({domain: manifest}, config.assemble)
    unjudged = [f"The gate cannot judge {domain}: its test rows are {resolution.groups} groups, and "
                f"{config.release.min_rows} are needed. Rows with the same answer are one group."
                ] if resolution and resolution.rise is None else []
    return {**report, "across": compared, "power": power.sentence(domain, resolution, config.release)
            if resolution else None, "promise": promise[0] if promise else None,
            "warnings": [*report["warnings"], *compared.pop("warnings"), *unjudged]}


def _bring_up_to_date(pipeline: Pipeline, target: str, tell: Callable[[str], None]) -> None:
    """Run the stale stages among `target` and its ancestors, and no others."""
    graph = pipeline.snapshot().graph
    graph.matching(target)   # raises UsageError where dvc.yaml has no such stage
    needed, new = set(), {target}
    while new:
        needed |= new
        new = {above for name in new for above in graph.upstream(name)} - needed
    for name in (name for generation in graph.generations() for name in generation if name in needed):
        if graph.stages[name].command and name in pipeline.stale([name]):
            tell(name)
            pipeline.reproduce(name, lambda _: None)

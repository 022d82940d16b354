"""Domains come and go: rows into data/raw/NAME, the domain into or out of params.yaml, all of it or nothing.

Knows nothing of what the steps make of the rows; others' corpora and experts it only proves to be as they were.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from moa import config as parameters
from moa import digests, intake, metrics, splice
from moa.change import changing
from moa.config import Config, Domain, DomainName
from moa.conversation import fields
from moa.errors import ArtifactError, UsageError
from moa.experts import Checkpoint
from moa.graph import PER_DOMAIN
from moa.intake import Found, Hub
from moa.versions import Versions
from moa.workspace import Workspace, read_json, write_json

METRIC = "rouge_l"
MAPPED = ("instruction", "input", "output", "system", "messages")   # keys of `map`, as moa.config has them
OPTIONS = {"metric": "--metric", "map": "--map", "template": "--template", "group_by": "--group-by"}


def valid_name(name: str) -> str:
    """`name` if a domain may be called so. Raises UsageError with what is allowed."""
    try:
        return TypeAdapter(DomainName).validate_python(name)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"{name!r} cannot be the name of a domain: {reason}.") from None


# Adding.

def add(workspace: Workspace, name: str, sources: Sequence[str], here: Path, reading: Mapping[str, Any],
        hub: Hub | None = None) -> dict[str, Any]:
    """Take the rows of `sources` into domain `name`, which is made if there is none; what was done.

    `reading` holds the keys of config.Domain that were given. No sources: the files that lie in data/raw/NAME already.
    Raises UsageError, ConfigError or DataError, and then nothing has changed.
    """
    pipeline = Versions(workspace)
    raw, tracked = workspace.raw(valid_name(name)), workspace.tracked(name)
    with pipeline.lock():
        config = parameters.load(workspace.params)
        domain = _reading(config, name, reading)
        _refuse_generated(pipeline, config, name)
        with intake.gathered(workspace, sources, here, hub or Hub()) as gathered:
            present = _present(workspace, name)
            if not gathered.found and not present:
                raise UsageError(f"Name at least one file, folder or {intake.HUB} with rows of {name}.")
            for found in gathered.found or present:
                intake.check(found, domain)
            known = {found.digest for found in present}
            new = {_free_name(found, raw): found for found in gathered.found if found.digest not in known}
            by_hand = [] if tracked.exists() else [found.origin for found in present]
            changed = _take_in(pipeline, config, name, domain, new)
    return {"domain": name, "new": name not in config.domains,
            "files": [{"name": file, "origin": found.origin, "size": found.size, "digest": found.digest}
                      for file, found in new.items()],
            "already_there": [*(found.origin for found in gathered.found if found.digest in known), *gathered.twice],
            "versioned_along": by_hand, "ignored": list(gathered.ignored), "changed": changed}


def _reading(config: Config, name: str, given: Mapping[str, Any]) -> Domain:
    """How the domain's rows are read: as params.yaml says, or as was asked. Raises UsageError for contradictions."""
    if name in config.domains:
        domain = config.domains[name]
        for key, value in given.items():
            if (found := getattr(domain, key)) != value:
                raise UsageError(f"params.yaml reads {name} with {key}: {_shown(found)}, and {OPTIONS[key]} says "
                                 f"{_shown(value)}; leave {OPTIONS[key]} out, or edit domains.{name} in params.yaml.")
        return domain
    metrics.resolve(given.get("metric", METRIC))
    if unknown := [key for key in given.get("map", {}) if key not in MAPPED]:
        raise UsageError(f"--map has no key {unknown[0]!r}; it has {', '.join(MAPPED)}.")
    if (template := given.get("template")) is not None:
        try:
            named = fields(template)
        except ValueError as error:
            raise UsageError(f"--template {template!r} is not understood: {error}.") from None
        if not named:
            raise UsageError(f"--template {template!r} names no column; write {{column}} where a column's text goes.")
        if both := [key for key in ("instruction", "input") if key in given.get("map", {})]:
            raise UsageError(f"--template and --map {both[0]} contradict each other: the template is the instruction.")
    return Domain(**{"metric": METRIC, **given})


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={column}" for key, column in value.items()) or "nothing"
    return "nothing" if value is None else str(value)


def _refuse_generated(pipeline: Versions, config: Config, name: str) -> None:
    raw = pipeline.workspace.relative(pipeline.workspace.raw(name))
    makers = [stage.name for stage in pipeline.snapshot().graph.stages.values()
              if stage.command and raw in stage.outputs]
    if name in config.quickstart or makers:
        raise UsageError(f"The rows of {name} are generated by {makers[0] if makers else 'quickstart in params.yaml'}: "
                         f"add yours under another name, or run `moa domain remove {name}` first.")


def _present(workspace: Workspace, name: str) -> list[Found]:
    """The files with rows that lie in data/raw/NAME."""
    raw = workspace.raw(name)
    if raw.is_symlink() or (raw.exists() and not raw.is_dir()):
        raise UsageError(f"{workspace.relative(raw)} is not a folder of its own; move it away, and name what it leads "
                         "to as the source.")
    return [Found(path, intake.stem(path.stem), digests.of_file(path), path.relative_to(raw).as_posix(),
                  path.stat().st_size) for path in intake.files(raw)]


def _free_name(found: Found, raw: Path) -> str:
    """A file of the usual name may have been edited since it was added: it is left alone."""
    return found.name() if not (raw / found.name()).exists() else found.name(64)


def _take_in(pipeline: Versions, config: Config, name: str, domain: Domain, new: Mapping[str, Found]) -> list[str]:
    """Make the change; the paths that are different now."""
    workspace = pipeline.workspace
    raw, tracked, params = workspace.raw(name), workspace.tracked(name), workspace.params
    text = params.read_bytes().decode("utf-8")
    wanted = text if name in config.domains else splice.add_domain(text, name, domain.model_dump(exclude_unset=True))
    before = tracked.read_bytes() if tracked.exists() else None
    with changing(workspace, f"moa domain add {name}", files=[params, tracked, raw.parent / ".gitignore"],
                  folders=[raw]) as change:
        if new:
            with change.replace(raw) as folder:
                _link_tree(raw, folder)
                for file, found in new.items():
                    intake.copy_checked(found, folder / file)
        pipeline.add(raw)
        _note_origins(tracked, new)
        if wanted != text:
            change.write(params, wanted)
            parameters.load(params)
    changed = {params: wanted != text, raw: bool(new), tracked: tracked.read_bytes() != before}
    return [workspace.relative(path) for path, different in changed.items() if different]


def _link_tree(source: Path, target: Path) -> None:
    """The files of `source` in `target`, by hard link where the disk can."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=True)
    except OSError:
        shutil.copy2(source, target)


def origins(workspace: Workspace, name: str) -> dict[str, str]:
    """Where each file in data/raw/NAME came from, as far as it was added by a command."""
    path = workspace.tracked(name)
    content = YAML(typ="safe").load(path) if path.exists() else None
    return dict(((content or {}).get("meta") or {}).get("moa") or {})


def _note_origins(tracked: Path, new: Mapping[str, Found]) -> None:
    """In DVC's own file, which keeps what it does not know under `meta`."""
    yaml, out = YAML(), StringIO()
    content = yaml.load(tracked)
    content.setdefault("meta", {}).setdefault("moa", {}).update({file: found.origin for file, found in new.items()})
    if content["meta"]["moa"]:
        yaml.dump(content, out)
        tracked.write_text(out.getvalue(), encoding="utf-8")


# Removing.

def remove(workspace: Workspace, name: str, *, purge: bool = False) -> dict[str, Any]:
    """Take domain `name` out, with its rows, corpus and expert; what was done, and that the others are untouched.

    With `purge`, what only it used leaves DVC's cache, too. Raises ConfigError when there is no such domain, and
    ArtifactError when another domain would not be as before; then nothing has changed.
    """
    pipeline = Versions(workspace)
    raw, tracked = workspace.raw(valid_name(name)), workspace.tracked(name)
    folders = [raw, workspace.corpus(name), workspace.expert(name)]
    stages = [f"{step}@{name}" for step in sorted(PER_DOMAIN)]
    with pipeline.lock():
        config = parameters.load(workspace.params)
        there = [path for path in (*folders, tracked) if path.exists()]
        if not (there or purge or name in config.quickstart):
            config.require_domain(name)
        if purge and not pipeline.cache_is_ours():
            raise UsageError("DVC's cache lies outside this workspace, where other projects may use it: run the "
                             "command without --purge, and `dvc gc` for all of these projects together.")
        roots = _versions(pipeline, name, stages)
        text = workspace.params.read_bytes().decode("utf-8")
        wanted = splice.remove_domain(text, name)
        others = _others(pipeline, config, name)
        dropped = [stage for stage in stages if stage in pipeline.recorded()]
        files = [workspace.params, tracked, workspace.root / "dvc.lock",
                 *(folder.parent / ".gitignore" for folder in folders)]
        with changing(workspace, f"moa domain remove {name}", files=files, folders=folders) as change:
            change.write(workspace.params, wanted)
            for folder in folders:
                change.take_out(folder)
            tracked.unlink(missing_ok=True)
            pipeline.forget(stages, folders)
            _require_same(others, _others(pipeline, parameters.load(workspace.params), name))
            write_json(workspace.removed(name), roots)
        (workspace.local / "rejected" / f"{name}.jsonl").unlink(missing_ok=True)
        Checkpoint(workspace, {name: ""}).clear()
        purged = _purge(pipeline, name, folders, roots) if purge else None
    return {"domain": name, "removed": [workspace.relative(path) for path in there], "lock_entries": dropped,
            "params": wanted != text, "others": len(others), "purged": purged}


def _others(pipeline: Versions, config: Config, name: str) -> dict[str, dict[str, Any]]:
    """All that must not change when `name` does, by domain: what is recorded, what is stale, every file."""
    workspace, recorded, stale = pipeline.workspace, pipeline.recorded(), pipeline.snapshot().stale
    found: dict[str, dict[str, Any]] = {}
    for other in sorted({*config.domains, *config.quickstart} - {name}):
        stages = [f"{step}@{other}" for step in sorted(PER_DOMAIN)]
        paths = [path for folder in (workspace.raw(other), workspace.corpus(other), workspace.expert(other))
                 for path in sorted(folder.rglob("*"))]
        tracked = workspace.tracked(other)
        found[other] = {
            "its entries of dvc.lock": {stage: recorded.get(stage) for stage in stages},
            "the stale of its steps": {stage: stale.get(stage) for stage in stages},
            "its files": {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths},
            "its data in DVC": tracked.read_bytes() if tracked.exists() else None}
    return found


def _require_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for other, facts in before.items():
        if other not in after:
            raise ArtifactError(f"The domain {other} would have gone, too, so nothing was changed.")
        for what, value in facts.items():
            if after[other][what] != value:
                raise ArtifactError(f"The domain {other} would not be untouched ({what} would differ), so nothing was "
                                    "changed.")


def _versions(pipeline: Versions, name: str, stages: Sequence[str]) -> list[str]:
    """Digests of what the domain has and, as far as git knows, had."""
    workspace, recorded = pipeline.workspace, pipeline.recorded()
    found = read_json(workspace.removed(name)) if workspace.removed(name).exists() else []
    found += [out["md5"] for stage in stages for out in recorded.get(stage, {}).get("outs", ()) if "md5" in out]
    tracked = workspace.tracked(name)
    texts = [tracked.read_text(encoding="utf-8")] if tracked.exists() else []
    history = subprocess.run(["git", "log", "--all", "-p", "--format=", "--", workspace.relative(tracked)],
                             cwd=workspace.root, capture_output=True, text=True, errors="replace", check=False)
    found += re.findall(r"md5: ([0-9a-f]{32}(?:\.dir)?)", "\n".join([*texts, history.stdout]))
    return sorted(set(found))


def _purge(pipeline: Versions, name: str, folders: Sequence[Path], roots: Sequence[str]) -> dict[str, int]:
    workspace = pipeline.workspace
    shutil.rmtree(workspace.cache / "features", ignore_errors=True)   # of its prompts; can be computed again
    purged = pipeline.purge({workspace.relative(folder) for folder in folders}, roots)
    if not purged["kept"]:
        workspace.removed(name).unlink()
    return purged

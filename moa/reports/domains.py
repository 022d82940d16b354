"""Domains as facts (JSON values) and as text for a terminal. Reads manifests and changes nothing."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core import digests
from moa.core.config import Config
from moa.core.files import read_json
from moa.core.names import printable
from moa.core.paths import MANIFEST, Workspace
from moa.core.text import name_list, table
from moa.data.readers import raw_files
from moa.workspace.origins import origins
from moa.workspace.pipeline import Pipeline
from moa.workspace.stage_graph import Snapshot

# Keys of the numbers of rows in a corpus's manifest.
COUNTS = ("read", "kept", "rejected", "duplicates", "near_duplicates")
SPLITS = ("train", "validation", "test")


# Facts.

def listed(workspace: Workspace, config: Config) -> dict[str, Any]:
    """The facts of every domain, in the order of params.yaml, under `domains`. For `listed_text`."""
    snapshot = Pipeline(workspace).snapshot()
    return {"domains": [_facts(workspace, config, snapshot, name) for name in config.domains]}


def _facts(workspace: Workspace, config: Config, snapshot: Snapshot, name: str) -> dict[str, Any]:
    """The facts that both `listed` and `shown` have of a domain."""
    raw = raw_files(workspace.raw(name))
    corpus, expert = (_manifest(folder / MANIFEST) for folder in (workspace.corpus(name), workspace.expert(name)))
    counts = (corpus or {}).get("rows", {})
    return {"name": name, "metric": config.domains[name].metric, "files": len(raw),
            "bytes": sum(path.stat().st_size for path in raw),
            "rows": {key: counts.get(key) for key in (*COUNTS, *SPLITS)} if corpus else None,
            "expert": {"validation_loss": expert.get("best_loss"), "epoch": expert.get("best_epoch"),
                       "digest": expert.get("digest"), "imported": expert.get("source") == "imported"}
            if expert else None,
            "steps": {step: _state(snapshot, f"{step}@{name}") for step in ("prepare", "train")}}


def _state(snapshot: Snapshot, stage: str) -> str:
    """`fresh`, or why the stage is not, in words."""
    if stage in snapshot.stale:
        return "; ".join(reason.text for reason in snapshot.stale[stage])
    return "what it reads may change" if stage in snapshot.affected else "fresh"


def shown(workspace: Workspace, config: Config, name: str) -> dict[str, Any]:
    """All facts of one domain, for `shown_text`. Raises ConfigError when there is no such domain."""
    config.require_domain(name)
    origin_of, raw = origins(workspace, name), workspace.raw(name)
    corpus = _manifest(workspace.corpus(name) / MANIFEST) or {}
    return {**_facts(workspace, config, Pipeline(workspace).snapshot(), name),
            "reading": config.domains[name].model_dump(exclude_unset=True),
            "generated": name in config.quickstart,
            "sources": [{"name": printable(path.relative_to(raw)), "size": path.stat().st_size,
                         "digest": digests.of_file(path), "origin": origin_of.get(path.relative_to(raw).as_posix())}
                        for path in raw_files(raw)],
            "reasons": corpus.get("reasons", {}), "redacted": corpus.get("redacted", {}),
            "tokens": corpus.get("tokens"), "champion": _champion(workspace, config, name)}


def _champion(workspace: Workspace, config: Config, name: str) -> dict[str, Any] | None:
    """The champion's version and its expert for the domain; None where there is no champion or it lacks the domain."""
    if not (workspace.mlflow.exists() or os.environ.get("MLFLOW_TRACKING_URI")):
        return None
    from moa.release.registry import Registry

    champion = Registry(workspace, config).champion()
    expert = champion.experts.get(name) if champion else None
    return {"release": champion.version, "expert": expert} if champion and expert else None


def _manifest(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file is missing or holds none."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# Text.

def listed_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa domain list`: a table of all domains."""
    if not facts["domains"]:
        return "There are no domains yet: add one with `moa domain add NAME FILE`."
    lines = [("domain", "metric", "files", "train", "valid.", "test", "loss", "state")]
    for domain in facts["domains"]:
        rows, expert = domain["rows"] or {}, domain["expert"] or {}
        loss = expert.get("validation_loss")
        lines.append((domain["name"], domain["metric"], str(domain["files"]),
                      *(str(rows.get(key, "-")) for key in SPLITS),
                      "-" if loss is None else f"{loss:.3f}", _first_stale_step(domain["steps"])))
    return table(lines, right=range(2, 7))


def _first_stale_step(steps: Mapping[str, str]) -> str:
    """The first step that is not fresh, with the reason; `fresh` without one."""
    stale = [f"{step}: {state}" for step, state in steps.items() if state != "fresh"]
    return stale[0] if stale else "fresh"


def shown_text(facts: Mapping[str, Any]) -> str:
    """The output of `moa domain show`: all facts of one domain."""
    reading = {key: _setting(value) for key, value in facts["reading"].items()}
    lines = [("domain", facts["name"]), *reading.items()]
    if facts["generated"]:
        lines.append(("rows", "generated by moa (quickstart)"))
    for number, source in enumerate(facts["sources"]):
        origin = f", from {source['origin']}" if source["origin"] else ""
        lines.append(("" if number else "files", f"{source['name']}, {size(source['size'])}, sha256 "
                                                 f"{source['digest'][:12]}{origin}"))
    if not facts["sources"]:
        lines.append(("files", "none"))
    if rows := facts["rows"]:
        lines.append(("rows", ", ".join(f"{rows[key]} {key.replace('_', '-')}" for key in COUNTS
                                        if rows[key] is not None)))
        lines.append(("splits", ", ".join(f"{rows[key]} {key}" for key in SPLITS)))
    lines += [("rejected", f"{count} because of: {reason}") for reason, count in list(facts["reasons"].items())[:5]]
    lines += [("redacted", f"{count} {kind}") for kind, count in facts["redacted"].items()]
    for part, counts in (facts["tokens"] or {}).items():
        lines.append((f"{part} tokens", f"mean {counts['mean']:.0f}, 95 % below {counts['p95']:.0f}, "
                                        f"longest {counts['max']}"))
    if expert := facts["expert"]:
        loss = expert["validation_loss"]
        learned = f"validation loss {'unknown' if loss is None else f'{loss:.3f}'} after epoch {expert['epoch']}"
        learned = "imported" if expert["imported"] else learned
        lines.append(("expert", f"{learned}, digest {(expert['digest'] or 'unknown')[:12]}"))
    if champion := facts["champion"]:
        expert_digest = (expert or {}).get("digest")
        same = "this expert" if champion["expert"]["digest"] == expert_digest else "another expert"
        lines.append(("champion", f"release {champion['release']} answers with {same} "
                                  f"({champion['expert']['name']} version {champion['expert']['version']})"))
    lines += facts["steps"].items()
    return table(lines)


def added_text(done: Mapping[str, Any]) -> str:
    """The output of `moa domain add`."""
    name = done["domain"]
    lines = [f"{'New domain' if done['new'] else 'Domain'} {name}: {_count(done['files'], 'file')} added."]
    lines += [f"  {file['name']}  {size(file['size'])}, from {file['origin']}" for file in done["files"]]
    if done["already_there"]:
        lines.append(f"Already there, not copied again: {name_list(done['already_there'])}.")
    if done["versioned_along"]:
        lines.append(f"Versioned along, as found in data/raw/{name}: {name_list(done['versioned_along'])}.")
    if done["ignored"]:
        lines.append(f"Passed over, not of a known format: {_count(done['ignored'], 'file')} "
                     f"({name_list(done['ignored'])}).")
    lines.append(f"Changed: {', '.join(done['changed'])}." if done["changed"] else "Nothing changed.")
    if done["changed"]:
        commit = [path for path in done["changed"] if path.endswith((".yaml", ".dvc"))]
        lines += ["", "Try next:", f"  moa domain check {name}", "  moa plan", "  moa run",
                  f"  git add {' '.join(commit)} && git commit -m 'Rows of {name}'"]
    return "\n".join(lines)


def removed_text(done: Mapping[str, Any]) -> str:
    """The output of `moa domain remove`."""
    name = done["domain"]
    removed = [*done["removed"], *(f"{stage} in dvc.lock" for stage in done["lock_entries"])]
    if done["params"]:
        removed.insert(0, "its entry in params.yaml")
    lines = [f"Removed {name}: {', '.join(removed) or 'nothing was left of it'}."]
    others = done["others"]
    if others:
        lines.append(f"{others} other domain{'' if others == 1 else 's'} untouched: same files and digests, prepare "
                     "and train as fresh as before.")
    if (purged := done["purged"]) is not None:
        lines.append(f"DVC's cache: {purged['objects']} objects deleted ({size(purged['bytes'])}), {purged['kept']} "
                     "kept because something else here uses them.")
        if purged["kept"]:
            lines.append("If that is the mixture of now: `moa run`, and then "
                         f"`moa domain remove {name} --purge --yes` again.")
        if purged["shallow"]:
            lines.append("This clone of the repository is shallow: rows of commits that it lacks may still lie in DVC's"
                         f" cache. Run `git fetch --unshallow`, then `moa domain remove {name} --purge --yes` again.")
        lines.append("Not touched: releases in MLflow, DVC remotes, and what git's history holds.")
    lines.append("Releases, and the mixture until the next `moa run`, still know it: `moa plan` shows what is stale.")
    return "\n".join(lines)


def _setting(value: Any) -> str:
    """A value of params.yaml as text; a mapping as key=column pairs."""
    return ", ".join(f"{key}={column}" for key, column in value.items()) if isinstance(value, Mapping) else str(value)


def _count(items: Sequence[Any], noun: str) -> str:
    """The number of items with the noun in singular or plural."""
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def size(count: float) -> str:
    """Format a number of bytes with a unit, from B to GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"

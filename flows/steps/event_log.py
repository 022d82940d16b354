"""The event log, `.moa/ledger.jsonl`: one line for each thing that happened or was decided, only ever added to.

Any process may append at any time. A line that a killed process left unfinished stays where it is, closed by the next
append, and is passed over.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from moa.core.errors import ArtifactError
from moa.core.paths import Workspace

PATIENCE = 30.0   # seconds for another process to finish its line

KINDS = {
    "arrived": "files were found in data/incoming and taken into data/raw",
    "rejected": "a file could not be used, or was refused, and lies in data/incoming/.rejected now",
    "skipped": "a trigger came and no run began, with the reason",
    "started": "a run began, with what set it off",
    "start-chosen": "where a domain's expert begins its training: which parent, or none",
    "trained": "experts were trained",
    "gate": "the gate's verdict on a challenger",
    "released": "a release became champion",
    "forgetting": "what the new champion kept of the one before: experts by digest, golden answers word for word",
    "undone": "a domain was put back to what it was before",
    "failed": "a run ended with an error",
    "taken-over": "a run found that the one before it was killed, and went on in its place",
    "drift": "the check of the prompts that `moa serve` kept",
    "up": "`moa up` began",
    "down": "`moa up` ended",
    "finished": "a run ended",
}

# A part in [brackets] is left out where one of its facts is missing. Facts that no part names follow in parentheses.
SENTENCES = {
    "arrived": "[{rows} rows of ]{domain}[ in {files}]",
    "rejected": "[{file} of ]{domain}[: {reason}]",
    "skipped": "no run[ for {domains}][: {reason}]",
    "started": "a run[ of {flow}][ by {trigger}][ for {domains}][: {reason}]",
    "start-chosen": "{domain} begins from {parent}[: {reason}]",
    "trained": "{domains}[ in {seconds} s]",
    "gate": "{verdict}[ for version {version}][: {reason}]",
    "released": "version {version}[ of {name}][ with {domains}][ after {seconds} s]",
    "forgetting": "{verdict}[ of version {against}][; the same experts: {same}][; changed: {changed}][; new: {new}]",
    "undone": "{domains}[: {reason}]",
    "failed": "[{step}: ]{reason}[ after {seconds} s]",
    "taken-over": "from a run[ with pid {pid}][ since {since}][ that worked on {domains}]",
    "drift": "{verdict}[ on {prompts} prompts][: {reason}]",
    "up": "pid {pid}[ at {url}]",
    "down": "pid {pid}[: {reason}]",
    "finished": "{result}[ for {domains}][ in {seconds} s]",
}


def append(workspace: Workspace, kind: str, **facts: Any) -> dict[str, Any]:
    """Add one entry, with its number and time, and return it. On disk when this returns.

    Raises ArtifactError when it cannot be written; then nothing of it is in the ledger.
    """
    from filelock import FileLock, Timeout

    assert not {"n", "at", "kind"} & facts.keys(), "the ledger's own keys"
    path = workspace.event_log
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=PATIENCE):
            before = path.read_bytes() if path.exists() else b""
            entry = {"n": _last_number(before) + 1, "at": datetime.now(UTC).isoformat(timespec="seconds"),
                     "kind": kind, **facts}
            line = json.dumps(entry, ensure_ascii=False, default=str) + "\n"
            gap = "\n" if before and not before.endswith(b"\n") else ""   # a process was killed while writing
            _add(workspace, (gap + line).encode("utf-8", errors="replace"), len(before))
    except Timeout:
        raise ArtifactError(f"{path.name} has been locked by another process for {PATIENCE:g} s; end it and run the "
                            "command again.") from None
    except OSError as error:
        raise ArtifactError(f"{path.name} cannot be written: {error.strerror or error}; mend that and run the command "
                            "again.") from error
    return dict(json.loads(line))


def _add(workspace: Workspace, data: bytes, size: int) -> None:
    descriptor = os.open(workspace.event_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)   # the disk is full: no half a line
            raise
    finally:
        os.close(descriptor)


def _last_number(data: bytes) -> int:
    return next((entry["n"] for entry in map(_parsed, reversed(data.splitlines())) if entry), 0)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The entry in one line; None for what was torn."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = (isinstance(entry, dict) and isinstance(entry.get("n"), int) and isinstance(entry.get("kind"), str)
             and isinstance(entry.get("at"), str))
    return entry if whole else None


def read(workspace: Workspace, last: int | None = None, kinds: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The entries, oldest first: the `last` of these `kinds`, None = all."""
    try:
        lines = workspace.event_log.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    wanted = None if kinds is None else set(kinds)
    found = [entry for entry in map(_parsed, lines) if entry and (wanted is None or entry["kind"] in wanted)]
    return found if last is None else found[max(0, len(found) - last):]


# As text.

def text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line for each entry: number, time (UTC), kind, sentence."""
    if not entries:
        return "Nothing has happened yet."
    wide, kinds = len(str(entries[-1]["n"])), max(len(entry["kind"]) for entry in entries)
    return "\n".join(f"{entry['n']:>{wide}}  {_time(entry['at'])}  {entry['kind']:<{kinds}}  {sentence(entry)}"
                     for entry in entries)


def sentence(entry: Mapping[str, Any]) -> str:
    """What an entry says, in one line, without its tables. A kind of a later moa is shown by its facts alone."""
    facts = {key: value for key, value in entry.items() if key not in ("n", "at", "kind")}
    template = SENTENCES.get(entry["kind"], "")

    def fill(part: str) -> str:
        return re.sub(r"{(\w+)}", lambda name: _words(facts.get(name[1], "unknown")), part)

    def piece(found: re.Match[str]) -> str:
        if found[1] is None:
            return fill(found[0])
        return fill(found[1]) if all(map(_says_something, map(facts.get, _names(found[1])))) else ""

    said = re.sub(r"\[([^\]]*)\]|{\w+}", piece, template)
    rest = "; ".join(f"{key}: {_words(value)}" for key, value in facts.items()
                     if key not in _names(template) and _says_something(value) and not _is_table(value))
    return " ".join((f"{said} ({rest})" if said and rest else said or rest).split())


def _names(template: str) -> list[str]:
    return re.findall(r"{(\w+)}", template)


def _says_something(value: Any) -> bool:
    return value is not None and value is not False and value not in ("", [], {}, ())


def _is_table(value: Any) -> bool:
    """Too much for a line; `moa log --json` has it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(map(_is_table, value))
    return isinstance(value, Mapping)


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):   # of files, a reader needs the names alone
        return str(value["name"]) if "name" in value else ", ".join(f"{key} {_words(each)}"
                                                                    for key, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_words, value))
    return str(value)


def _time(at: str) -> str:
    return at[:19].replace("T", " ")

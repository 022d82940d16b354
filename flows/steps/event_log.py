"""The event log, `.moa/ledger.jsonl`: one line of JSON for each event or decision; lines are only ever appended.

Any process may append at any time. A killed process may leave a line unfinished: the next append ends that line, and
readers skip it.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from moa.core.errors import ArtifactError
from moa.core.paths import Workspace
from moa.core.progress import STAMP_LINES, stamped
from moa.core.text import table

PATIENCE = 30.0   # seconds to wait for another process that appends
PRINTED_ELSEWHERE = ("gate", "up", "down")   # kinds of which a flow or `moa up` prints a line of its own

# The kinds of entries, and what each means.
KINDS = {
    "arrived": "files were found in data/incoming and taken into data/raw",
    "rejected": "a file was unusable or refused, and was moved to data/incoming/.rejected",
    "skipped": "a trigger came and no run began, with the reason",
    "started": "a run began, with what set it off",
    "start-chosen": "where a domain's expert begins its training: which parent, or none",
    "trained": "experts were trained",
    "gate": "the gate's verdict on a challenger",
    "released": "a release became champion",
    "forgetting": "what the new champion kept of the one before: experts by digest, golden answers word for word",
    "undone": "a domain was restored as it was before",
    "deferred": "a domain was restored as it was before, and its rows wait in data/incoming for more",
    "accepted": "a person overruled the gate, and refused rows were taken in",
    "failed": "a run ended with an error",
    "taken-over": "a run found that the one before it was killed, and went on in its place",
    "drift": "the drift check of the prompts that `moa serve` logged",
    "up": "`moa up` began",
    "down": "`moa up` ended",
    "finished": "a run ended",
}

# The sentence that shows an entry of each kind. A part in [brackets] is left out when one of its facts is missing.
# Facts that the sentence does not name follow in parentheses.
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
    "deferred": "{domain} waits[: {reason}]",
    "accepted": "{domain}[: {reason}]",
    "failed": "[{step}: ]{reason}[ after {seconds} s]",
    "taken-over": "from a run[ with pid {pid}][ since {since}][ that worked on {domains}]",
    "drift": "{verdict}[ on {prompts} prompts][: {reason}]",
    "up": "pid {pid}[ at {url}]",
    "down": "pid {pid}[: {reason}]",
    "finished": "{result}[ for {domains}][ in {seconds} s]",
}


def append(workspace: Workspace, kind: str, **facts: Any) -> dict[str, Any]:
    """Append one entry with its number `n`, time `at` (UTC, ISO 8601) and `kind`, and return it.

    The entry is on disk (fsync) when this returns. In a flow of `moa up` it is printed, too. Raises ArtifactError when
    it cannot be written; the log is then as it was before.
    """
    from filelock import FileLock, Timeout

    assert not {"n", "at", "kind"} & facts.keys(), "the event log's own keys"
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
    entry = dict(json.loads(line))
    if os.environ.get(STAMP_LINES) and kind not in PRINTED_ELSEWHERE:
        print(stamped(f"{kind:<24} {sentence(entry)}"), file=sys.stderr, flush=True)
    return entry


def _add(workspace: Workspace, data: bytes, size: int) -> None:
    """Append `data` to the log of `size` bytes, or leave the log as it was."""
    descriptor = os.open(workspace.event_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)   # for example a full disk: leave no part of a line
            raise
    finally:
        os.close(descriptor)


def _last_number(data: bytes) -> int:
    return next((entry["n"] for entry in map(_parsed, reversed(data.splitlines())) if entry), 0)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The entry in one line; None for an unfinished line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    complete = (isinstance(entry, dict) and isinstance(entry.get("n"), int) and isinstance(entry.get("kind"), str)
                and isinstance(entry.get("at"), str))
    return entry if complete else None


def read(workspace: Workspace, last: int | None = None, kinds: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The entries of these `kinds`, oldest first, of which only the `last` newest; None = all, for either."""
    try:
        lines = workspace.event_log.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    wanted = None if kinds is None else set(kinds)
    entries = [entry for entry in map(_parsed, lines) if entry and (wanted is None or entry["kind"] in wanted)]
    return entries if last is None else entries[max(0, len(entries) - last):]


# As text.

def text(entries: Sequence[Mapping[str, Any]]) -> str:
    """A line for each entry: number, time (UTC), kind, sentence."""
    if not entries:
        return "Nothing has happened yet."
    return table([(str(entry["n"]), _time(entry["at"]), entry["kind"], sentence(entry)) for entry in entries],
                 right=[0])


def sentence(entry: Mapping[str, Any]) -> str:
    """An entry's facts in one line, without its tables. Of a kind that a later version wrote, the facts alone."""
    facts = {key: value for key, value in entry.items() if key not in ("n", "at", "kind")}
    template = SENTENCES.get(entry["kind"], "")

    def fill(part: str) -> str:
        return re.sub(r"{(\w+)}", lambda name: _words(facts.get(name[1], "unknown")), part)

    def fill_match(match: re.Match[str]) -> str:
        if match[1] is None:   # outside of brackets
            return fill(match[0])
        return fill(match[1]) if all(map(_is_given, map(facts.get, _names(match[1])))) else ""

    filled = re.sub(r"\[([^\]]*)\]|{\w+}", fill_match, template)
    rest = "; ".join(f"{key}: {_words(value)}" for key, value in facts.items()
                     if key not in _names(template) and _is_given(value) and not _is_table(value))
    return " ".join((f"{filled} ({rest})" if filled and rest else filled or rest).split())


def _names(template: str) -> list[str]:
    """The facts that a template names."""
    return re.findall(r"{(\w+)}", template)


def _is_given(value: Any) -> bool:
    """Whether a fact is worth showing: neither missing, nor false, nor empty. A zero is."""
    return value is not None and value is not False and value not in ("", [], {}, ())


def _is_table(value: Any) -> bool:
    """Whether a fact is too long for one line: a mapping, or a list of mappings. `moa log --json` has it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return any(map(_is_table, value))
    return isinstance(value, Mapping)


def _words(value: Any) -> str:
    """A fact's value as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, Mapping):   # of a file the name is enough
        return str(value["name"]) if "name" in value else ", ".join(f"{key} {_words(item)}"
                                                                    for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_words, value))
    return str(value)


def _time(at: str) -> str:
    return at[:19].replace("T", " ")

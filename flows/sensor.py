"""Looks at data/incoming, and nudges: says to Prefect that something has arrived. Takes nothing in, decides nothing.

An event is a nudge, never the record. What has arrived lies in data/incoming until it is learned; a process that misses
an event finds it there, and the sensor nudges again as long as something is due.
"""

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from flows import prefect_api
from flows.steps import event_log
from flows.steps.adaptation_state import AdaptationState
from flows.steps.learning import pending_rows
from moa.core.config import Config, load
from moa.core.errors import in_words
from moa.core.names import printable
from moa.core.paths import Workspace
from moa.core.project import Names, project_id
from moa.workspace import incoming
from moa.workspace.lock import LockHolder

ARRIVED = "moa.data.arrived"
AGAIN = 45.0              # seconds between two nudges for the same thing: a run needs some of them to begin
BACK_OFF = (60.0, 3600.0)   # seconds after a failed run, doubled with each, and at most


def send_arrival_event(workspace: Workspace, names: Sequence[str] = (), api: prefect_api.Api | None = None) -> bool:
    """Tell Prefect that rows of these domains have arrived; whether its server took it."""
    api = api or prefect_api.workspace_api(workspace)
    if api is None:
        return False
    config, at = load(workspace.params), datetime.now(UTC).isoformat()
    project, resource = related_resources(workspace, config), Names.of(config).resource
    events = [{"occurred": at, "event": ARRIVED, "id": str(uuid.uuid4()), "payload": {"domain": name},
               "resource": {"prefect.resource.id": resource("domain", name)},
               "related": [{**project, "prefect.resource.role": "project"}] if project else []} for name in names]
    with suppress(OSError, ValueError):
        api.ask("events", events)
        return True
    return False


def related_resources(workspace: Workspace, config: Config) -> dict[str, str] | None:
    """The project that an event belongs to. It tells old workspaces, whose events are about the same resources, apart.

    None in a shallow clone of an old workspace, which cannot tell.
    """
    project = project_id(workspace, config)
    return {"prefect.resource.id": f"moa.project.{project}"} if project else None


class Sensor:
    """`look` once, or `run` until `stop`. `ask` is told the names of the domains for which something is due."""

    def __init__(self, workspace: Workspace, ask: Callable[[Sequence[str]], bool]) -> None:
        self.workspace, self.ask = workspace, ask
        self._ended = threading.Event()
        self._seen: str | None = None             # signature of the last look: a file that still grows has another one
        self._asked: tuple[str, float] = ("", 0.0)
        self.trouble: str | None = None           # why the last look failed
        self.looked = False                       # whether one was without trouble

    def look(self) -> list[str]:
        """Send an event if a run is due and none is under way; the domains that it was sent for."""
        workspace = self.workspace
        signature = incoming.incoming_signature(incoming.waiting_files(workspace))
        unchanged, self._seen = signature == self._seen, signature
        if not unchanged or LockHolder.of(workspace).at_work():
            return []
        interrupted = AdaptationState.load(workspace)
        found = pending_rows(workspace, load(workspace.params))
        names = sorted({*(each.domain for each in found.hopeless), *(found.due.domains if found.due.run else ()),
                        *(interrupted.before if interrupted else ())})
        if not names or time.time() < _not_before(workspace):
            return []
        what, at = self._asked
        if what == signature and time.monotonic() - at < AGAIN:
            return []
        if self.ask([printable(name) for name in names]):
            self._asked = (signature, time.monotonic())
            return names
        return []

    def run(self) -> None:
        """Look every `adapt.poll` seconds. A look that fails sets `trouble`, and the next one is tried all the same."""
        poll = 2.0
        while not self._ended.wait(poll):
            try:
                poll = load(self.workspace.params).adapt.poll
                self.look()
                self.trouble, self.looked = None, True
            except Exception as error:   # whatever a file holds: the rows of other files must be learned
                self.trouble = f"data/incoming could not be looked at: {in_words(error)}"

    def stop(self) -> None:
        self._ended.set()


def _not_before(workspace: Workspace) -> float:
    """When a run may be asked for again after those that failed, in seconds since 1970."""
    failed: list[dict[str, Any]] = []
    for entry in reversed(event_log.read(workspace, last=50, kinds=["failed", "finished"])):
        if entry["kind"] == "finished":
            break
        failed.append(entry)
    if not failed:
        return 0.0
    pause = min(BACK_OFF[0] * 2 ** (len(failed) - 1), BACK_OFF[1])
    return (datetime.fromisoformat(failed[0]["at"]) + timedelta(seconds=pause)).timestamp()

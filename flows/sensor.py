"""Watches data/incoming, and sends Prefect an event when files have arrived. Takes no file in and decides nothing.

The files are the record, an event only starts a run. Files lie in data/incoming until they are learned, so a lost
event loses no rows: the sensor sends another one as long as something is due.
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
AGAIN = 45.0                # seconds between two events for the same files: a run needs some of them to begin
BACK_OFF = (60.0, 3600.0)   # seconds without events after a failed run, doubled with each further one, and at most


def send_arrival_event(workspace: Workspace, names: Sequence[str] = (), api: prefect_api.Api | None = None) -> bool:
    """Send Prefect an event for each of these domains that its rows have arrived.

    Args:
        api: where to send them; None = the API that serves the workspace.

    Returns:
        Whether a server took the events. An API that is unknown or unreachable is no error.
    """
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
    """The project that an event belongs to, as Prefect's related resource.

    It tells the events of old workspaces apart, whose own resources all have the same names. None in a shallow clone of
    an old workspace, whose id cannot be derived.
    """
    project = project_id(workspace, config)
    return {"prefect.resource.id": f"moa.project.{project}"} if project else None


class Sensor:
    """Checks data/incoming: `look` does it once, `run` again and again until `stop`."""

    def __init__(self, workspace: Workspace, ask: Callable[[Sequence[str]], bool]) -> None:
        """`ask` sends an event for the domains for which a run is due, and says whether it was taken."""
        self.workspace, self.ask = workspace, ask
        self._ended = threading.Event()
        self._seen: str | None = None             # signature at the last look; files that still grow change it
        self._asked: tuple[str, float] = ("", 0.0)   # signature and monotonic time of the last event
        self.trouble: str | None = None           # why the last look failed
        self.looked = False                       # whether any look succeeded

    def look(self) -> list[str]:
        """Send an event if a run is due and none is under way; the domains for which it was sent."""
        workspace = self.workspace
        signature = incoming.incoming_signature(incoming.waiting_files(workspace))
        unchanged, self._seen = signature == self._seen, signature
        if not unchanged or LockHolder.of(workspace).at_work():
            return []
        interrupted = AdaptationState.load(workspace)
        pending = pending_rows(workspace, load(workspace.params))
        names = sorted({*(arrival.domain for arrival in pending.hopeless),
                        *(pending.due.domains if pending.due.run else ()),
                        *(interrupted.before if interrupted else ())})
        if not names or time.time() < _not_before(workspace):
            return []
        asked_signature, asked_at = self._asked
        if asked_signature == signature and time.monotonic() - asked_at < AGAIN:
            return []
        if self.ask([printable(name) for name in names]):
            self._asked = (signature, time.monotonic())
            return names
        return []

    def run(self) -> None:
        """Look every `adapt.poll` seconds until `stop`. A look that fails sets `trouble` and does not end the loop."""
        poll = 2.0
        while not self._ended.wait(poll):
            try:
                poll = load(self.workspace.params).adapt.poll
                self.look()
                self.trouble, self.looked = None, True
            except Exception as error:   # one unreadable file must not keep the rows of others from being learned
                self.trouble = f"data/incoming could not be looked at: {in_words(error)}"

    def stop(self) -> None:
        """End `run`, from another thread."""
        self._ended.set()


def _not_before(workspace: Workspace) -> float:
    """The time (seconds since 1970) from which an event may be sent again, after the runs that failed in a row."""
    failed: list[dict[str, Any]] = []   # newest first
    for entry in reversed(event_log.read(workspace, last=50, kinds=["failed", "finished"])):
        if entry["kind"] == "finished":
            break
        failed.append(entry)
    if not failed:
        return 0.0
    pause = min(BACK_OFF[0] * 2 ** (len(failed) - 1), BACK_OFF[1])
    return (datetime.fromisoformat(failed[0]["at"]) + timedelta(seconds=pause)).timestamp()

"""Deadlines and limits of a uvicorn server's connections, so that silent, slow or many clients exhaust neither its file
descriptors nor its log.

By itself, uvicorn closes only connections that are idle between two requests. One that sends nothing, or a byte a
second, stays open until the process has no descriptor left, and asyncio then logs each failed accept() with its
traceback. Here the time that a connection waits for its client is bounded, and so is the number of connections:

    Server(Config(app, ConnectionLimits(), log_config=None)).run(sockets=[listening])
"""

import asyncio
import errno
import logging
import resource
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

# Descriptors for libraries, MLflow's database, and connections that are accepted before those that they replace are
# closed (at most the connections of four turns).
RESERVED = 128
TURN = 16           # connections that are accepted in one turn of the event loop
QUEUE = 1024        # connections that the kernel keeps until they are accepted
TICKS = 10          # of uvicorn's clock, tenths of a second, between two looks at the deadlines
LOG_SECONDS = 10    # before a warning is logged once more
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}   # of accept(): asyncio tries again in a second
CROWDED = b"Too many connections are open: try again in a moment."
REFUSAL = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: text/plain; charset=utf-8\r\nRetry-After: 1\r\n"
           b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(CROWDED), CROWDED))

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Limits of a server's connections. The time to compute an answer is not limited."""

    connections: int = 1000         # open at once; fewer where the limit of descriptors is lower
    descriptors: int = 1            # that a connection may cost: 2 where each request asks another server
    header_seconds: float = 10.0    # for a header, from the connection or the first byte of a later request on
    body_seconds: float = 30.0      # for a body. The application may answer 408 then; twice that ends the connection
    idle_seconds: float = 5.0       # between an answer and the next request
    unread_seconds: float = 30.0    # within which a client must read some of what is sent to it


class Phase(Enum):
    """What a connection is waiting for."""

    HEADER = auto()
    BODY = auto()
    ANSWER = auto()    # of the application: the only phase that the client cannot end
    IDLE = auto()      # for the next request; uvicorn's own deadline
    UNREAD = auto()    # for the client to read


class Config(uvicorn.Config):
    """uvicorn's configuration with connection limits.

    The HTTP parser is h11, because the deadlines depend on its states; WebSockets are off.
    """

    def __init__(self, app: Any, bounds: ConnectionLimits, **named: Any) -> None:
        super().__init__(app, http=BoundedProtocol, ws="none", backlog=TURN, **named)
        self.timeout_keep_alive = bounds.idle_seconds   # type: ignore[assignment]   # any number of seconds will do
        self.bounds = bounds

    def deadline(self, phase: Phase) -> float | None:
        """Seconds that a connection may be in `phase`; None = this module sets no bound."""
        return {Phase.HEADER: self.bounds.header_seconds, Phase.BODY: 2 * self.bounds.body_seconds,
                Phase.UNREAD: self.bounds.unread_seconds}.get(phase)


class BoundedProtocol(H11Protocol):
    """One connection. Only the end of a phase moves a deadline; arriving bytes do not."""

    config: Config

    def connection_made(self, transport: asyncio.Transport) -> None:   # type: ignore[override]
        """Accept a connection, and close another one, or this one, where there are too many."""
        super().connection_made(transport)
        self.dropped = False
        self.since = time.monotonic()
        self._state: tuple[Any, ...] = ()
        self.look(self.since)
        if len(self.connections) <= self.config.bounds.connections:
            return
        open_connections = [each for each in _bounded(self.connections) if not each.dropped]
        if len(open_connections) > self.config.bounds.connections:
            log.warning("moa: %d connections are open, as many as may be: those that wait longest for their clients "
                        "are closed", self.config.bounds.connections)
            if not drop_longest_waiting(each for each in open_connections if each is not self):
                transport.write(REFUSAL)
                transport.close()
                self.dropped = True

    def look(self, now: float) -> Phase:
        """The present phase; `since` becomes the time at which it was first seen."""
        phase = self._phase()
        unread = self.transport.get_write_buffer_size() if phase is Phase.UNREAD else 0   # less of it is progress
        state = phase, self.cycle, unread
        if state != self._state:
            self._state, self.since = state, now
        return phase

    def enforce(self, now: float) -> None:
        """Close the connection if its phase has exceeded its deadline."""
        seconds = self.config.deadline(self.look(now))
        if seconds is not None and now - self.since >= seconds:
            self.drop()

    def drop(self) -> None:
        """Close at once, discarding unsent data; the application sees a disconnect."""
        self.dropped = True
        self.transport.abort()

    def _phase(self) -> Phase:
        if self.flow.write_paused or self.transport.is_closing():
            return Phase.UNREAD
        if self.cycle is None:
            return Phase.HEADER
        if not self.cycle.response_complete:
            return Phase.BODY if self.cycle.more_body else Phase.ANSWER
        # The rest of a body that was answered before its end counts as part of the next request's header.
        next_begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        return Phase.HEADER if next_begun else Phase.IDLE


class Server(uvicorn.Server):
    """uvicorn's server, which enforces the deadlines and keeps connections fewer than descriptors."""

    config: Config

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Set the limits up and listen."""
        self.config.bounds = affordable(self.config.bounds)
        asyncio.get_running_loop().set_exception_handler(self._failed)
        for logger in (log, logging.getLogger("uvicorn.error")):
            logger.addFilter(Seldom())
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:   # asyncio uses one `backlog` for this queue and for accepts in a turn
                with listening.dup() as same:
                    same.listen(QUEUE)

    async def on_tick(self, counter: int) -> bool:
        """Enforce the deadlines each second; uvicorn calls this ten times a second."""
        if counter % TICKS == 0:
            now = time.monotonic()
            for connection in _bounded(self.server_state.connections):
                connection.enforce(now)
        return await super().on_tick(counter)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio's handler of a failed accept(). asyncio retries by itself; here a descriptor is freed for that."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and error.errno in EXHAUSTED:
            log.warning("moa: a connection cannot be accepted (%s): those that wait longest for their clients are "
                        "closed", error.strerror)
            drop_longest_waiting(_bounded(self.server_state.connections))
        else:
            loop.default_exception_handler(context)


class Seldom(logging.Filter):
    """A log filter that passes each warning once in `LOG_SECONDS`, because clients can cause warnings at any rate.

    Warnings are equal if their format strings are; of those there are few.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._last.get(record.msg, -LOG_SECONDS) < LOG_SECONDS:
            return False
        self._last[record.msg] = now
        return True


def drop_longest_waiting(connections: Iterable[BoundedProtocol]) -> bool:
    """Close the connection that has waited longest for its client; False when none waits for one."""
    now = time.monotonic()
    waiting = [each for each in connections if not each.dropped and each.look(now) is not Phase.ANSWER]
    if waiting:
        min(waiting, key=lambda each: each.since).drop()
    return bool(waiting)


def affordable(bounds: ConnectionLimits) -> ConnectionLimits:
    """`bounds` with no more connections than the process may have descriptors for.

    The soft limit of descriptors is raised first, as far as needed and as the hard limit allows.
    """
    needed = bounds.connections * bounds.descriptors + RESERVED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == unlimited or soft >= needed:
        return bounds
    return replace(bounds, connections=max(soft - RESERVED, soft // 4) // bounds.descriptors)


def _bounded(connections: Iterable[Any]) -> list[BoundedProtocol]:
    """The connections, typed: `Config` makes no others."""
    return cast(list[BoundedProtocol], list(connections))

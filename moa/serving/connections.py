"""Deadlines and limits of a uvicorn server's connections: silent, slow or many clients cost it neither descriptors nor
its log.

uvicorn alone closes a connection that is idle between two requests, and no other: one that sends nothing, or a byte a
second, stays open until the process has no descriptor left, and asyncio then logs every failed accept() of every try
with its traceback. Here a connection waits for its client a bounded time only, and the number of connections stays
below the number of descriptors. Knows nothing of what is served:

    Server(Config(app, Bounds(), log_config=None)).run(sockets=[listening])
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

# Descriptors for all else: libraries, MLflow's database, and connections that are accepted before those they replace
# are closed, which may be as many as four turns accept.
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
    """What a server allows its clients. How long an answer takes to be made has no bound here."""

    connections: int = 1000         # open at once; fewer where the process may not have so many descriptors
    descriptors: int = 1            # that a connection may cost: 2 where each request asks another server
    header_seconds: float = 10.0    # for a header, from the connection or the first byte of a later request on
    body_seconds: float = 30.0      # for a body. The application may answer 408 then; twice that ends the connection
    idle_seconds: float = 5.0       # between an answer and the next request
    unread_seconds: float = 30.0    # in which a client must take something of what is sent to it


class Phase(Enum):
    """What a connection waits for."""

    HEADER = auto()
    BODY = auto()
    ANSWER = auto()    # of the application: the only phase that is not the client's to end
    IDLE = auto()      # for the next request; uvicorn's own deadline
    UNREAD = auto()    # for the client to read


class Config(uvicorn.Config):
    """uvicorn's, with bounds. HTTP/1.1 is read by h11, whose protocol the deadlines know; there are no WebSockets."""

    def __init__(self, app: Any, bounds: ConnectionLimits, **named: Any) -> None:
        super().__init__(app, http=BoundedProtocol, ws="none", backlog=TURN, **named)
        self.timeout_keep_alive = bounds.idle_seconds   # type: ignore[assignment]   # any number of seconds will do
        self.bounds = bounds

    def deadline(self, phase: Phase) -> float | None:
        """Seconds that a connection may be in `phase`; None = this module sets no bound."""
        return {Phase.HEADER: self.bounds.header_seconds, Phase.BODY: 2 * self.bounds.body_seconds,
                Phase.UNREAD: self.bounds.unread_seconds}.get(phase)


class BoundedProtocol(H11Protocol):
    """One connection. Bytes that arrive do not move a deadline: only the end of a phase does."""

    config: Config

    def connection_made(self, transport: asyncio.Transport) -> None:   # type: ignore[override]
        super().connection_made(transport)
        self.dropped = False
        self.since = time.monotonic()
        self._state: tuple[Any, ...] = ()
        self.look(self.since)
        if len(self.connections) <= self.config.bounds.connections:
            return
        kept = [each for each in _bounded(self.connections) if not each.dropped]
        if len(kept) > self.config.bounds.connections:
            log.warning("moa: %d connections are open, as many as may be: those that wait longest for their clients "
                        "are closed", self.config.bounds.connections)
            if not drop_longest_waiting(each for each in kept if each is not self):
                transport.write(REFUSAL)
                transport.close()
                self.dropped = True

    def look(self, now: float) -> Phase:
        """The phase; `since` is when a look first found it."""
        phase = self._phase()
        unread = self.transport.get_write_buffer_size() if phase is Phase.UNREAD else 0   # less of it is progress
        state = phase, self.cycle, unread
        if state != self._state:
            self._state, self.since = state, now
        return phase

    def enforce(self, now: float) -> None:
        """End the connection if its phase has lasted longer than it may."""
        seconds = self.config.deadline(self.look(now))
        if seconds is not None and now - self.since >= seconds:
            self.drop()

    def drop(self) -> None:
        """Close at once, whether or not the client reads what is still to be sent; the application hears of it."""
        self.dropped = True
        self.transport.abort()

    def _phase(self) -> Phase:
        if self.flow.write_paused or self.transport.is_closing():
            return Phase.UNREAD
        if self.cycle is None:
            return Phase.HEADER
        if not self.cycle.response_complete:
            return Phase.BODY if self.cycle.more_body else Phase.ANSWER
        # The rest of a body that was answered before its end counts as what comes before the next request.
        next_begun = self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]
        return Phase.HEADER if next_begun else Phase.IDLE


class Server(uvicorn.Server):
    """uvicorn's, which looks at the deadlines and keeps the number of connections below that of descriptors."""

    config: Config

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.bounds = affordable(self.config.bounds)
        asyncio.get_running_loop().set_exception_handler(self._failed)
        for logger in (log, logging.getLogger("uvicorn.error")):
            logger.addFilter(Seldom())
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:   # asyncio has one number for this queue and for what a turn accepts
                with listening.dup() as same:
                    same.listen(QUEUE)

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS == 0:
            now = time.monotonic()
            for connection in _bounded(self.server_state.connections):
                connection.enforce(now)
        return await super().on_tick(counter)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What asyncio calls for each accept() that fails. It tries again by itself: here a descriptor becomes free."""
        error = context.get("exception")
        if "socket" in context and isinstance(error, OSError) and error.errno in EXHAUSTED:
            log.warning("moa: a connection cannot be accepted (%s): those that wait longest for their clients are "
                        "closed", error.strerror)
            drop_longest_waiting(_bounded(self.server_state.connections))
        else:
            loop.default_exception_handler(context)


class Seldom(logging.Filter):
    """Passes each warning once in so many seconds, since strangers can cause them as fast as they please. Keyed by the
    text before it is filled in: programs have few of those."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        now = time.monotonic()
        if now - self._last.get(record.msg, -LOG_SECONDS) < LOG_SECONDS:
            return False
        self._last[record.msg] = now
        return True


def drop_longest_waiting(connections: Iterable[BoundedProtocol]) -> bool:
    """Close the connection that waits longest for its client, header, body or reading; False when none does."""
    now = time.monotonic()
    waiting = [each for each in connections if not each.dropped and each.look(now) is not Phase.ANSWER]
    if waiting:
        min(waiting, key=lambda each: each.since).drop()
    return bool(waiting)


def affordable(bounds: ConnectionLimits) -> ConnectionLimits:
    """`bounds` with as many connections as the process may have descriptors for, after its soft limit was raised as far
    as they need and the hard limit allows."""
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
    """The connections of a server whose configuration makes no others."""
    return cast(list[BoundedProtocol], list(connections))

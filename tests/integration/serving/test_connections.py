"""Clients that are silent, slow or many, against a real server: they are let go, and all others are answered.

Where something must not happen within a deadline, another connection's end shows that the deadline has passed.
"""

import contextlib
import json
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import httpx
import pytest

from moa.core.config import Config
from moa.core.paths import Workspace
from tests.integration.serving.test_server import CHAT, SOON, Served, ask, chat_bytes, first_release, serving, wait_for

GET = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n"
HALF = chat_bytes(ask("alpha", 1))[:-5]   # a body whose end is missing
SHORT = {"MOA_TEST_BOUNDS": json.dumps({"header_seconds": 1, "body_seconds": 1, "unread_seconds": 1})}
QUIET = 20_000   # bytes of a log that nothing floods


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Config]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        patch.delenv("MOA_API_KEY", raising=False)
        yield first_release(tmp_path_factory.mktemp("connected"))


@pytest.fixture(scope="module")
def small(released: tuple[Workspace, Config]) -> Iterator[Served]:
    """A server with as few descriptors as a few hundred clients need, and deadlines as they are."""
    with serving(released[0], descriptors="-n 256") as served:
        yield served


@pytest.fixture(scope="module")
def short(released: tuple[Workspace, Config]) -> Iterator[Served]:
    """A server whose deadlines are a second each. A machine that is slow may miss one: what must be answered is asked
    until it is."""
    with serving(released[0], "--keep-alive", "1", environment=SHORT) as served:
        yield served


@contextmanager
def many(served: Served, number: int, content: bytes) -> Iterator[list[socket.socket]]:
    """So many connections on each of which this was sent; some may have been closed by the server already."""
    with ExitStack() as stack:
        opened = []
        for _ in range(number):
            with contextlib.suppress(ConnectionError):
                opened.append(stack.enter_context(served.connect()))
                opened[-1].sendall(content)
        yield opened


def well(served: Served) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return served.get("/healthz").status_code == 200
    return False


def rest(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection; a timeout fails the test."""
    received = b""
    connection.settimeout(SOON)
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def drip(connection: socket.socket) -> bytes:
    """What the server sends until it closes a connection on which a byte comes every now and then."""
    received = b""
    with contextlib.suppress(ConnectionError):
        for _ in range(50 * SOON):
            connection.sendall(b"x")
            if select.select([connection], [], [], 0.02)[0]:
                if not (piece := connection.recv(65_536)):
                    return received
                received += piece
        raise AssertionError("the connection stays open")
    return received


# Many.

@pytest.mark.parametrize("content", [b"", GET, HALF, GET + b"\r\n"], ids=["silent", "header", "body", "idle"])
def test_more_idle_clients_than_descriptors_leave_the_server_to_all_others(small: Served, content: bytes) -> None:
    with many(small, 300, content):
        for _ in range(5):
            assert small.get("/healthz").status_code == 200
        assert small.post(ask("alpha", 1)).status_code == 200
    assert small.log.stat().st_size < QUIET, small.log.read_text()[:QUIET]


def test_where_descriptors_run_out_all_the_same_the_log_stays_small_and_some_become_free(
        released: tuple[Workspace, Config]) -> None:
    with serving(released[0]) as served:
        pid, everything = served.process.pid, resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        assert well(served)
        taken = len(os.listdir(f"/proc/{pid}/fd"))   # noqa: PTH208
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (taken + 8, everything[1]))   # as if a library held the others
        with many(served, 40, b""):
            wait_for(lambda: "cannot be accepted" in served.log.read_text())
            assert served.get("/healthz").status_code == 200
        assert served.log.stat().st_size < QUIET and "Traceback" not in served.log.read_text()


def test_the_soft_limit_of_descriptors_is_raised_as_far_as_connections_need(released: tuple[Workspace, Config]) -> None:
    with serving(released[0], "--max-connections", "300", descriptors="-S -n 256") as served:
        assert 428 <= resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)[0] < 1000


def test_where_all_connections_are_answered_to_the_next_is_refused(released: tuple[Workspace, Config]) -> None:
    with serving(released[0], "--max-connections", "1") as served:
        with served.held() as worker, served.connect(chat_bytes(ask("alpha", 1), "Connection: close")) as asked:
            wait_for(worker.begun)
            with served.connect(GET + b"\r\n") as refused:
                assert rest(refused).startswith(b"HTTP/1.1 503 ")
            worker.let_go()
            assert rest(asked).startswith(b"HTTP/1.1 200 ")
        assert well(served)


# Slow.

@pytest.mark.parametrize("content", [b"", b"GET / HT", GET], ids=["nothing", "half a line", "half a header"])
def test_a_header_that_never_ends_is_not_waited_for(short: Served, content: bytes) -> None:
    with short.connect(content) as connection:
        assert rest(connection) == b""


def test_a_header_that_comes_byte_by_byte_is_not_waited_for(short: Served) -> None:
    with short.connect(GET + b"X-Slow: ") as connection:
        assert drip(connection) == b""


@pytest.mark.parametrize("ends", [rest, drip])
def test_a_body_that_never_ends_is_refused_and_the_connection_closed(short: Served, ends: object) -> None:
    body = chat_bytes({"messages": [{"role": "user", "content": "x" * 100_000}]})[:300]

    def refused() -> bool:   # unless the machine is so slow that its header missed the deadline
        with short.connect(body) as connection:
            reply = rest(connection) if ends is rest else drip(connection)
        assert not reply or (reply.startswith(b"HTTP/1.1 408 ") and b"within 1 seconds" in reply)
        return bool(reply)

    wait_for(refused)


def test_a_body_that_was_answered_before_its_end_is_not_waited_for(short: Served) -> None:
    def answered() -> bool:
        with short.connect(GET + b"Content-Length: 99999\r\n\r\n") as connection:
            reply = drip(connection)
        assert not reply or reply.startswith(b"HTTP/1.1 200 ")
        return bool(reply)

    wait_for(answered)


@pytest.mark.parametrize("after", [b"", b"G", GET], ids=["nothing", "a byte", "half a header"])
def test_a_connection_that_stays_idle_after_its_answer_is_closed(short: Served, after: bytes) -> None:
    def answered() -> bool:
        reply = b""
        with short.connect(GET + b"\r\n") as connection:
            with contextlib.suppress(ConnectionError):
                if reply := connection.recv(65_536):
                    connection.sendall(after)
            rest(connection)
        assert not reply or reply.startswith(b"HTTP/1.1 200 ")
        return bool(reply)

    wait_for(answered)


def test_a_client_that_reads_nothing_is_let_go(short: Served) -> None:
    """It asks for megabytes more than its machine and the server's hold for it."""
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with short.connect() as connection:
        connection.setblocking(False)
        gone = select.poll()
        gone.register(connection, select.POLLHUP | select.POLLERR)

        def closed() -> bool:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                connection.send(asked * 100)
            return bool(gone.poll(0))

        wait_for(closed)
    wait_for(lambda: well(short))


# Those that only take their time.

@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_under_way_outlives_every_deadline(short: Served, stream: bool) -> None:
    question = chat_bytes(ask("alpha", 1, stream=stream), "Connection: close")

    def answered() -> bool:
        with short.held() as worker, short.connect(question) as asked:
            wait_for(lambda: worker.begun() or bool(select.select([asked], [], [], 0)[0]))
            if not worker.begun():
                return False   # the machine is so slow that the question missed a deadline of its own
            for content in (b"", GET, HALF, GET + b"\r\n"):   # of which each waits for another deadline to pass
                with short.connect(content) as other:
                    rest(other)
            worker.let_go()
            reply = rest(asked)
        assert reply.startswith(b"HTTP/1.1 200 ")
        content = reply.partition(b"\r\n\r\n")[2]
        assert b"data: [DONE]" in content if stream else json.loads(content)["choices"]
        return True

    wait_for(answered)


def test_requests_that_follow_each_other_share_a_connection(small: Served) -> None:
    with httpx.Client(timeout=SOON) as client:
        replies = [client.get(f"{small.url}/healthz") for _ in range(20)]
        replies.append(client.post(f"{small.url}{CHAT}", json=ask("beta", 2)))
        ports = {reply.extensions["network_stream"].get_extra_info("client_addr")[1] for reply in replies}
    assert all(reply.status_code == 200 for reply in replies) and len(ports) == 1

"""Prefect's API over HTTP: what is sent, and which errors callers see, against a server on loopback."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.prefect_api import Api, ApiRefusal

# What the server answers, by path: status and body.
ANSWERS = {"/api/flows/filter": (200, b'[{"id": 1}]'), "/api/events": (204, b""), "/api/text": (200, b"<html>"),
           "/api/health": (200, b"true"), "/api/moved": (307, b""), "/api/broken": (500, b'{"detail": "no"}')}


class Handler(BaseHTTPRequestHandler):
    """Answers by ANSWERS and records requests; admin/version needs a password or key."""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, self.headers, body))   # type: ignore[attr-defined]
        known = self.headers.get("Authorization") in ("Basic YW5uOnDDpHNz", "Bearer key")
        status, content = (200 if known else 401, b'"3"') if self.path == "/api/admin/version" else ANSWERS[self.path]
        self.send_response(status)
        if status == 307:
            self.send_header("Location", "/api/flows/filter")
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["127.0.0.1", "localhost"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[tuple]]]:
    """Its URL and the requests that it got. The environment names a proxy that does not exist."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9" if "all" in name.lower() else "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.requests = []   # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://{request.param}:{running.server_port}/api", running.requests   # type: ignore[attr-defined]
        running.shutdown()


def test_what_is_sent_and_what_comes_back(server: tuple[str, list[tuple]]) -> None:
    url, requests = server
    api = Api(url + "/", "ann:päss")
    assert api.ask("flows/filter", {"limit": 1}) == [{"id": 1}]
    assert api.ask("events", []) is None
    assert api.ask("health") is True
    assert api.ask("moved", {"limit": 1}) == [{"id": 1}]
    assert [(method, path) for method, path, _, _ in requests] == [
        ("POST", "/api/flows/filter"), ("POST", "/api/events"), ("GET", "/api/health"), ("POST", "/api/moved"),
        ("POST", "/api/flows/filter")]
    assert [json.loads(body) for _, _, _, body in requests if body] == [{"limit": 1}, [], {"limit": 1}, {"limit": 1}]
    assert {headers["Authorization"] for _, _, headers, _ in requests} == {"Basic YW5uOnDDpHNz"}
    assert {headers["Content-Type"] for _, _, headers, _ in requests} == {"application/json"}


def test_who_is_let_in(server: tuple[str, list[tuple]]) -> None:
    url, requests = server
    for api, refused in ((Api(url), True), (Api(url, "ann:wrong"), True), (Api(url, "ann:päss", "wrong"), False),
                         (Api(url, None, "key"), False), (Api(url, None, "wrong"), True)):
        assert api.answers() and api.refuses() is refused
    assert "Authorization" not in requests[0][2]


def test_errors(server: tuple[str, list[tuple]]) -> None:
    url, _ = server
    with pytest.raises(ApiRefusal) as refused:
        Api(url).ask("broken")
    assert refused.value.status == 500
    with pytest.raises(ValueError):
        Api(url).ask("text")
    for address, kind in (("http://127.0.0.1:9/api", OSError), ("nonsense", OSError),
                          ("http://127.0.0.1:x/", ValueError)):
        api = Api(address)
        with pytest.raises(kind):
            api.ask("health")
        assert not api.answers() and not api.refuses()


def test_other_hosts_are_asked_through_the_proxy(server: tuple[str, list[tuple]]) -> None:
    with pytest.raises(OSError):   # the proxy of the environment does not exist
        Api("http://prefect.invalid/api").ask("health")

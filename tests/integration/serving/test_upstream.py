"""`moa serve --backend`: one real server routes, a second one decodes; and what a backend may do wrong."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.steps import release
from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.release.export import export
from moa.serving.protocol import ChatError, ChatQuestion
from moa.serving.upstream import UpstreamServer
from tests.integration.serving.test_server import (
    CHAT,
    DOMAINS,
    SOON,
    Served,
    ask,
    change_expert,
    chat_bytes,
    first_release,
    pieces,
    refusal,
    register,
    serving,
    wait_for,
    written,
)

MODELS = ("moa", "moa/alpha", "base")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Config]]:
    """Two releases that differ in alpha's expert, of which the first is champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_DTYPE", "float32")
        patch.delenv("MOA_API_KEY", raising=False)
        workspace, loaded = first_release(tmp_path_factory.mktemp("behind"))
        change_expert(workspace, "alpha", 3)
        register(workspace, loaded)
        yield workspace, loaded


@pytest.fixture(scope="module")
def behind(released: tuple[Workspace, Config]) -> Iterator[Served]:
    """The server that decodes: it wants a key, takes shorter answers than the other, and stays on its release."""
    (released[0].root / "backend-key").write_text("sesame\n")
    with serving(released[0], "--key-file", "backend-key", "--poll", "3600", "--max-tokens", "32") as served:
        yield served


@pytest.fixture(scope="module")
def front(released: tuple[Workspace, Config], behind: Served) -> Iterator[Served]:
    with serving(released[0], "--backend", behind.url, "--backend-key-file", "backend-key") as served:
        yield served


def direct(behind: Served, body: dict[str, Any]) -> httpx.Response:
    return behind.post(body, headers={"Authorization": "Bearer sesame"})


# Two servers.

@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_an_answer_through_the_backend_is_the_direct_one(front: Served, behind: Served, model: str, domain: str
                                                         ) -> None:
    body = ask(domain, 5, model=model)
    through, alone = front.post(body), direct(behind, body)
    assert through.status_code == alone.status_code == 200, through.text
    own = {"id", "created"}
    assert ({name: value for name, value in through.json().items() if name not in own}
            == {name: value for name, value in alone.json().items() if name not in own})
    assert through.json()["choices"][0]["message"]["content"] or model == "base"   # the tiny base may say nothing
    for name in ("x-moa-release", "x-moa-model"):
        assert through.headers[name] == alone.headers[name]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_through_the_backend_is_the_whole_answer(front: Served, behind: Served, model: str, usage: bool
                                                          ) -> None:
    body = ask("beta", 7, model=model)
    whole = direct(behind, body).json()
    chunks, headers = pieces(front, {**body, **({"stream_options": {"include_usage": True}} if usage else {})})
    assert written(chunks) == whole["choices"][0]["message"]["content"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and len(chunks) > (1 if model == "base" else 3)
    assert {chunk["model"] for chunk in chunks} == {whole["model"]} == {headers["x-moa-model"]}
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}
    last = chunks[-2 if usage else -1]
    assert last["moa"] == whole["moa"] and last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert [chunk["usage"] for chunk in chunks if chunk.get("usage")] == ([whole["usage"]] if usage else [])


def test_options_reach_the_backend_and_its_refusal_the_caller(front: Served, behind: Served) -> None:
    body = ask("alpha", 3, temperature=0.9, top_p=0.95, seed=7, stop=["zq"])
    assert front.post(body).json()["choices"] == direct(behind, body).json()["choices"]
    too_long = ask("alpha", 3) | {"max_tokens": 40}
    assert "writes 32 at most" in refusal(front.post(too_long), 400, "backend_refused")
    assert "writes 32 at most" in refusal(front.post({**too_long, "stream": True}), 400, "backend_refused")
    assert refusal(front.post(ask("alpha", 3, model="moa/law")), 404, "model_not_found")


def test_answers_through_the_backend_are_counted(front: Served) -> None:
    before = front.metrics()
    front.post(ask("alpha", 1, model="base"))
    pieces(front, ask("alpha", 2, model="base"))
    after = front.metrics()
    name = 'moa_routes_total{chosen="caller",domain="base"}'
    assert after[name] - before.get(name, 0) == 2
    written_before = before.get('moa_tokens_total{kind="completion"}', 0)
    assert after['moa_tokens_total{kind="completion"}'] - written_before >= 2


def test_a_caller_that_leaves_is_forgotten_by_both(front: Served, behind: Served) -> None:
    right = {"Authorization": "Bearer sesame"}
    left = f'moa_requests_total{{path="{CHAT}",status="499"}}'
    with front.held() as router:
        with front.connect(chat_bytes(ask("alpha", 1))):
            wait_for(router.begun)
        wait_for(lambda: front.metrics().get(left) == 1)
    named = ask("alpha", 1, model="moa/alpha")   # which needs no router
    with behind.held() as decoder:
        with front.connect(chat_bytes(named)):
            wait_for(decoder.begun)
        wait_for(lambda: front.metrics().get(left) == behind.metrics(right).get(left, 0) + 1 == 2)
    wait_for(lambda: behind.taken(right) == 0)
    with behind.held() as decoder, front.connect(chat_bytes({**named, "stream": True})) as connection:
        assert connection.recv(1024).startswith(b"HTTP/1.1 200 ")   # opened, and left
        wait_for(decoder.begun)
    wait_for(lambda: behind.taken(right) == 0)
    assert front.post(named).status_code == 200


def test_an_expert_has_its_exported_name_too(released: tuple[Workspace, Config], front: Served, tmp_path: Path) -> None:
    done = export(*released, tmp_path / "exported", "peft", 1)
    name = done["experts"]["beta"]["path"]
    assert name.startswith("beta-") and len(name) == len("beta-") + 12
    by_name, forced = (front.post(ask("alpha", 4, model=model)).json() for model in (name, "moa/beta"))
    assert by_name["model"] == "moa/beta" and by_name["choices"] == forced["choices"]


def test_a_champion_that_the_backend_lacks_is_named(released: tuple[Workspace, Config], front: Served) -> None:
    workspace, loaded = released
    release.promote(workspace, loaded, 2, "better")
    try:
        wait_for(lambda: front.get("/healthz").json()["release"] == "moa-mixture/2")
        said = refusal(front.post(ask("alpha", 1, model="moa/alpha")), 503, "backend_lacks_model")
        assert "has no model 'alpha-" in said and "moa export DIR --format vllm" in said
        kept = front.post(ask("alpha", 1, model="moa/beta"))   # beta's expert is the same in both
        assert kept.status_code == 200 and kept.headers["x-moa-release"] == "moa-mixture/2"
    finally:
        release.promote(workspace, loaded, 1, "as it was")
        wait_for(lambda: front.get("/healthz").json()["release"] == "moa-mixture/1")
    assert front.post(ask("alpha", 1, model="moa/alpha")).status_code == 200


def test_a_backend_that_is_gone(released: tuple[Workspace, Config]) -> None:
    """With two servers of its own: it ends the one behind."""
    with serving(released[0]) as behind, serving(released[0], "--backend", behind.url) as front:
        behind.process.terminate()
        assert behind.process.wait() == 0
        for more in ({}, {"stream": True}):
            said = refusal(front.post(ask("alpha", 1, model="moa/alpha", **more)), 502, "backend_unreachable")
            assert behind.url in said and said.count(". ") == 0
        assert front.get("/healthz").status_code == 200


@pytest.mark.parametrize(("words", "sentence"), [
    (("--backend", "nowhere"), "--backend is no address of a server"),
    (("--backend-base", "base"), "need --backend: give"),
])
def test_what_cannot_begin(released: tuple[Workspace, Config], words: tuple[str, ...], sentence: str) -> None:
    done = subprocess.run([sys.executable, "-m", "moa", "serve", "--port", "0", *words], cwd=released[0].root,
                          text=True, capture_output=True, check=False, env=dict(os.environ), timeout=SOON)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr and not done.stdout


# Backends that are not ours.

QUESTION = ChatQuestion([{"role": "user", "content": "x"}], None, {"max_new_tokens": 4}, False, False)
STREAM = ChatQuestion([{"role": "user", "content": "x"}], None, {"max_new_tokens": 4}, True, False)
ERROR = {"error": {"message": "It cannot be.", "type": "x", "code": 1}}


@contextmanager
def scripted(status: int, content: bytes) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """A server that says one thing; its address, and what it was asked."""
    seen: list[tuple[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self._say()

        def do_GET(self) -> None:
            seen.append((self.path, None))
            self._say()

        def _say(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def whole(backend: UpstreamServer) -> Any:
    return await backend.whole(await backend.begin("alpha-0123456789ab", QUESTION))


async def streamed(backend: UpstreamServer, kept: list[Any]) -> None:
    reply = await backend.begin("alpha-0123456789ab", STREAM)
    try:
        async for chunk in backend.chunks(reply):
            kept += [chunk]
    finally:
        await reply.aclose()


@pytest.mark.parametrize(("status", "content", "ours", "sentence"), [
    (400, json.dumps(ERROR), 400, "It cannot be."),
    (400, json.dumps({"object": "error", "message": "Too long."}), 400, "Too long."),
    (429, json.dumps(ERROR), 429, "It cannot be."),
    (401, json.dumps(ERROR), 502, "refuses this server's key"),
    (404, json.dumps(ERROR), 503, "has no model 'alpha-0123456789ab'"),
    (404, '{"detail": "Not Found"}', 502, "failed with status 404"),
    (500, json.dumps(ERROR), 502, "failed with status 500: It cannot be."),
    (302, "", 502, "failed with status 302"),
    (200, "<html>", 502, "no completion"),
])
def test_what_a_backend_refuses(status: int, content: str, ours: int, sentence: str) -> None:
    with scripted(status, content.encode()) as (url, _), pytest.raises(ChatError) as caught:
        asyncio.run(whole(UpstreamServer(url)))
    assert caught.value.status == ours and sentence in str(caught.value)


def test_what_is_sent_leaves_little_to_the_backends_defaults() -> None:
    with scripted(200, b'{"choices": []}') as (url, seen):
        assert asyncio.run(whole(UpstreamServer(f"{url}/v1/"))) == {"choices": []}
    assert seen == [("/v1/chat/completions", {"model": "alpha-0123456789ab", "messages": QUESTION.messages,
                                              "max_tokens": 4, "temperature": 0.0, "top_p": 1.0})]


def test_a_stream_is_cut_where_its_lines_end_and_said_to_be_broken() -> None:
    chunk = {"choices": [{"delta": {"content": "one\u2028line\u0085"}}]}
    event = f": a comment\r\ndata: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n".encode()
    kept: list[Any] = []
    with scripted(200, event * 2 + b"data: [DONE]\n\n") as (url, _):
        asyncio.run(streamed(UpstreamServer(url), kept))
    assert kept == [chunk, chunk]
    with scripted(200, event) as (url, _), pytest.raises(ChatError, match="broke off"):
        asyncio.run(streamed(UpstreamServer(url), kept))
    assert len(kept) == 3


@pytest.mark.parametrize(("listed", "name"), [
    ([{"id": "/models/tiny"}, {"id": "alpha-0123456789ab", "parent": "/models/tiny"}], "/models/tiny"),
    ([{"id": "alpha-0123456789ab"}, {"id": "other", "parent": "tiny"}, {"id": "tiny"}], "tiny"),
    ([{"id": "moa"}, {"id": "moa/alpha"}, {"id": "base"}], "base"),
    ([{"id": "moa"}], None),
])
def test_the_backends_name_of_the_base(listed: list[dict[str, str]], name: str | None) -> None:
    with scripted(200, json.dumps({"data": listed}).encode()) as (url, seen):
        if name is None:
            with pytest.raises(ChatError, match="give --backend-base"):
                asyncio.run(UpstreamServer(url).base())
        else:
            assert asyncio.run(UpstreamServer(url).base()) == name
        assert seen == [("/v1/models", None)]
        assert asyncio.run(UpstreamServer(url, base="told").base()) == "told" and len(seen) == 1


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://", "http://a:b@host", "http://host?x=1"])
def test_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="write it as http://HOST:PORT"):
        UpstreamServer(url)

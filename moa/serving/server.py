"""The champion as an OpenAI server: /v1/chat/completions, /v1/models, /healthz, /metrics, /openapi.json.

Knows nothing of what a body means (`moa.serving.protocol`), of releases (`moa.serving.active_release`) or of what is
decoded together (`moa.serving.batcher`). Answers are neither kept nor logged, and prompts only with `--keep-prompts`
(`moa.serving.prompt_log`).
"""

import hashlib
import hmac
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.serving import connections, protocol
from moa.serving.batcher import Batcher, Limits
from moa.serving.completions import complete
from moa.serving.connections import ConnectionLimits
from moa.serving.hosts import names_this_machine
from moa.serving.metrics import Metrics
from moa.serving.openapi import document
from moa.serving.prompt_log import PromptLogger
from moa.serving.protocol import ChatError
from moa.serving.upstream import UpstreamServer

if TYPE_CHECKING:
    from moa.serving.active_release import ReleaseWatcher

GRACE_SECONDS = 60      # for answers under way when the server is told to end


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server allows."""

    host: str = "127.0.0.1"
    port: int = 8000               # 0 = a free one
    key: str | None = None         # None = whoever reaches the port may ask
    poll: float = 5.0              # seconds between two looks at the champion
    body_bytes: int = 262_144
    prompt_tokens: int = 2048
    max_tokens: int = 1024         # longest answer that may be asked for
    limits: Limits = field(default_factory=Limits)
    backend: str | None = None     # address of the server that decodes; None = this one
    backend_key: str | None = None
    backend_base: str | None = None   # its name of the base; None = it is asked
    keep: int = 0                  # megabytes of prompts that are kept; 0 = none
    bounds: ConnectionLimits = field(default_factory=ConnectionLimits)   # of connections


@dataclass(frozen=True)
class Server:
    """What the handlers share."""

    settings: Settings
    champions: "ReleaseWatcher"
    batcher: Batcher
    metrics: Metrics
    backend: UpstreamServer | None = None


def serve(workspace: Workspace, config: Config, settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what is under way. Raises MoaError when it cannot begin."""
    backend = (UpstreamServer(settings.backend, settings.backend_key, settings.backend_base)
               if settings.backend is not None else None)
    listening = _bind(settings)
    from moa.serving.active_release import ReleaseWatcher, answer, decide

    metrics = Metrics()
    keeper = PromptLogger(workspace, settings.keep, config.drift.redact) if settings.keep else None

    def work(jobs: Any) -> Any:
        metrics.rows.observe(len(jobs))
        if keeper is not None:
            keep_named(keeper, [job.work for job in jobs])
        return answer(jobs) if backend is None else decide(jobs)

    champions = ReleaseWatcher(workspace, config, keeper.routed if keeper is not None else None)
    batcher = Batcher(work, settings.limits)
    metrics.watch(waiting=lambda: batcher.waiting, running=lambda: batcher.running,
                  release=lambda: champions.now.version, failures=lambda: champions.failures)
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    app = build(Server(settings, champions, batcher, metrics, backend))
    bounds = replace(settings.bounds, descriptors=1 if backend is None else 2)
    running = _Announcing(connections.Config(
        app, bounds, log_config=None, access_log=False, lifespan="off", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS))
    running.announcement = f"{champions.now.label} serves at {where}"
    champions.follow(settings.poll)
    # uvicorn raises the signals it got once more when it has ended; by then there is nothing left for them to do.
    before = [(number, signal.signal(number, lambda *_: None)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        running.run(sockets=[listening])
    finally:
        champions.close()
        batcher.close()
        if keeper is not None:
            keeper.close()
        for number, handler in before:
            signal.signal(number, handler)


def keep_named(keeper: PromptLogger, asks: Sequence[Any]) -> None:
    """The prompts that no router sees, because the caller named the domain."""
    for ask in asks:
        if ask.domain is not None:
            keeper.named(ask.release.version, ask.release.digest, ask.messages, ask.domain)


class _Announcing(connections.Server):
    """Says where it listens once it does."""

    announcement = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.announcement, flush=True)


def _bind(settings: Settings) -> socket.socket:
    """The port, taken before anything slow begins. Raises UsageError."""
    if settings.key is None and not _loopback(settings.host):
        raise UsageError(f"--host {settings.host} lets other machines ask, and there is no key: set MOA_API_KEY, or "
                         "give --key-file.")
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UsageError(f"{settings.host}:{settings.port} cannot be listened at: {error.strerror or error}. Choose "
                         "another --port, 0 for a free one, or another --host.") from None


def _loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# The application.

def build(server: Server) -> FastAPI:
    # Its own schema would know no body, and its redirects would lead to whatever host the caller names.
    app = FastAPI(title="moa", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    key = server.settings.key

    def allowed(request: Request) -> None:
        if key is None:
            return
        given = [value for name, value in request.headers.raw if name == b"authorization"]
        scheme, _, word = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not (scheme.lower() == b"bearer" and _same(word.strip(), key.encode())):
            raise ChatError(401, "The key is missing or wrong: send `Authorization: Bearer KEY`.", "invalid_api_key",
                            "authentication_error")

    @app.post("/v1/chat/completions", dependencies=[Depends(allowed)])
    async def completions(request: Request) -> Response:
        return await complete(server, request)

    @app.get("/v1/models", dependencies=[Depends(allowed)])
    async def models() -> dict[str, Any]:
        release = server.champions.now
        return {"object": "list", "data": [{"id": name, "object": "model", "created": release.created,
                                            "owned_by": release.label}
                                           for name in protocol.models(release.mixture.labels)]}

    @app.get("/openapi.json", dependencies=[Depends(allowed)])
    async def openapi() -> dict[str, Any]:
        release = server.champions.now
        return document(labels=release.mixture.labels, adapters=sorted(release.adapters), key=key is not None,
                        most_tokens=server.settings.max_tokens, backend=server.backend is not None)

    @app.get("/healthz")
    async def health() -> JSONResponse:
        well = server.batcher.alive
        return JSONResponse({"status": "ok" if well else "failed", "release": server.champions.now.label},
                            200 if well else 503)

    @app.get("/metrics", dependencies=[Depends(allowed)])
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ChatError)
    async def refuse(_: Request, error: ChatError) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "1"}}.get(
            error.status)
        return JSONResponse(error.as_dict(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def elsewhere(_: Request, error: HTTPException) -> JSONResponse:
        code = str(error.detail).lower().replace(" ", "_")
        refusal = ChatError(error.status_code, f"{error.detail}.", code)
        return JSONResponse(refusal.as_dict(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> JSONResponse:   # uvicorn logs it
        return JSONResponse(ChatError(500, "The server failed; its log says why.", "internal_error",
                                      "server_error").as_dict(), 500)

    if key is None:
        app.add_middleware(_ThisMachineOnly)
    app.add_middleware(_Counted, metrics=server.metrics)   # the last one added sees a request first
    return app


def _same(given: bytes, wanted: bytes) -> bool:
    """In a time that tells nothing of where, or how early, they differ."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(wanted).digest())


class _ThisMachineOnly:
    """Refuses every path, /healthz and those that do not exist too, to a request that names another host.

    A server without a key listens on a loopback address alone, so a probe from elsewhere cannot reach it anyway.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.app
        if scope["type"] == "http" and not names_this_machine(scope["headers"]):
            refusal = ChatError(403, "Without a key only this machine's own addresses are answered to: ask for "
                                     "127.0.0.1, [::1] or localhost, or set a key.", "wrong_host")
            app = JSONResponse(refusal.as_dict(), refusal.status)
        await app(scope, receive, send)


class _Counted:
    """Every request by path and status, with its time to the last byte."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499   # nginx's number for a client that left first

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.request(scope["path"], status, time.monotonic() - began)

"""An OpenAI server of the champion: /v1/chat/completions, /v1/models, /healthz, /metrics, /openapi.json.

`moa.serving.protocol` reads bodies, `moa.serving.active_release` holds the release and `moa.serving.batcher` makes the
batches. Answers are never stored or logged; prompts are logged only with `--keep-prompts` (`moa.serving.prompt_log`).
"""

import hashlib
import hmac
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.serving import connections, protocol
from moa.serving.batcher import Batcher
from moa.serving.completions import complete
from moa.serving.hosts import names_this_machine
from moa.serving.metrics import Metrics
from moa.serving.openapi import document
from moa.serving.prompt_log import PromptLogger
from moa.serving.protocol import ChatError
from moa.serving.state import ServerState, Settings
from moa.serving.upstream import UpstreamServer

GRACE_SECONDS = 60      # for unfinished answers after the signal to end


def serve(workspace: Workspace, config: Config, settings: Settings) -> None:
    """Serve the champion until SIGTERM or Ctrl-C, then finish running requests. Raises MoaError if it cannot start."""
    backend = (UpstreamServer(settings.backend, settings.backend_key, settings.backend_base)
               if settings.backend is not None else None)
    listening = _bind(settings)
    from moa.serving.active_release import ReleaseWatcher, generate_answers, route_requests

    metrics = Metrics()
    logger = PromptLogger(workspace, settings.keep, config.drift.redact) if settings.keep else None

    def work(jobs: Any) -> Any:
        metrics.rows.observe(len(jobs))
        if logger is not None:
            _log_named(logger, [job.work for job in jobs])
        return generate_answers(jobs) if backend is None else route_requests(jobs)

    releases = ReleaseWatcher(workspace, config, logger.routed if logger is not None else None)
    batcher = Batcher(work, settings.limits)
    metrics.watch(waiting=lambda: batcher.waiting, running=lambda: batcher.running,
                  release=lambda: releases.now.version, failures=lambda: releases.failures)
    host, port = listening.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    app = build(ServerState(settings, releases, batcher, metrics, backend))
    bounds = replace(settings.bounds, descriptors=1 if backend is None else 2)
    running = _Announcing(connections.Config(
        app, bounds, log_config=None, access_log=False, lifespan="off", server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS))
    running.announcement = f"{releases.now.label} serves at {where}"
    releases.follow(settings.poll)
    # After it has ended, uvicorn raises the received signals again: these handlers ignore them.
    handlers = [(number, signal.signal(number, lambda *_: None)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        running.run(sockets=[listening])
    finally:
        releases.close()
        batcher.close()
        if logger is not None:
            logger.close()
        for number, handler in handlers:
            signal.signal(number, handler)


def _log_named(logger: PromptLogger, requests: Sequence[Any]) -> None:
    """Log the prompts whose domain the caller named; all others are logged when the router decides."""
    for request in requests:
        if request.domain is not None:
            logger.named(request.release.version, request.release.digest, request.messages, request.domain)


class _Announcing(connections.Server):
    """Prints `announcement` once the server listens."""

    announcement = ""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then announce it."""
        await super().startup(sockets)
        print(self.announcement, flush=True)


def _bind(settings: Settings) -> socket.socket:
    """The listening socket, bound before the champion is loaded, which takes long. Raises UsageError."""
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

def build(server: ServerState) -> FastAPI:
    """Build the FastAPI application with its routes, error handlers and middleware."""
    # FastAPI's own schema would lack the bodies, and its redirects would use the Host that the client sent.
    app = FastAPI(title="moa", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    key = server.settings.key

    def require_key(request: Request) -> None:
        if key is None:
            return
        given = [value for name, value in request.headers.raw if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not (scheme.lower() == b"bearer" and _same(token.strip(), key.encode())):
            raise ChatError(401, "The key is missing or wrong: send `Authorization: Bearer KEY`.", "invalid_api_key",
                            "authentication_error")

    @app.post("/v1/chat/completions", dependencies=[Depends(require_key)])
    async def completions(request: Request) -> Response:
        return await complete(server, request)

    @app.get("/v1/models", dependencies=[Depends(require_key)])
    async def models() -> dict[str, Any]:
        release = server.releases.now
        return {"object": "list", "data": [{"id": name, "object": "model", "created": release.created,
                                            "owned_by": release.label}
                                           for name in protocol.models(release.mixture.labels)]}

    @app.get("/openapi.json", dependencies=[Depends(require_key)])
    async def openapi() -> dict[str, Any]:
        release = server.releases.now
        return document(labels=release.mixture.labels, adapters=sorted(release.adapters), key=key is not None,
                        most_tokens=server.settings.max_tokens, backend=server.backend is not None)

    @app.get("/healthz")
    async def health() -> JSONResponse:
        alive = server.batcher.alive
        return JSONResponse({"status": "ok" if alive else "failed", "release": server.releases.now.label},
                            200 if alive else 503)

    @app.get("/metrics", dependencies=[Depends(require_key)])
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ChatError)
    async def refuse(_: Request, error: ChatError) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}, 429: {"Retry-After": "1"}}.get(
            error.status)
        return JSONResponse(error.as_dict(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def refuse_path(_: Request, error: HTTPException) -> JSONResponse:
        code = str(error.detail).lower().replace(" ", "_")
        refusal = ChatError(error.status_code, f"{error.detail}.", code)
        return JSONResponse(refusal.as_dict(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> JSONResponse:   # uvicorn logs the error
        return JSONResponse(ChatError(500, "The server failed; its log says why.", "internal_error",
                                      "server_error").as_dict(), 500)

    if key is None:
        app.add_middleware(_ThisMachineOnly)
    app.add_middleware(_Counted, metrics=server.metrics)   # the last one added sees a request first
    return app


def _same(given: bytes, wanted: bytes) -> bool:
    """Whether two keys are equal, compared in constant time against timing attacks."""
    return hmac.compare_digest(hashlib.sha256(given).digest(), hashlib.sha256(wanted).digest())


class _ThisMachineOnly:
    """Refuses requests whose Host is not this machine, on every path, including /healthz and unknown paths.

    A server without a key listens at a loopback address alone, so no probe from another machine can reach it anyway.
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
    """Counts every request by path and status, with its time to the last byte."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499   # nginx's status for a client that disconnected first

        async def record_status(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, record_status)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.request(scope["path"], status, time.monotonic() - began)

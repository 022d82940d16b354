"""An OpenAI server of the champion: /v1/chat/completions, /v1/models, /healthz, /metrics, /openapi.json, /docs.

FastAPI writes the OpenAPI document from the routes here and the models of `moa.serving.schemas`.
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
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from moa.core.config import Config
from moa.core.errors import UsageError
from moa.core.paths import Workspace
from moa.serving import connections, protocol, swagger
from moa.serving.batcher import Batcher
from moa.serving.completions import complete
from moa.serving.hosts import names_this_machine
from moa.serving.metrics import Metrics
from moa.serving.prompt_log import PromptLogger
from moa.serving.protocol import ChatError
from moa.serving.schemas import (
    REFERENCE,
    ChatCompletion,
    ChatRequest,
    ErrorBody,
    Health,
    Model,
    ModelList,
    StreamEvent,
)
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
    key, backend = server.settings.key, server.backend
    # FastAPI's own routes of the document would need no key, and its redirects would use the Host that the client sent.
    app = FastAPI(title="moa", version="1", description="A Mixture-of-LoRAs as an OpenAI server.", openapi_url=None,
                  docs_url=None, redoc_url=None, redirect_slashes=False,
                  generate_unique_id_function=lambda route: route.name)
    guard = [] if key is None else [Depends(BearerKey(key))]
    guarded = 403 if key is None else 401

    @app.post("/v1/chat/completions", dependencies=guard, tags=["OpenAI"], summary="Answer a conversation",
              response_model=ChatCompletion, responses={
                  200: {"description": "The answer, or a stream of its pieces.",
                        "content": _content("text/event-stream", StreamEvent), "headers": _headers(ANSWERED)},
                  **_refusals(400, guarded, 404, 408, 413, 415, 429, 500, 503, *((502, "4XX") if backend else ()))},
              openapi_extra={"requestBody": {"required": True, "content": _content("application/json", ChatRequest)}})
    async def completions(request: Request) -> Response:
        return await complete(server, request)

    @app.get("/v1/models", dependencies=guard, tags=["OpenAI"], summary="List the models",
             responses=_refusals(guarded, 500))
    async def models() -> ModelList:
        release = server.releases.now
        return ModelList(object="list", data=[
            Model(id=name, object="model", created=release.created, owned_by=release.label)
            for name in protocol.models(release.mixture.labels)])

    @app.get("/healthz", tags=["server"], summary="Whether the server works, and which release serves",
             response_model=Health, responses={503: {"model": Health, "description": "The server does not work."},
                                               **_refusals(*(() if key else (guarded,)), 500)})
    async def health() -> JSONResponse:
        alive = server.batcher.alive
        health = Health(status="ok" if alive else "failed", release=server.releases.now.label)
        return JSONResponse(health.as_dict(), 200 if alive else 503)

    @app.get("/metrics", dependencies=guard, tags=["server"], summary="Counters in Prometheus' format",
             response_class=PlainTextResponse, responses=_refusals(guarded, 500))
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", dependencies=guard, tags=["server"], summary="This document",
             response_model=dict[str, Any], responses=_refusals(guarded, 500))
    async def openapi() -> JSONResponse:
        return JSONResponse(app.openapi())

    swagger.add_page(app, guard)

    @lru_cache(maxsize=1)
    def document(models: tuple[str, ...]) -> dict[str, Any]:
        return _document(app, models, server.settings.max_tokens)

    def present_document() -> dict[str, Any]:
        release = server.releases.now
        return document((*protocol.models(release.mixture.labels), *sorted(release.adapters)))

    app.openapi = present_document   # type: ignore[method-assign]   # as FastAPI's manual says

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


# The OpenAPI document.

REFUSALS: dict[int | str, str] = {
    400: "The body is not valid, or asks for something that this server does not support.",
    401: "The key is missing or wrong.",
    403: "The Host is not this machine; a server without a key answers its own machine only.",
    404: "There is no such model.",
    408: "The body did not arrive in time.", 413: "The body is too large.", 415: "The body's type is not JSON.",
    429: "Too many requests wait already.", 500: "The server failed.", 502: "The backend failed.",
    503: "The server is ending, or its backend lacks the expert.", "4XX": "The backend's own refusal.",
}
HEADERS: dict[int | str, dict[str, str]] = {
    401: {"WWW-Authenticate": "The scheme of the key."}, 429: {"Retry-After": "Seconds."}}
ANSWERED = {"X-Moa-Release": "The release that answers.",
            "X-Moa-Model": "The model that answered; in a stream, each chunk names it instead."}


def _document(app: FastAPI, models: Sequence[str], most_tokens: int) -> dict[str, Any]:
    """FastAPI's document of the routes, with the models of bodies, which FastAPI does not read itself.

    Args:
        models: names that a request may have.
        most_tokens: longest answer that may be requested.
    """
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(ChatRequest, "validation"), (StreamEvent, "validation")], ref_template=REFERENCE)
    document["components"]["schemas"] |= bodies["$defs"]
    properties = document["components"]["schemas"][ChatRequest.__name__]["properties"]
    properties["model"]["enum"] = list(models)
    for name in ("max_tokens", "max_completion_tokens"):
        properties[name]["anyOf"][0]["maximum"] = most_tokens
    return document


def _refusals(*statuses: int | str) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that refuses with these statuses."""
    return {status: {"description": REFUSALS[status], "content": _content("application/json", ErrorBody),
                     "headers": _headers(HEADERS.get(status, {}))} for status in statuses}


def _content(media_type: str, model: type) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}}


def _headers(descriptions: dict[str, str]) -> dict[str, Any]:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in descriptions.items()}


# Who may ask.

class BearerKey(HTTPBearer):
    """A dependency of routes that refuses requests without the key. FastAPI adds it to the document."""

    def __init__(self, key: str) -> None:
        super().__init__(scheme_name="bearer")
        self.key = key.encode()

    async def __call__(self, request: HTTPConnection) -> None:
        """Raise ChatError for a request with no key, a wrong one or several."""
        given = [value for name, value in request.headers.raw if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not (scheme.lower() == b"bearer" and _same(token.strip(), self.key)):
            raise ChatError(401, "The key is missing or wrong: send `Authorization: Bearer KEY`.", "invalid_api_key",
                            "authentication_error")


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

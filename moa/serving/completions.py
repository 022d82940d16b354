"""Handles requests for chat completions: checks the body, queues a job, and sends the answer, whole or as a stream."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from moa.core.errors import DataError, UsageError
from moa.serving import protocol
from moa.serving.batcher import Closed, Full, Job
from moa.serving.protocol import ChatError, ChatQuestion, ChatResponseBuilder, StreamTrimmer
from moa.serving.schemas import Delta
from moa.serving.state import ServerState
from moa.serving.upstream import Routed, UpstreamServer

if TYPE_CHECKING:
    from moa.serving.active_release import Answer, AnswerListener, Release

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
Result = TypeVar("Result")


async def complete(server: ServerState, request: Request) -> Response:
    """Answer a request POST /v1/chat/completions. Raises ChatError for a refusal."""
    release = server.releases.now   # this release answers the request, even if the champion changes meanwhile
    settings = server.settings
    data = await _body(request, settings.body_bytes, settings.bounds.body_seconds)
    question = await run_in_threadpool(protocol.read, data, release.mixture.labels, settings.max_tokens,
                                       release.adapters)
    tokens = await run_in_threadpool(_prompt_tokens, release, question, settings.prompt_tokens)
    if server.backend is not None:
        response = await _unless_disconnected(request, asyncio.ensure_future(
            _forwarded(server, server.backend, release, question, tokens)))
        return response or Response(status_code=499)
    headers = {"X-Moa-Release": release.label}
    builder = ChatResponseBuilder(release.fingerprint)
    if question.stream:
        events, listener = _listen()
        job = _submit(server, release, question, tokens, listener)
        job.done.add_done_callback(events.put)
        return StreamingResponse(_chunks(server, job, events, builder, question.usage), media_type="text/event-stream",
                                 headers={**headers, **UNBUFFERED})
    job = _submit(server, release, question, tokens, None)
    answer: Answer | None = await _unless_disconnected(request, asyncio.wrap_future(job.done))
    if answer is None:
        job.work.cancelled.set()
        return Response(status_code=499)
    server.metrics.answer(answer)
    return JSONResponse(builder.completion(answer).as_dict(),
                        headers={**headers, "X-Moa-Model": protocol.answerer(answer)})


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The request's body of at most `most` bytes, within `seconds`. Raises ChatError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # A web page may send other types to a server on this machine without a CORS preflight.
        raise ChatError(415, "The Content-Type must be application/json.", "unsupported_media_type")
    data = bytearray()
    try:
        async with asyncio.timeout(seconds):
            if int(request.headers.get("content-length", 0)) > most:
                raise _too_large(most)
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise ChatError(408, f"The body did not arrive within {seconds:g} seconds.", "timeout") from None
    except ClientDisconnect:
        raise ChatError(400, "The body ended early.", "invalid_json") from None
    return bytes(data)


def _too_large(most: int) -> ChatError:
    return ChatError(413, f"The body is larger than the {most} bytes that this server takes.", "request_too_large")


def _prompt_tokens(release: "Release", question: ChatQuestion, most: int) -> int:
    """Number of tokens of the prompt. Raises ChatError for a prompt with special tokens, or one that is too long."""
    from jinja2 import TemplateError

    from moa.serving.active_release import prompt_length, special_in

    for index, message in enumerate(question.messages):
        if marker := special_in(release, message["content"]):
            raise ChatError(400, f"`messages[{index}].content` holds {marker!r}, a marker of the base's own: a message "
                                 "cannot begin or end a turn.", "special_token")
    try:
        tokens = prompt_length(release, question.messages, question.options["max_new_tokens"])
    except UsageError as error:
        raise ChatError(400, str(error), "context_length_exceeded") from None
    except (DataError, TemplateError) as error:
        raise ChatError(400, f"The base's chat template does not take these messages: {error}", "invalid_body"
                        ) from None
    if tokens > most:
        raise ChatError(400, f"The prompt is {tokens} tokens long; this server reads {most} at most.",
                        "context_length_exceeded")
    return tokens


def _submit(server: ServerState, release: "Release", question: ChatQuestion, tokens: int,
            listener: "AnswerListener | None") -> Job:
    """Queue the question: for its answer, or for the router's decision alone where a backend decodes."""
    from moa.serving.active_release import ReleaseRequest

    request = ReleaseRequest.of(release, question.messages, question.domain, question.options, tokens, listener)
    job = request.job() if server.backend is None else request.routing()
    try:
        server.batcher.submit(job)
    except Full:
        raise ChatError(429, "Too many requests wait already: try again in a moment.", "queue_full",
                        "rate_limit_error") from None
    except Closed:
        raise ChatError(503, "The server is ending.", "shutting_down", "server_error") from None
    return job


async def _unless_disconnected(request: Request, result: "asyncio.Future[Result]") -> Result | None:
    """The result; None when the client disconnects first, and then the future is cancelled."""
    disconnected = asyncio.ensure_future(_disconnected(request))
    either: set[asyncio.Future[Any]] = {result, disconnected}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    disconnected.cancel()
    if result.done():
        return result.result()
    result.cancel()
    return None


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Answers of a backend that decodes.

class _Relayed(StreamingResponse):
    """A streaming response that closes `source` when it ends, even when the client left before the first piece."""

    source: Any   # the backend's response

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()


async def _forwarded(server: ServerState, backend: UpstreamServer, release: "Release", question: ChatQuestion,
                     tokens: int) -> Response:
    """The backend's answer, with the model names and fingerprint of this server. Raises ChatError."""
    routed = await _routed(server, release, question, tokens)
    names = {label: name for name, label in release.adapters.items()}
    reply = await backend.begin(names.get(routed.label) or await backend.base(), question)
    headers = {"X-Moa-Release": release.label, "X-Moa-Model": protocol.answerer(routed)}
    ours = {"model": protocol.answerer(routed), "system_fingerprint": release.fingerprint}
    if question.stream:
        stream = _Relayed(_relayed(server, backend, reply, routed, ours, question.usage),
                          media_type="text/event-stream", headers={**headers, **UNBUFFERED})
        stream.source = reply
        return stream
    completion = await backend.whole(reply)
    _count(server, routed, completion.get("usage"))
    return JSONResponse({**completion, **ours, "moa": protocol.routing(routed).as_dict()}, headers=headers)


async def _routed(server: ServerState, release: "Release", question: ChatQuestion, tokens: int) -> Routed:
    """The domain that the question names, or the router's decision."""
    from moa.mixture.mixture import stated_confidence

    if question.domain is not None:
        return Routed(question.domain, None, False)
    decision = await asyncio.wrap_future(_submit(server, release, question, tokens, None).done)
    return Routed(decision.domain, stated_confidence(decision), decision.abstained, decision.score, decision.threshold)


async def _relayed(server: ServerState, backend: UpstreamServer, reply: Any, routed: Routed, ours: dict[str, str],
                   usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a backend's stream, with the fields `ours` in each chunk and the routing in the last."""
    try:
        async for chunk in backend.chunks(reply):
            if "error" in chunk:
                yield _event({"error": chunk["error"]})
                return
            _count(server, routed, counts := chunk.get("usage"))
            if not usage:
                chunk.pop("usage", None)
                if counts and not chunk.get("choices"):   # a chunk with token counts, which the caller did not ask for
                    continue
            last = any(choice.get("finish_reason") for choice in chunk.get("choices", []))
            yield _event({**chunk, **ours, **({"moa": protocol.routing(routed).as_dict()} if last else {})})
    except ChatError as error:
        yield _event(error.as_dict())
        return
    yield "data: [DONE]\n\n"


def _count(server: ServerState, routed: Routed, usage: Any) -> None:
    """Count a backend's answer with its token counts, if it sent them."""
    if isinstance(usage, dict):
        server.metrics.answer(replace(routed, prompt_tokens=usage.get("prompt_tokens") or 0,
                                      tokens=usage.get("completion_tokens") or 0))


# Streams of this server's own answers.

class _Events:
    """A queue from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def put(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):   # the event loop has ended
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)


def _listen() -> tuple[_Events, "AnswerListener"]:
    """A queue, and a listener that puts {"label": ...} and then pieces of text into it."""
    from moa.serving.active_release import AnswerListener

    events = _Events()
    return events, AnswerListener(lambda label: events.put({"label": label}), events.put)


async def _chunks(server: ServerState, job: Job, events: _Events, builder: ChatResponseBuilder,
                  usage: bool) -> AsyncIterator[str]:
    """Server-sent events of one answer: the model's name, the text as it is generated, and the last chunks."""
    model, text = "moa", StreamTrimmer()
    try:
        while not isinstance(event := await events.queue.get(), Future):
            if isinstance(event, dict):
                model = protocol.model_of(event["label"])
                yield _event(builder.chunk(model, Delta(role="assistant", content="")).as_dict())
            elif piece := text.add(event):
                yield _event(builder.chunk(model, Delta(content=piece)).as_dict())
        try:
            answer = event.result()
        except (Exception, CancelledError):
            yield _event(ChatError(500, "The server could not finish.", "internal_error", "server_error").as_dict())
            return
        server.metrics.answer(answer)
        for chunk in builder.endings(answer, usage):
            yield _event(chunk.as_dict())
        yield "data: [DONE]\n\n"
    finally:   # also when the client has disconnected
        job.work.cancelled.set()
        job.done.cancel()


def _event(content: Any) -> str:
    """One server-sent event with a JSON value."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

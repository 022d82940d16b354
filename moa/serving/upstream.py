"""A client of the backend, another OpenAI-compatible server that decodes: sends questions and receives their answers.

Only the options that `moa.serving.protocol` parsed are sent, and nothing else of the client's body, so a question has
the same options whether this server or the backend decodes it.
"""

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from moa.core.errors import UsageError
from moa.serving.protocol import ChatError, ChatQuestion

CONNECT_SECONDS, READ_SECONDS = 10, 600   # READ: between two pieces of an answer, or for a whole one
OURS = re.compile(r"moa(/.*)?|[^/]+-[0-9a-f]{12}")   # model names of a moa server, and of adapters from `moa export`


@dataclass(frozen=True)
class Routed:
    """The routing of a question and the backend's token counts; fields as in `moa.mixture.mixture.Answer`."""

    domain: str
    confidence: float | None
    abstained: bool
    similarity: float | None = None
    threshold: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0

    @property
    def label(self) -> str:
        """The label of the expert that answers, or "base"."""
        return "base" if self.abstained else self.domain


class UpstreamServer:
    """The backend at one address."""

    def __init__(self, url: str, key: str | None = None, base: str | None = None) -> None:
        """`url` may end with /v1. `base` is the backend's name of the base model; None = its list of models is read.

        Raises UsageError for an invalid address.
        """
        self.url = _address(url)
        self._configured_base, self._base = base, base
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = httpx.AsyncClient(base_url=self.url, headers=headers, limits=httpx.Limits(max_connections=None),
                                         timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS))

    async def base(self) -> str:
        """The backend's name of the base without an adapter. Raises ChatError."""
        if self._base is None:
            reply = await self._send(self._client.build_request("GET", "models"), "")
            listed = _json(await self._read(reply))
            models = listed.get("data") if isinstance(listed, dict) else None
            names = [model["id"] for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)
                     and not model.get("parent")] if isinstance(models, list) else []   # vLLM's adapters have a parent
            self._base = next((name for name in names if not OURS.fullmatch(name)), None)
        if self._base is None:
            raise _failed(f"The backend at {self.url} lists no base model: give --backend-base.")
        return self._base

    async def begin(self, model: str, question: ChatQuestion) -> httpx.Response:
        """Send a question for `model`; the response, whose body the caller reads and closes. Raises ChatError."""
        return await self._send(self._client.build_request("POST", "chat/completions", json=_body(model, question)),
                                model)

    async def whole(self, reply: httpx.Response) -> dict[str, Any]:
        """Read the whole completion from a response. Raises ChatError."""
        completion = _json(await self._read(reply))
        if not (isinstance(completion, dict) and isinstance(completion.get("choices"), list)):
            raise _failed(f"The backend at {self.url} answered with something that is no completion.")
        return completion

    async def chunks(self, reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
        """Read the chunks of a stream as they arrive. Raises ChatError when the stream ends before [DONE]."""
        try:
            async for line in _lines(reply):
                name, _, data = line.partition(b":")
                if name != b"data":
                    continue
                if data.strip() == b"[DONE]":
                    return
                if not isinstance(chunk := _json(data), dict):
                    break
                yield chunk
        except httpx.HTTPError:
            pass
        raise _failed(f"The answer of the backend at {self.url} broke off.")

    async def _send(self, request: httpx.Request, model: str) -> httpx.Response:
        try:
            reply = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if reply.status_code == 200:
            return reply
        raise self._refusal(reply.status_code, _json(await self._read(reply)), model)

    async def _read(self, reply: httpx.Response) -> bytes:
        try:
            return await reply.aread()
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        finally:
            await reply.aclose()

    def _unreachable(self, error: httpx.HTTPError) -> ChatError:
        return _failed(f"The backend at {self.url} gives no answer ({type(error).__name__}): try again when it runs.",
                       "backend_unreachable")

    def _refusal(self, status: int, content: Any, model: str) -> ChatError:
        """The backend's refusal as this server's: the same where the client can correct it, else 502 or 503."""
        message = _message(content)
        if status in (401, 403):   # the backend refuses this server's key; the client's key was valid
            return _failed(f"The backend at {self.url} refuses this server's key: see --backend-key-file.")
        if status == 404 and message and model:
            self._base = self._configured_base
            return ChatError(503, f"The backend at {self.url} has no model {model!r}: run `moa export DIR --format "
                                  "vllm` and serve what it wrote there.", "backend_lacks_model", "server_error")
        if message and 400 <= status < 500 and status != 404:
            code = "queue_full" if status == 429 else "backend_refused"
            return ChatError(status, message, code, "rate_limit_error" if status == 429 else "invalid_request_error")
        return _failed(f"The backend at {self.url} failed with status {status}{f': {message}' if message else '.'}")


def _failed(message: str, code: str = "backend_failed") -> ChatError:
    return ChatError(502, message, code, "server_error")


def _address(url: str) -> str:
    """The address with /v1. Raises UsageError for an invalid one."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment or parsed.userinfo:
        raise UsageError("--backend is no address of a server: write it as http://HOST:PORT.")
    return f"{str(parsed).rstrip('/').removesuffix('/v1')}/v1"


def _body(model: str, question: ChatQuestion) -> dict[str, Any]:
    """The request's body, with explicit options, because the backend has other defaults than moa's greedy decoding."""
    options = question.options
    body: dict[str, Any] = {
        "model": model, "messages": question.messages, "max_tokens": options["max_new_tokens"],
        "temperature": options.get("temperature", 0.0), "top_p": options.get("top_p", 1.0),
        **{name: options[name] for name in ("seed", "stop") if name in options}}
    if question.stream:   # this server counts tokens even if the client does not ask for them
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


async def _lines(reply: httpx.Response) -> AsyncIterator[bytes]:
    """The lines of an event stream. httpx's own `aiter_lines` also splits at U+2028, which a text may contain."""
    held = b""
    async for piece in reply.aiter_bytes():
        *lines, held = (held + piece).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r")


def _json(data: bytes) -> Any:
    """The parsed JSON; None where `data` is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _message(content: Any) -> str:
    """The message of an error body in OpenAI's form or in older vLLM's; "" for any other body."""
    if not isinstance(content, dict):
        return ""
    error = content.get("error", content if content.get("object") == "error" else None)
    message = error.get("message") if isinstance(error, dict) else None
    return message if isinstance(message, str) else ""

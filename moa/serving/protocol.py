"""OpenAI's chat protocol: reads request bodies, and builds completions and their chunks.

`parse` defines the bodies that both `moa serve` and MLflow's server accept; `read` adds what a server that untrusted
clients reach must refuse.
"""

import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moa.core.errors import UsageError

ROLES = ("system", "user", "assistant")
OPENERS = ("system", "user")   # roles of a first message: some templates cannot begin with an answer, and no row does
OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
           "top_p": "top_p", "seed": "seed", "stop": "stop"}   # OpenAI's name -> moa's
WHOLE = {"max_tokens", "max_completion_tokens", "seed"}   # options that are integers
MESSAGES = 256   # of a body: a template is rendered for each turn, so the cost grows with the square of the turns
STOPS = 16       # stop texts of one answer
# Characters that a text may not hold: control characters except tab and line ends, and surrogates, which UTF-8 lacks.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# Options that would change the answer's form, with the values that have no effect. All other values are refused.
WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "logprobs": (False,), "top_logprobs": (0,), "response_format": ({"type": "text"},), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "prediction": (),
}


class BodyError(ValueError):
    """A body that is refused; the message names the field and the reason."""


class ChatError(Exception):
    """A refusal with its HTTP `status`; `code` is for programs, the message for the caller's log."""

    def __init__(self, status: int, message: str, code: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code, self.kind = status, code, kind

    def as_dict(self) -> dict[str, Any]:
        """The body of an error response, in OpenAI's form."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.code}}


def parse(body: Any) -> tuple[list[dict[str, str]], str | None, dict[str, Any]]:
    """Messages, forced domain ("base" = no expert, None = the router decides) and decoding options of a chat body.

    Options that the body lacks, or that are null, keep moa's defaults: without a temperature the answer is greedy.
    Raises BodyError.
    """
    if not isinstance(body, dict):
        raise BodyError("The body must be a JSON object with `messages`.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BodyError("`messages` must be a list of at least one message.")
    for index, message in enumerate(messages):
        if (not isinstance(message, dict) or message.get("role") not in ROLES
                or not isinstance(message.get("content"), str)):
            raise BodyError(f"`messages[{index}]` must have a role ({', '.join(ROLES)}) and a text as content.")
    if messages[0]["role"] not in OPENERS:
        raise BodyError(f"`messages[0]` is the {messages[0]['role']}'s; a conversation begins with the "
                        f"{' or the '.join(OPENERS)}.")
    model = body.get("model", "moa")
    if not isinstance(model, str) or not (model in ("moa", "base") or model.removeprefix("moa/") not in ("", model)):
        raise BodyError("`model` must be moa (the router decides), moa/NAME (that expert) or base.")
    domain = None if model == "moa" else model.removeprefix("moa/")
    return ([{"role": message["role"], "content": message["content"]} for message in messages], domain,
            _options(body))


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """The decoding options of a body by moa's names. Raises BodyError."""
    from moa.mixture.generation.engine import GenerationConfig  # validates each option

    options: dict[str, Any] = {}
    for key, ours in OPTIONS.items():
        value: Any = body.get(key)
        if value is None:
            continue
        if key in WHOLE and isinstance(value, float) and value.is_integer():   # JSON does not distinguish 4.0 from 4
            value = int(value)
        try:
            GenerationConfig(**{ours: value})
        except UsageError as error:
            raise BodyError(str(error).replace(ours, f"`{key}`", 1)) from None
        if options.setdefault(ours, value) != value:
            raise BodyError("`max_tokens` and `max_completion_tokens` mean the same and differ: give one.")
    return options


@dataclass(frozen=True)
class ChatQuestion:
    """A valid chat body, with a domain that the release has."""

    messages: list[dict[str, str]]
    domain: str | None        # "base" = no expert; None = the router decides
    options: dict[str, Any]   # fields of GenerationConfig
    stream: bool
    usage: bool               # whether a stream ends with its token counts


def models(labels: Sequence[str]) -> list[str]:
    """The model names that a body may have, for experts with these labels."""
    return ["moa", *(f"moa/{label}" for label in labels), "base"]


def read(data: bytes, labels: Sequence[str], most_tokens: int,
         adapters: Mapping[str, str] | None = None) -> ChatQuestion:
    """The question in a request's body.

    Args:
        labels: of the release's experts.
        most_tokens: longest answer that may be requested, and a bound of the default.
        adapters: labels by further model names.

    Raises ChatError.
    """
    body = _json(data)
    if isinstance(body, dict):
        if isinstance(model := body.get("model"), str) and model in (adapters or {}):
            body = {**body, "model": model_of((adapters or {})[model])}
        _check_model(body.get("model", "moa"), labels)
        for name, harmless in WITHOUT_EFFECT.items():
            if body.get(name) is not None and not any(_equal(body[name], value) for value in harmless):
                raise ChatError(400, f"`{name}` is not supported: leave it out.", "unsupported_parameter")
        body = {**body, "messages": _flat(body.get("messages"))}
    try:
        messages, domain, options = parse(body)
    except (BodyError, UsageError) as error:
        raise ChatError(400, str(error), "invalid_body") from None
    stream, usage = _streaming(body)
    return ChatQuestion(messages, domain, _bounded(options, most_tokens), stream, usage)


def _equal(value: Any, wanted: Any) -> bool:
    """Equality of JSON values, where true is not 1."""
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _json(data: bytes) -> Any:
    """Parse a body as strict JSON. Raises ChatError."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ChatError(400, f"The body is not JSON: {reason}.", "invalid_json") from None


def _no_number(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's parser accepts and JSON lacks."""
    raise ValueError(f"{name} is no number")


def _check_model(model: Any, labels: Sequence[str]) -> None:
    """Raise ChatError for a model name that the server does not have; other types are left to `parse`."""
    if isinstance(model, str) and model not in (known := models(labels)):
        raise ChatError(404, f"There is no model {_short(model)}; there are {', '.join(known)}.", "model_not_found")


def _flat(messages: Any) -> Any:
    """Messages with contents of several text parts joined; other errors are left to `parse`."""
    if not isinstance(messages, list):
        return messages
    if len(messages) > MESSAGES:
        raise ChatError(400, f"There are {len(messages)} messages, and at most {MESSAGES} are read.",
                        "too_many_messages")
    return [{**message, "content": _content(index, message["content"])}
            if isinstance(message, dict) and "content" in message else message
            for index, message in enumerate(messages)]


def _content(index: int, content: Any) -> Any:
    """The content of message `index`, with its text parts joined. Raises ChatError for other parts or characters."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        if not content or not all(isinstance(part, str) for part in parts):
            raise ChatError(400, f"`messages[{index}].content` may have parts of type text only.", "invalid_body")
        content = "".join(map(str, parts))
    if isinstance(content, str) and (found := UNPRINTABLE.search(content)):
        raise ChatError(400, f"`messages[{index}].content` holds the character U+{ord(found[0]):04X}, which no text "
                             "has: remove it.", "invalid_character")
    return content


def _streaming(body: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the answer is streamed, and whether the stream ends with token counts. Raises ChatError."""
    stream, wishes = body.get("stream"), body.get("stream_options")
    if stream is not None and not isinstance(stream, bool):
        raise ChatError(400, "`stream` must be true or false.", "invalid_body")
    if wishes is not None and not (stream and isinstance(wishes, dict)):
        raise ChatError(400, "`stream_options` must be an object, and has no effect without `stream`.", "invalid_body")
    return bool(stream), bool((wishes or {}).get("include_usage"))


def _bounded(options: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    """The options with `max_new_tokens` set, within the server's bounds. Raises ChatError."""
    from moa.mixture.generation.engine import GenerationConfig

    limit = options.get("max_new_tokens", min(GenerationConfig().max_new_tokens, most_tokens))
    if limit > most_tokens:
        raise ChatError(400, f"`max_tokens` is {_short(limit)}; this server writes {most_tokens} at most.",
                        "max_tokens_too_large")
    stop = options.get("stop", ())
    stops = (stop,) if isinstance(stop, str) else stop
    if len(stops) > STOPS:
        raise ChatError(400, f"`stop` has more than {STOPS} texts.", "invalid_body")
    if any("\ud800" <= character <= "\udfff" for text in stops for character in text):
        raise ChatError(400, "`stop` holds half of a character, which no text has: remove it.", "invalid_character")
    return {**options, "max_new_tokens": limit}


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# Answers.

@dataclass(frozen=True)
class ChatResponseBuilder:
    """Builds the completion or the chunks of one answer, which share an id, a time and the release's fingerprint."""

    fingerprint: str | None   # None = the release is unknown
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Any) -> dict[str, Any]:
        """The whole answer; `answer` has the fields of `moa.mixture.mixture.Answer`."""
        message = {"role": "assistant", "content": answer.answer, "refusal": None}
        return {**self._head("chat.completion", answerer(answer)),
                "choices": [{"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}],
                "usage": usage(answer), "moa": routing(answer)}

    def chunk(self, model: str, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """One chunk of a stream; `finish` is the finish reason, in the last chunk of the text."""
        return {**self._head("chat.completion.chunk", model),
                "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}

    def endings(self, answer: Any, with_usage: bool) -> Iterator[dict[str, Any]]:
        """The last chunks of a stream: finish reason and routing, then with `with_usage` the token counts."""
        model = answerer(answer)
        yield {**self.chunk(model, {}, answer.finish), "moa": routing(answer)}
        if with_usage:
            yield {**self._head("chat.completion.chunk", model), "choices": [], "usage": usage(answer)}

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": model,
                "system_fingerprint": self.fingerprint}


def answerer(answer: Any) -> str:
    """The name of the model that answered: moa/NAME, or base."""
    return model_of("base" if answer.abstained else answer.domain)


def model_of(label: str) -> str:
    """The model name of an expert's label, or of "base"."""
    return "base" if label == "base" else f"moa/{label}"


def usage(answer: Any) -> dict[str, int]:
    """The token counts of an answer, in OpenAI's form."""
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens,
            "total_tokens": answer.prompt_tokens + answer.tokens}


def routing(answer: Any) -> dict[str, Any]:
    """The routing of an answer: the field `moa` of completions and of streams' last chunks.

    `domain` is what answered, "base" where the router abstained; `nearest` is then the domain that it thought of.
    """
    return {"domain": "base" if answer.abstained else answer.domain, "confidence": answer.confidence,
            "abstained": answer.abstained, "nearest": answer.domain if answer.abstained else None}


class StreamTrimmer:
    """Strips white space at both ends of a text that arrives in pieces, so that a stream has a completion's text."""

    def __init__(self) -> None:
        self._held = ""
        self._begun = False

    def add(self, piece: str) -> str:
        """Take the next piece and return the text to send; trailing white space is held until more text follows."""
        text = self._held + piece
        if not self._begun:
            text = text.lstrip()
        ready = text.rstrip()
        self._held = text[len(ready):]
        self._begun = self._begun or bool(ready)
        return ready

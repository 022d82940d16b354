"""OpenAI's chat protocol: reads request bodies, and builds completions and their chunks.

`parse` validates the bodies that both `moa serve` and MLflow's server accept; `read` adds what depends on the server.
The models of bodies and answers are in `moa.serving.schemas`.
"""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moa.serving import schemas
from moa.serving.schemas import ChatChunk, ChatCompletion, ChatRequest, shortened

OPTIONS = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
           "top_p": "top_p", "seed": "seed", "stop": "stop"}   # OpenAI's name -> moa's
# Codes of refusals by pydantic's types of errors, and for the types that pydantic words for Python its messages.
CODES = {"invalid_character": "invalid_character", "string_unicode": "invalid_character",
         "model_not_found": "model_not_found"}
MESSAGES = {"string_unicode": "holds half of a character, which no text has: remove it",
            "model_type": "must be a JSON object", "none_required": "must be null"}


class ChatError(Exception):
    """A refusal with its HTTP `status`; `code` is for programs, the message for the caller's log."""

    def __init__(self, status: int, message: str, code: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code, self.kind = status, code, kind

    def as_dict(self) -> dict[str, Any]:
        """The body of an error response, in OpenAI's form."""
        return schemas.ErrorBody(error=schemas.ErrorDetail(message=str(self), type=self.kind, param=None,
                                                           code=self.code)).as_dict()


@dataclass(frozen=True)
class ChatQuestion:
    """A valid chat body, with a domain that the release has."""

    messages: list[dict[str, str]]
    domain: str | None        # "base" = no expert; None = the router decides
    options: dict[str, Any]   # fields of GenerationConfig
    stream: bool
    usage: bool               # whether a stream ends with its token counts


def parse(body: Any, context: dict[str, Any] | None = None) -> ChatQuestion:
    """The question in a chat body that has been parsed as JSON.

    Options that the body lacks, or that are null, keep moa's defaults: without a temperature the answer is greedy.

    Args:
        context: `models`, the names that the body may have, and names of the same models by `aliases`. None: any
            name of the right form is valid.

    Raises ChatError.
    """
    try:
        request = ChatRequest.model_validate(body, context=context)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False, include_input=False)[0]) from None
    options = {ours: value for key, ours in OPTIONS.items() if (value := getattr(request, key)) is not None}
    return ChatQuestion([message.model_dump() for message in request.messages],
                        None if request.model == "moa" else request.model.removeprefix("moa/"), options,
                        bool(request.stream), bool(request.stream_options and request.stream_options.include_usage))


def _refusal(error: ErrorDetails) -> ChatError:
    """The refusal of a body with this error of pydantic."""
    kind, where = error["type"], error["loc"]
    if where and where[0] in schemas.WITHOUT_EFFECT:
        return ChatError(400, f"`{where[0]}` is not supported: leave it out.", "unsupported_parameter")
    if (kind, where) == ("too_long", ("messages",)):
        return ChatError(400, f"There are {error['ctx']['actual_length']} messages, and at most {schemas.MESSAGES} are "
                              "read.", "too_many_messages")
    message = MESSAGES.get(kind, error["msg"])
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).removeprefix(".")
    subject = f"`{path}`{':' if message[0].isupper() else ''} " if path else "The body " if kind == "model_type" else ""
    return ChatError(404 if kind == "model_not_found" else 400, f"{subject}{message}.", CODES.get(kind, "invalid_body"))


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
    aliases = {name: model_of(label) for name, label in (adapters or {}).items()}
    question = parse(_json(data), {"models": models(labels), "aliases": aliases})
    return replace(question, options=_bounded(question.options, most_tokens))


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


def _bounded(options: dict[str, Any], most_tokens: int) -> dict[str, Any]:
    """The options with `max_new_tokens` set, within the server's bound. Raises ChatError."""
    from moa.mixture.generation.engine import GenerationConfig

    limit = options.get("max_new_tokens", min(GenerationConfig().max_new_tokens, most_tokens))
    if limit > most_tokens:
        raise ChatError(400, f"`max_tokens` is {shortened(limit)}; this server writes {most_tokens} at most.",
                        "max_tokens_too_large")
    return {**options, "max_new_tokens": limit}


# Answers.

@dataclass(frozen=True)
class ChatResponseBuilder:
    """Builds the completion or the chunks of one answer, which share an id, a time and the release's fingerprint."""

    fingerprint: str | None   # None = the release is unknown
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, answer: Any) -> ChatCompletion:
        """The whole answer; `answer` has the fields of `moa.mixture.mixture.Answer`."""
        choice = schemas.Choice(index=0, message=schemas.Reply(role="assistant", content=answer.answer, refusal=None),
                                finish_reason=answer.finish, logprobs=None)
        return ChatCompletion(object="chat.completion", **self._head(answerer(answer)), choices=[choice],
                              usage=usage(answer), moa=routing(answer))

    def chunk(self, model: str, delta: schemas.Delta, finish: schemas.Finish | None = None, **more: Any) -> ChatChunk:
        """One chunk of a stream; `finish` is the finish reason, in the last chunk of the text."""
        choice = schemas.ChunkChoice(index=0, delta=delta, finish_reason=finish, logprobs=None)
        return ChatChunk(object="chat.completion.chunk", **self._head(model), choices=[choice], **more)

    def endings(self, answer: Any, with_usage: bool) -> Iterator[ChatChunk]:
        """The last chunks of a stream: finish reason and routing, then with `with_usage` the token counts."""
        model = answerer(answer)
        yield self.chunk(model, schemas.Delta(), answer.finish, moa=routing(answer))
        if with_usage:
            yield ChatChunk(object="chat.completion.chunk", **self._head(model), choices=[], usage=usage(answer))

    def _head(self, model: str) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": model, "system_fingerprint": self.fingerprint}


def answerer(answer: Any) -> str:
    """The name of the model that answered: moa/NAME, or base."""
    return model_of("base" if answer.abstained else answer.domain)


def model_of(label: str) -> str:
    """The model name of an expert's label, or of "base"."""
    return "base" if label == "base" else f"moa/{label}"


def usage(answer: Any) -> schemas.Usage:
    """The token counts of an answer, in OpenAI's form."""
    return schemas.Usage(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.tokens,
                         total_tokens=answer.prompt_tokens + answer.tokens)


def routing(answer: Any) -> schemas.Routing:
    """The routing of an answer: the field `moa` of completions and of streams' last chunks.

    `domain` is what answered, "base" where the router abstained; `nearest` is then the domain that it thought of.
    """
    return schemas.Routing(domain="base" if answer.abstained else answer.domain, confidence=answer.confidence,
                           abstained=answer.abstained, nearest=answer.domain if answer.abstained else None,
                           similarity=answer.similarity, threshold=answer.threshold)


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

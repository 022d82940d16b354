"""The server's requests and responses as an OpenAPI 3.1 document.

The schemas are written by hand, because `moa.serving.protocol` validates bodies itself with error messages of its own,
and the allowed models depend on the release. A test sends a server valid and invalid requests made from the document.
"""

from collections.abc import Sequence
from typing import Any

from moa.serving import protocol
from moa.serving.protocol import OPENERS, ROLES

Schema = dict[str, Any]
# As `protocol.UNPRINTABLE`, without surrogates, which a schema's strings cannot hold.
TEXT = r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$"
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


def document(*, labels: Sequence[str], adapters: Sequence[str], most_tokens: int, key: bool, backend: bool) -> Schema:
    """The OpenAPI document of one release.

    Args:
        labels: labels of the release's experts.
        adapters: further model names: those that the experts have in an export.
        most_tokens: longest answer that may be requested.
        key: whether requests must carry a key.
        backend: whether another server decodes.
    """
    guarded = (401,) if key else (403,)
    security: list[Schema] = [{"bearer": []}] if key else []
    backend_refusals = (502, "4XX") if backend else ()
    chats = _operation(
        "completions", "Answer a conversation", security,
        (400, *guarded, 404, 408, 413, 415, 429, 500, 503, *backend_refusals),
        _ok({"application/json": {"schema": _ref("Completion")}, "text/event-stream": {"schema": _ref("Event")}},
            {"X-Moa-Release": "The release that answers.",
             "X-Moa-Model": "The model that answered; in a stream, each chunk names it instead."}))
    chats["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref("Question")}}}
    models = _operation("models", "List the models", security, (*guarded, 500),
                        _ok({"application/json": {"schema": _ref("Models")}}))
    health = _operation("health", "Whether the server works, and which release serves", [],
                        (500,) if key else (403, 500), _ok({"application/json": {"schema": _ref("Health")}}))
    health["responses"]["503"] = {"description": "The server does not work.", "content": {"application/json": {
        "schema": _ref("Health")}}}
    metrics = _operation("metrics", "Counters in Prometheus' format", security, (*guarded, 500),
                         _ok({"text/plain": {"schema": {"type": "string"}}}))
    itself = _operation("openapi", "This document", security, (*guarded, 500),
                        _ok({"application/json": {"schema": {"type": "object", "required": ["openapi", "paths"]}}}))
    return {
        "openapi": "3.1.0",
        "info": {"title": "moa", "version": "1", "description": "A Mixture-of-LoRAs as an OpenAI server."},
        "paths": {"/v1/chat/completions": {"post": chats}, "/v1/models": {"get": models}, "/healthz": {"get": health},
                  "/metrics": {"get": metrics}, "/openapi.json": {"get": itself}},
        "components": {"schemas": {"Question": _question([*protocol.models(labels), *adapters], most_tokens),
                                   "Message": _message(), **_answers()},
                       "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}} if key else {}},
    }


# Parts.

def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _operation(name: str, summary: str, security: list[Any], refusals: Sequence[int | str], success: Schema) -> Schema:
    """One operation with its response 200 and those of its refusals, by status."""
    errors = {str(status): {"description": REFUSALS[status], "content": {"application/json": {"schema": _ref("Error")}},
                            "headers": _headers(HEADERS.get(status, {}))} for status in refusals}
    return {"operationId": name, "summary": summary, "security": security, "responses": {"200": success, **errors}}


def _ok(content: Schema, headers: dict[str, str] | None = None) -> Schema:
    return {"description": "As asked.", "content": content, "headers": _headers(headers or {})}


def _headers(descriptions: dict[str, str]) -> Schema:
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in descriptions.items()}


def _object(properties: Schema, optional: Sequence[str] = (), **more: Any) -> Schema:
    """An object whose properties are required, except the optional ones; `more` are further keywords."""
    return {"type": "object", "properties": properties, **more,
            "required": [name for name in properties if name not in optional]}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


# Requests.

def _question(models: Sequence[str], most_tokens: int) -> Schema:
    """The schema of a chat body: one of the two token limits may be given; `stream_options` requires `stream`."""
    word = {"type": "string", "minLength": 1}
    options: Schema = {
        "temperature": _or_null({"type": "number", "minimum": 0, "description": "0, as without it = greedy."}),
        "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "seed": _or_null({"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}),
        "stop": _or_null({"anyOf": [word, {"type": "array", "items": word, "maxItems": protocol.STOPS}]}),
        **{name: {"enum": [*harmless, None], "description": "Without effect."}
           for name, harmless in protocol.WITHOUT_EFFECT.items()},
    }
    tokens = _or_null({"type": "integer", "minimum": 1, "maximum": most_tokens})
    properties: Schema = {
        "messages": {"type": "array", "items": _ref("Message"), "minItems": 1, "maxItems": protocol.MESSAGES,
                     "prefixItems": [{"allOf": [_ref("Message"), {"properties": {"role": {"enum": list(OPENERS)}}}]}]},
        "model": {"enum": list(models), "default": "moa", "description": "moa = the router decides."},
        "max_tokens": tokens, "max_completion_tokens": tokens, **options,
        "stream": {"type": ["boolean", "null"]},
        "stream_options": {"anyOf": [_object({"include_usage": {}}, ["include_usage"]), {"type": "null"}]},
    }
    nothing = {"type": "null"}
    either = {"anyOf": [{"properties": {"max_tokens": nothing}}, {"properties": {"max_completion_tokens": nothing}}]}
    streams = {"anyOf": [{"properties": {"stream_options": nothing}},
                         {"properties": {"stream": {"const": True}}, "required": ["stream"]}]}
    return _object(properties, [name for name in properties if name != "messages"], allOf=[either, streams])


def _message() -> Schema:
    text = {"type": "string", "pattern": TEXT,
            "description": "Without control characters, and without the base's own markers of turns."}
    part = _object({"type": {"const": "text"}, "text": text})
    return _object({"role": {"enum": list(ROLES)},
                    "content": {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]}})


# Answers.

def _answers() -> Schema:
    """The schemas of all responses, by name."""
    text, count = {"type": "string"}, {"type": "integer", "minimum": 0}
    head = {"id": text, "created": count, "model": text, "system_fingerprint": text}
    finish = {"enum": ["stop", "length"]}
    usage = _object({"prompt_tokens": count, "completion_tokens": count, "total_tokens": count})
    routing = _object({"domain": text, "confidence": {"type": ["number", "null"]}, "abstained": {"type": "boolean"}})
    message = _object({"role": {"const": "assistant"}, "content": text, "refusal": {"type": "null"}}, ["refusal"])
    delta = _object({"role": {"const": "assistant"}, "content": text}, ["role", "content"])
    choice: Schema = {"index": {"const": 0}, "logprobs": {"type": "null"}}
    return {
        "Completion": _object({
            **head, "object": {"const": "chat.completion"}, "usage": usage, "moa": routing,
            "choices": {"type": "array", "items": _object({**choice, "message": message, "finish_reason": finish},
                                                                ["logprobs"])}}),
        "Chunk": _object({
            **head, "object": {"const": "chat.completion.chunk"}, "usage": usage, "moa": routing,
            "choices": {"type": "array", "items": _object({**choice, "delta": delta, "finish_reason": _or_null(finish)},
                                                                ["logprobs"])}}, ["usage", "moa"]),
        "Event": {**_object({"data": {"anyOf": [{"const": "[DONE]"}, {
            "type": "string", "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_ref("Chunk"), _ref("Error")]}}]}}),
            "description": "Of a stream: a chunk, or an error that ends it, or [DONE] after the last chunk."},
        "Error": _object({"error": _object({"message": text, "type": text, "param": {"type": "null"}, "code": text})}),
        "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _object({
            "id": text, "object": {"const": "model"}, "created": count, "owned_by": text})}}),
        "Health": _object({"status": {"enum": ["ok", "failed"]}, "release": text}),
    }

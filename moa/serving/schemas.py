"""Requests and responses of the server as pydantic models, after OpenAI's chat protocol.

`moa.serving.protocol` validates bodies with `ChatRequest` and builds completions from the models of responses. FastAPI
writes the OpenAPI document from both.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

REFERENCE = "#/components/schemas/{model}"   # of a model in the OpenAPI document
OPENERS = ["system", "user"]   # roles of a first message: some templates cannot begin with an answer, and no row does
MESSAGES = 256   # of a body: a template is rendered for each turn, so the cost grows with the square of the turns
STOPS = 16       # stop texts of one answer
# Characters that a text may not hold: control characters except tab and line ends, and surrogates, which UTF-8 lacks.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
# The texts without such characters. A schema's pattern cannot name surrogates.
PRINTABLE = r"^[^\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f]*$"


# What Swagger UI fills in.
EXAMPLE: dict[str, Any] = {"messages": [{"role": "user", "content": (
    "Maria makes 4 kites and sells each for 9 dollars. The material cost 22 dollars. What is her profit?")}]}


# Values. Scalars are strict, because pydantic would take "4" for 4 and 1 for true.

def _whole(value: Any) -> Any:
    """4 for 4.0, which JSON does not distinguish."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _printable(text: str) -> str:
    if found := UNPRINTABLE.search(text):
        raise PydanticCustomError("invalid_character", "holds the character {character}, which no text has: remove it",
                                  {"character": f"U+{ord(found[0]):04X}"})
    return text


def _joined(content: Any) -> Any:
    """The text of a content that is a list of text parts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not content or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError("text_parts", "must be a text, or a list of parts of type text")
    return "".join(map(str, texts))


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _false(value: Any) -> Any:
    if value is not False:   # a Literal takes 0 for false
        raise PydanticCustomError("false", "must be false")
    return value


def _model(name: str, info: ValidationInfo) -> str:
    """The model's name without its alias, as the validation context's `models` and `aliases` say.

    Without a context only the form of the name is checked.
    """
    if info.context is None:
        if re.fullmatch("moa|base|moa/.+", name, re.DOTALL) is None:
            raise PydanticCustomError("model_name", "must be moa (the router decides), moa/NAME (that expert) or base")
        return name
    name = info.context["aliases"].get(name, name)
    if name not in info.context["models"]:
        raise PydanticCustomError("model_not_found", "There is no model {name}; there are {models}", {
            "name": shortened(name), "models": ", ".join(info.context["models"])})
    return name


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


Text = Annotated[StrictStr, AfterValidator(_printable), Field(
    json_schema_extra={"pattern": PRINTABLE},
    description="Without control characters, and without the base's own markers of turns.")]
One = Annotated[StrictInt, Field(ge=1, le=1), BeforeValidator(_whole)]
Zero = Annotated[StrictInt, Field(ge=0, le=0), BeforeValidator(_whole)]
Tokens = Annotated[StrictInt, Field(ge=1), BeforeValidator(_whole)]
Stop = Annotated[StrictStr, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=STOPS)]
Empty = Annotated[list[Any], Field(max_length=0)]


# Requests.

class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[StrictStr, AfterValidator(_printable), BeforeValidator(
        _joined, json_schema_input_type=Text | Annotated[list[TextPart], Field(min_length=1)])]


class TextFormat(BaseModel):
    """A response format: an answer is text."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: StrictBool | None = Field(None, description="Whether a last chunk has the token counts.")


class Conversation(BaseModel):
    """The fields of a request that decide its answer."""

    model: Annotated[StrictStr, AfterValidator(_model)] = Field(
        "moa", description="moa = the router decides, moa/NAME = that expert, base = no expert.")
    messages: list[Message] = Field(min_length=1, max_length=MESSAGES, json_schema_extra={"prefixItems": [
        {"allOf": [{"$ref": REFERENCE.format(model="Message")}, {"properties": {"role": {"enum": [*OPENERS]}}}]}]})
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = Field(None, description="The same as max_tokens.")
    temperature: Annotated[StrictFloat, Field(ge=0, allow_inf_nan=False)] | None = Field(
        None, description="0, as without it = greedy.")
    top_p: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=1 << 63), BeforeValidator(_whole)] | None = None
    stop: Annotated[Stops, BeforeValidator(_listed, json_schema_input_type=Stop | Stops)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (first := self.messages[0].role) not in OPENERS:
            raise PydanticCustomError("first_message", "`messages[0]` is the {first}'s; a conversation begins with the "
                                                       "system or the user", {"first": first})
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "`stream_options` has no effect without `stream`")
        if len({self.max_tokens, self.max_completion_tokens} - {None}) > 1:
            raise PydanticCustomError("max_tokens", "`max_tokens` and `max_completion_tokens` mean the same and differ:"
                                                    " give one")
        return self


class ChatRequest(Conversation):
    """A conversation to answer. Fields that are not listed are ignored, and null means the default.

    The fields after `stream_options` would change the answer's form: only values without effect are allowed.
    """

    # What the types cannot say: who begins, that one token limit is enough, that options of a stream need one.
    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE], "allOf": [
        {"anyOf": [{"properties": {"max_tokens": {"type": "null"}}},
                   {"properties": {"max_completion_tokens": {"type": "null"}}}]},
        {"anyOf": [{"properties": {"stream_options": {"type": "null"}}},
                   {"properties": {"stream": {"const": True}}, "required": ["stream"]}]}]})

    n: One | None = None
    tools: Empty | None = None
    functions: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    logprobs: Annotated[Literal[False], BeforeValidator(_false)] | None = None
    top_logprobs: Zero | None = None
    response_format: TextFormat | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: None = None
    prediction: None = None


WITHOUT_EFFECT = ChatRequest.model_fields.keys() - Conversation.model_fields.keys()


# Responses.

class Response(BaseModel):
    """The body of a response. Fields that were not set are left out of it."""

    def as_dict(self) -> dict[str, Any]:
        """The body as JSON values."""
        return self.model_dump(exclude_unset=True)


Count = Annotated[int, Field(ge=0)]
Finish = Literal["stop", "length"]


class Usage(Response):
    """The token counts of an answer."""

    prompt_tokens: Count
    completion_tokens: Count = Field(description="The end token included.")
    total_tokens: Count


class Routing(Response):
    """Who answered, and what the router found."""

    domain: str = Field(description="Of the expert that answered; base = no expert.")
    confidence: float | None = Field(description="The router's probability of the domain; null where the caller named "
                                                 "it, or the router abstained.")
    abstained: bool = Field(description="Whether the router left the prompt to the base.")
    nearest: str | None = Field(description="The most probable domain where the router abstained, else null.")
    similarity: float | None = Field(description="Of the conversation to the training prompts of the domain, or the "
                                                 "nearest, -1 to 1; null where the caller named the domain.")
    threshold: float | None = Field(description="The least similarity of a conversation that is like this domain.")


class Reply(Response):
    """An answer's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Delta(Response):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class Choice(Response):
    """The one answer of a completion."""

    index: Literal[0]
    message: Reply
    finish_reason: Finish
    logprobs: None = None


class ChunkChoice(Response):
    """The one answer of a stream: what this chunk adds to it."""

    index: Literal[0]
    delta: Delta
    finish_reason: Finish | None = Field(description="Set in the last chunk of the text.")
    logprobs: None = None


class _Head(Response):
    """What completions and chunks share."""

    id: str
    created: Count = Field(description="Seconds since 1970.")
    model: str = Field(description="Who answered: moa/NAME or base.")
    system_fingerprint: str | None = Field(description="The release; null where it is unknown.")


class ChatCompletion(_Head):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[Choice]
    usage: Usage
    moa: Routing


class ChatChunk(_Head):
    """A piece of an answer."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice] = Field(description="Empty in the chunk with the token counts.")
    usage: Usage | None = Field(None, description="In the last chunk, where stream_options.include_usage is true.")
    moa: Routing | None = Field(None, description="In the chunk with the finish reason.")


class ErrorDetail(Response):
    """Why a request was refused."""

    message: str
    type: str
    param: None
    code: str = Field(description="For programs.")


class ErrorBody(Response):
    """A refusal, in OpenAI's form."""

    error: ErrorDetail


class StreamEvent(Response):
    """An event of a stream: a chunk, or an error that ends it, or [DONE] after the last chunk."""

    data: Literal["[DONE]"] | Json[ChatChunk | ErrorBody]


class Model(Response):
    """A model that a request may name."""

    id: str
    object: Literal["model"]
    created: Count = Field(description="When the release was registered, in seconds since 1970.")
    owned_by: str = Field(description="The release.")


class ModelList(Response):
    """The models that a request may name."""

    object: Literal["list"]
    data: list[Model]


class Health(Response):
    """Whether the server works, and which release serves."""

    status: Literal["ok", "failed"]
    release: str

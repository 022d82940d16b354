"""Chat bodies: what is taken as what, and in which words a field is refused."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from moa.mixture.generation.engine import GenerationConfig
from moa.serving.protocol import OPTIONS, ChatError, ChatResponseBuilder, answerer, parse, read, routing
from moa.serving.schemas import EXAMPLE, ChatChunk, ChatCompletion, Delta

QUESTION = [{"role": "user", "content": "x"}]


def taken(**fields: Any) -> Any:
    return parse({"messages": QUESTION, **fields})


def test_what_a_body_leaves_out_is_left_to_moa() -> None:
    question = taken()
    assert (question.messages, question.domain, question.options) == (QUESTION, None, {})
    assert (question.stream, question.usage) == (False, False)
    nulls = dict.fromkeys((*OPTIONS, "stream", "stream_options", "n", "tools", "audio", "response_format"))
    assert taken(**nulls) == question == taken(unknown=1, user="ann", metadata={"a": [1]})
    assert parse(EXAMPLE).messages == EXAMPLE["messages"]


@pytest.mark.parametrize(("given", "options"), [
    ({"max_tokens": 4.0}, {"max_new_tokens": 4}),
    ({"max_completion_tokens": 4, "max_tokens": 4}, {"max_new_tokens": 4}),
    ({"seed": 7.0, "temperature": 1, "top_p": 1}, {"seed": 7, "temperature": 1.0, "top_p": 1.0}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"stop": []}, {"stop": []}),
    ({"n": 1.0, "presence_penalty": 0.0, "frequency_penalty": -0.0, "top_logprobs": 0, "logprobs": False}, {}),
    ({"tools": [], "functions": [], "tool_choice": "auto", "function_call": "none", "logit_bias": {},
      "response_format": {"type": "text"}, "modalities": ["text"]}, {}),
])
def test_options_as_moa_names_them(given: dict[str, Any], options: dict[str, Any]) -> None:
    found = taken(**given).options
    assert found == options
    assert all(type(found[name]) is type(value) for name, value in options.items())


def test_parts_are_one_text_and_a_name_is_a_domain() -> None:
    parts = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
    answered = [*QUESTION, {"role": "assistant", "content": parts}]
    assert parse({"messages": answered}).messages[1] == {"role": "assistant", "content": "a\nb"}
    assert [taken(model=name).domain for name in ("moa", "moa/a/b", "base")] == [None, "a/b", "base"]
    named = read(json.dumps({"messages": QUESTION, "model": "law-0"}).encode(), ["law"], 64, {"law-0": "law"})
    assert named.domain == "law" and named.options == {"max_new_tokens": 64}


@pytest.mark.parametrize(("body", "sentence"), [
    ([1], "The body must be a JSON object."),
    ({}, "`messages`: Field required."),
    ({"messages": QUESTION * 257}, "There are 257 messages, and at most 256 are read."),
    ({"messages": [3]}, "`messages[0]` must be a JSON object."),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "`messages[0].content` must be a text, or a list of parts of type text."),
    ({"messages": [{"role": "user", "content": "a\x07"}]},
     "`messages[0].content` holds the character U+0007, which no text has: remove it."),
    ({"messages": [{"role": "assistant", "content": "x"}]},
     "`messages[0]` is the assistant's; a conversation begins with the system or the user."),
    ({"messages": QUESTION, "model": "moa/"},
     "`model` must be moa (the router decides), moa/NAME (that expert) or base."),
    ({"messages": QUESTION, "max_tokens": "4"}, "`max_tokens`: Input should be a valid integer."),
    ({"messages": QUESTION, "max_tokens": True}, "`max_tokens`: Input should be a valid integer."),
    ({"messages": QUESTION, "stop": ["a", "\udfff"]},
     "`stop[1]` holds half of a character, which no text has: remove it."),
    ({"messages": QUESTION, "stream_options": {"include_usage": True}},
     "`stream_options` has no effect without `stream`."),
    ({"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 2},
     "`max_tokens` and `max_completion_tokens` mean the same and differ: give one."),
    ({"messages": QUESTION, "response_format": {"type": "text", "strict": True}},
     "`response_format` is not supported: leave it out."),
    ({"messages": QUESTION, "audio": {}}, "`audio` is not supported: leave it out."),
])
def test_one_sentence_names_the_field(body: Any, sentence: str) -> None:
    with pytest.raises(ChatError) as caught:
        parse(body)
    assert str(caught.value) == sentence and caught.value.status == 400


@pytest.mark.parametrize(("name", "valid", "invalid"), [
    ("max_tokens", (1, 10**6), (0, -1, 1.5)),
    ("temperature", (0, 1e308), (-1e-9, float("inf"), 10**400)),
    ("top_p", (1e-9, 1), (0, 1.0001)),
    ("seed", (0, (1 << 63) - 1), (-1, 1 << 63)),
    ("stop", ("a", ["a"] * 16), ("", ["a", ""])),
])
def test_the_bounds_are_those_of_the_decoding(name: str, valid: tuple[Any, ...], invalid: tuple[Any, ...]) -> None:
    for value in valid:
        GenerationConfig(**taken(**{name: value}).options)
    for value in invalid:
        with pytest.raises(ChatError):
            taken(**{name: value})
        with pytest.raises(ValueError, match="must be"):
            GenerationConfig(**{OPTIONS[name]: value})


def test_a_completion_and_its_chunks_are_what_the_document_says() -> None:
    answer = SimpleNamespace(answer="a", domain="law", confidence=0.5, abstained=False, finish="stop", tokens=2,
                             prompt_tokens=3, similarity=0.75, threshold=0.5)
    builder = ChatResponseBuilder(None)
    whole = builder.completion(answer).as_dict()
    assert ChatCompletion.model_validate(whole).as_dict() == whole
    assert whole["choices"] == [{"index": 0, "message": {"role": "assistant", "content": "a", "refusal": None},
                                 "finish_reason": "stop", "logprobs": None}]
    assert whole["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    piece = builder.chunk("moa/law", Delta(content="a")).as_dict()
    routed, counted = (chunk.as_dict() for chunk in builder.endings(answer, True))
    assert piece["choices"][0] == {"index": 0, "delta": {"content": "a"}, "finish_reason": None, "logprobs": None}
    assert "usage" not in piece and "moa" not in piece and routed["choices"][0]["delta"] == {}
    assert routed["moa"] == whole["moa"] and counted["usage"] == whole["usage"] and counted["choices"] == []
    for chunk in (piece, routed, counted):
        assert ChatChunk.model_validate(chunk).as_dict() == chunk
        assert chunk["system_fingerprint"] is None and chunk["model"] == whole["model"] == "moa/law"


@pytest.mark.parametrize(("abstained", "confidence"), [(True, None), (False, 0.9)])
def test_the_routing_names_what_the_model_names(abstained: bool, confidence: float | None) -> None:
    answer = SimpleNamespace(domain="law", confidence=confidence, abstained=abstained, similarity=0.25, threshold=0.5)
    assert routing(answer).as_dict() == {
        "domain": "base" if abstained else "law", "confidence": confidence, "abstained": abstained,
        "nearest": "law" if abstained else None, "similarity": 0.25, "threshold": 0.5}
    assert answerer(answer) == ("base" if abstained else "moa/law")

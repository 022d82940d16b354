"""What is asked is a prefix of what is learned; what is learned is the answers, their end marks, and nothing else.

Ids are those of transformers' `apply_chat_template` for the whole conversation, whatever the template does.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from moa.base.encoding import ChatEncoder, Encoded, Message
from moa.core.errors import DataError
from tests import tiny

END = "<|im_end|>"


def talk(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


def encoder(system: str | None = None) -> ChatEncoder:
    return ChatEncoder(tiny.tokenizer(), system, 1024)


def learned(encoded: Encoded) -> str:
    targets = zip(encoded.ids, encoded.targets, strict=True)
    return tiny.tokenizer().decode([token for token, target in targets if target])


texts = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=20)


@given(st.lists(texts, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0),
       st.sampled_from([None, "", "Be brief."]))
def test_the_prompt_is_a_prefix_and_the_rest_is_the_answer(turns: list[str], system: str | None) -> None:
    messages = talk(*turns)
    prompt, row = encoder(system).prompt(messages[:-1]), encoder(system).row(messages)
    assert row.ids[:len(prompt)] == prompt
    assert all(row.targets[len(prompt):])
    assert tiny.tokenizer().decode(row.ids[len(prompt):]) == turns[-1] + END
    assert row.prompt_tokens + row.completion_tokens == len(row.ids)


def test_every_assistant_turn_with_its_end_mark_is_learned() -> None:
    row = encoder().row(talk("a?", "first", "b?", "second"))
    # Between the two, the template's own line break ends the first answer: a model writes it there too.
    assert learned(row) == f"first{END}\nsecond{END}"


@pytest.mark.parametrize(("system", "start"), [
    (None, "<|im_start|>system\nBe tiny.<|im_end|>\n"),
    ("", "<|im_start|>system\n<|im_end|>\n"),
    ("Be brief.", "<|im_start|>system\nBe brief.<|im_end|>\n"),
])
def test_the_system_message_is_the_templates_none_or_ours(system: str | None, start: str) -> None:
    text = tiny.tokenizer().decode(encoder(system).prompt(talk("a?")))
    assert text == f"{start}<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n"


def test_a_rows_own_system_message_wins() -> None:
    own: list[Message] = [{"role": "system", "content": "Mine."}, *talk("a?", "b")]
    text = tiny.tokenizer().decode(encoder("Ours.").row(own).ids)
    assert "Mine." in text
    assert "Ours." not in text


@pytest.mark.parametrize("messages", [[], talk("a?"), talk("a?", "b", "c?")])
def test_a_row_ends_with_an_answer(messages: list[Message]) -> None:
    with pytest.raises(DataError, match="last message"):
        encoder().row(messages)


# Small templates, each of a kind that public models have. `U` and `A` stand for the roles' marks.

TURN = "{{ ('A' if message.role == 'assistant' else 'U') + message.content }}"
KINDS = {
    # Earlier answers lose their thoughts; the last one has an empty block of them where it has none (Qwen3).
    "thoughts": ("{% for message in messages %}{% set text = message.content.split('</think>')[-1].lstrip('\n') %}"
                 "{% set thought = message.content.split('</think>')[0].split('<think>')[-1].strip() "
                 "if '</think>' in message.content else '' %}{{ '[' + message.role + ']\n' }}"
                 "{{ ('<think>\n' + thought + '\n</think>\n\n') if loop.last and message.role == 'assistant' else '' }}"
                 "{{ text + '<|im_end|>\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '[assistant]\n' }}"
                 "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
                 "{% endif %}"),
    # The last answer ends otherwise than the earlier ones, and answers have a channel that the prompt lacks (gpt-oss).
    "channels": ("{% for message in messages %}{{ '<|start|>' + message.role }}"
                 "{{ '<|channel|>final' if message.role == 'assistant' else '' }}{{ '<|message|>' + message.content }}"
                 "{{ '<|return|>' if loop.last and message.role == 'assistant' else '<|end|>' }}{% endfor %}"
                 "{{ '<|start|>assistant' if add_generation_prompt else '' }}"),
    # A conversation ends with a mark of its own (Phi-3.5).
    "closed": ("{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}"
               "{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"),
    # Texts are stripped, and nothing ends an answer, which the base does by the next turn's mark (GLM).
    "unended": ("{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content.strip() }}{% endfor %}"
                "{{ '<|assistant|>\n' if add_generation_prompt else '' }}"),
    # The prompt opens a block of thoughts that finished answers have closed (DeepSeek-V3.1, Nemotron 3).
    "opened": ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
               "{{ '<think></think>' if message.role == 'assistant' else '' }}{{ message.content + '<|im_end|>\n' }}"
               "{% endfor %}{{ '<|im_start|>assistant\n<think>' if add_generation_prompt else '' }}"),
}
LEARNED = {   # of two turns whose answers are first and second
    "thoughts": "first<|im_end|>\n<think>\n\n</think>\n\nsecond<|im_end|>",
    "channels": "<|channel|>final<|message|>first<|end|><|channel|>final<|message|>second<|return|>",
    "closed": "first<|end|>\nsecond<|end|>\n<|im_end|>",
    "unended": "firstsecond",
    "opened": "</think>first<|im_end|>\n</think>second<|im_end|>",
}


def with_template(template: str, tokenizer: Any = None, **args: bool) -> ChatEncoder:
    tokens = copy.deepcopy(tokenizer or tiny.tokenizer())
    tokens.chat_template = template
    return ChatEncoder(tokens, None, 1024, args)


def whole(encoder: ChatEncoder, messages: list[Message], *, prompt: bool = False) -> str:
    """As transformers renders it, with the date that the encoder sets."""
    text: str = encoder.tokenizer.apply_chat_template(
        messages, chat_template=encoder._dated, tokenize=False, add_generation_prompt=prompt, **encoder.template_args)
    return text


def is_exact(encoder: ChatEncoder, messages: list[Message]) -> None:
    """The ids are transformers', and begin with those of the prompt, behind which all is learned."""
    row, prompt = encoder.row(messages), encoder.prompt(messages[:-1])
    text = whole(encoder, messages)
    of = encoder.tokenizer
    assert row.ids in (of(text, add_special_tokens=False)["input_ids"],
                       of(text.rstrip("\n"), add_special_tokens=False)["input_ids"])
    assert prompt == of(whole(encoder, messages[:-1], prompt=True), add_special_tokens=False)["input_ids"]
    assert row.ids[:len(prompt)] == prompt and all(row.targets[len(prompt):]) and not row.targets[len(prompt) - 1]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_found_in_templates_of_every_kind(kind: str) -> None:
    row = with_template(KINDS[kind]).row(talk("Delete nothing?", "first", "Delete all?", "second"))
    assert learned(row) == LEARNED[kind]


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(texts, min_size=2, max_size=8).filter(lambda turns: len(turns) % 2 == 0), st.booleans(), st.booleans())
def test_ids_are_transformers_for_any_number_of_turns(kind: str, turns: list[str], system: bool,
                                                       thoughts: bool) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] * system + [
        {**message, "content": f"<think>\nwell\n</think>\n\n{message['content']}"}
        if thoughts and message["role"] == "assistant" else message for message in talk(*turns)]
    is_exact(with_template(KINDS[kind]), messages)


def test_a_templates_variables_are_set() -> None:
    encoder = with_template(KINDS["thoughts"], enable_thinking=False)
    assert learned(encoder.row(talk("a?", "first", "b?", "second"))) == "first<|im_end|>\nsecond<|im_end|>"
    assert encoder.tokenizer.decode(encoder.prompt(talk("a?"))).endswith("[assistant]\n<think>\n\n</think>\n\n")


def test_a_prompt_does_not_depend_on_the_day() -> None:
    encoder = with_template("{% set day = strftime_now('%Y-%m-%d') %}{{ day }} {% for message in messages %}"
                            "{{ message.content + '<|im_end|>' }}{% endfor %}"
                            "{{ 'A' if add_generation_prompt else '' }}")
    assert encoder.tokenizer.decode(encoder.prompt(talk("a?"))) == "2024-07-26 a?<|im_end|>A"


def test_a_tokenizer_that_marks_words_with_the_space_before_them() -> None:
    """Such as Llama 2's: pieces that are encoded alone begin with a space that the whole conversation lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(
        ["<unk>", "</s>", "▁", "Q", "A", ":", "a", "b", "c", "▁a", "▁Q", "▁A", "▁Q:", "▁A:"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a"), ("▁", "Q"), ("▁", "A"), ("▁Q", ":"), ("▁A", ":")],
                                unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    encoder = with_template("{% for message in messages %}{{ ' Q:' + message.content if message.role == 'user' else "
                            "message.content + '</s>' }}{% endfor %}", tokens)
    is_exact(encoder, talk("a", "b", "c", "ab"))
    row = encoder.row(talk("a", "b", "c", "ab"))
    assert [vocabulary["b"], vocabulary["</s>"]] == [token for token, target in zip(row.ids, row.targets, strict=True)
                                                     if target][:2]


@pytest.mark.parametrize(("template", "message"), [
    # Thoughts are opened for an answer, and a finished one has none (DeepSeek-R1).
    ("{% for message in messages %}{{ message.content + '<|im_end|>' }}{% endfor %}"
     "{{ 'A<think>\n' if add_generation_prompt else '' }}", r"asks for an answer with .*<think>.*template_args"),
    # The system message stands in the last question alone (Mistral Nemo).
    ("{% for message in messages %}{{ ('Be kind. ' if loop.last and message.role == 'user' else '') + "
     "message.content + '<|im_end|>' }}{% endfor %}", "asks for an answer with"),
    ("{% for message in messages %}{{ message.content * 2 + '<|end|>' }}{% endfor %}"
     "{{ '' if add_generation_prompt else eos_token }}", "does not write each answer of a conversation once"),
    ("{% for message in messages %}{{ (message.content | upper if loop.index == 2 else message.content) + '<|end|>' }}"
     "{% endfor %}{{ '' if add_generation_prompt else eos_token }}",
     "does not write each answer of a conversation once"),
])
def test_a_template_whose_answers_cannot_be_told_apart_is_refused(template: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_template(template).row(talk("a?", "first", "b?", "second"))


def test_a_template_that_needs_tools_refuses_the_conversation() -> None:
    with pytest.raises(TemplateError, match="NoneType"):
        with_template("{% for tool in tools %}{% endfor %}").row(talk("a?", "b"))


TEMPLATES = Path(__file__).parents[3].parent / "shared" / "templates"
REFUSED = ("asks for an answer with", "each answer", "told apart")


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")) or [
    pytest.param(None, marks=pytest.mark.skip(reason="the public templates are not beside this checkout"))],
    ids=lambda file: file.stem if file else "none")
@given(st.lists(st.text("abc .?\nß日", min_size=1, max_size=12), min_size=2, max_size=6)
       .filter(lambda turns: len(turns) % 2 == 0), st.booleans(), st.booleans())
def test_a_public_template_is_exact_or_refused(file: Path, turns: list[str], system: bool, thoughts: bool) -> None:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] * system + [
        {**message, "content": f"<think>\nwell\n</think>\n\n{message['content']}"}
        if thoughts and message["role"] == "assistant" else message for message in talk(*turns)]
    try:
        is_exact(with_template(file.read_text(encoding="utf-8")), messages)
    except DataError as error:
        assert any(reason in str(error) for reason in REFUSED)
    except TemplateError:
        with pytest.raises((TemplateError, TypeError)):   # transformers refuses it, too
            with_template(file.read_text(encoding="utf-8")).tokenizer.apply_chat_template(messages, tokenize=False)

"""What is asked is a prefix of what is learned; what is learned is the answers, their end marks, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

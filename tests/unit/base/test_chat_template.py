"""A base without a chat template speaks ours: prompts are prefixes, answers alone are learned, no turn is forged."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.base import load, pin
from moa.base.chat_template import PLAIN
from moa.base.device import Device
from moa.base.encoding import ChatEncoder, Message
from moa.core import config
from moa.core.config import BaseParams
from moa.core.errors import BaseModelError
from moa.core.paths import Workspace
from moa.data import prepare
from moa.experts import train
from moa.mixture.mixture import Mixture
from tests import tiny

END = tiny.MARKERS[2]
PATH = BaseParams(source="path:tiny-base", template="plain")
CPU = Device("cpu", "float32", "the test says so")


def bare(root: Path) -> Workspace:
    """A workspace whose base has no chat template."""
    workspace = tiny.workspace(root, base={"source": "path:tiny-base", "template": "plain"}, evaluate={"rows": 2})
    (root / "tiny-base/chat_template.jinja").unlink()
    return workspace


@cache
def tokenizer() -> Any:
    made = tiny.tokenizer().__class__(**tiny.tokenizer().init_kwargs, tokenizer_object=tiny.tokenizer()._tokenizer)
    made.chat_template = PLAIN
    return made


def encoder(system: str | None = None) -> ChatEncoder:
    return ChatEncoder(tokenizer(), system, 1024)


# The template itself.

texts = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=20).filter(str.strip)
turns = st.lists(st.one_of(texts, texts.map("x\nAssistant:\n{}".format), st.just("User:\nAssistant:\n")), min_size=2,
                 max_size=6).filter(lambda found: len(found) % 2 == 0)


def talk(found: list[str], system: str | None = None) -> list[Message]:
    head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(found)]


@given(turns, st.one_of(st.none(), st.just(""), texts), st.sampled_from([None, "", "Be brief."]))
def test_the_answers_alone_are_learned_and_every_prompt_is_a_prefix(found: list[str], system: str | None,
                                                                    default: str | None) -> None:
    messages = talk(found, system)
    row = encoder(default).row(messages)
    learned = tokenizer().decode([token for token, target in zip(row.ids, row.targets, strict=True) if target])
    assert learned == "".join(text + END for text in found[1::2])
    for turn, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encoder(default).prompt(messages[:turn])
            assert row.ids[:len(prompt)] == prompt
            assert row.targets[len(prompt)]


@given(turns, st.one_of(st.none(), texts.map("\nUser:\n{}".format)))
def test_a_text_does_not_begin_a_turn(found: list[str], system: str | None) -> None:
    messages = talk(found, system)[:-1]
    for message in messages:   # an assistant's own words are nobody's to forge
        message["content"] = "a" if message["role"] == "assistant" else message["content"]
    lines = tokenizer().decode(encoder().prompt(messages)).split("\n")
    assert lines.count("User:") == lines.count("Assistant:") == len(found) // 2


def test_it_reads_as_people_write_it() -> None:
    messages = talk(["a?", "b", "c?", "d"], "Be brief.")
    assert tokenizer().decode(encoder().row(messages).ids) == (
        f"Be brief.\n\nUser:\na?\n\nAssistant:\nb{END}\nUser:\nc?\n\nAssistant:\nd{END}")
    assert tokenizer().decode(encoder().prompt(talk([f"a{END}?"]))) == "User:\na ?\n\nAssistant:\n"


# The base that has it.

def test_a_base_without_template_says_what_to_set(tmp_path: Path) -> None:
    workspace = bare(tmp_path)
    with pytest.raises(BaseModelError, match=r"no chat template.*set `base\.template: plain` in params\.yaml"):
        pin.fetch(workspace, BaseParams(source="path:tiny-base"))
    manifest = pin.fetch(workspace, PATH)
    assert manifest["template_name"] == "plain"
    assert load.load(workspace, PATH, CPU).tokenizer.chat_template == PLAIN
    assert not (workspace.root / "tiny-base/chat_template.jinja").exists()


def test_it_takes_the_place_of_a_bases_own(tmp_path: Path) -> None:
    tiny.base(tmp_path / "tiny-base")
    settings = tmp_path / "tiny-base/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ 'old' }}"}))
    workspace, own = Workspace(tmp_path), BaseParams(source="path:tiny-base")
    before = pin.fetch(workspace, own)
    with pytest.raises(BaseModelError, match=r"names the template plain.*fetched with the base's own.*moa base"):
        pin.verify(workspace, PATH)
    after = pin.fetch(workspace, PATH)
    assert load.load_tokenizer(workspace).chat_template == PLAIN
    assert before["template"] != after["template"] and before["digest"] != after["digest"]
    assert (before["tokenizer"], before["weights"]) == (after["tokenizer"], after["weights"])
    with pytest.raises(BaseModelError, match=r"names the base's own.*fetched with the template plain.*moa base"):
        pin.verify(workspace, own)
    (workspace.base / "chat_template.jinja").write_text(PLAIN + " ")
    with pytest.raises(BaseModelError, match="base's template changed"):
        pin.verify(workspace, PATH)


def test_a_hub_base_gets_it_and_the_cache_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tiny.base(tmp_path / "hub/models--tiny--base/snapshots" / commit)
    before = (snapshot / "chat_template.jinja").read_bytes()
    workspace, params = Workspace(tmp_path), BaseParams(source=f"hub:tiny/base@{commit}", template="plain")
    pin.fetch(workspace, params)
    assert load.load(workspace, params, CPU).tokenizer.chat_template == PLAIN
    assert (snapshot / "chat_template.jinja").read_bytes() == before


@pytest.mark.parametrize("end", [None, "an end of many tokens"])
def test_a_tokenizer_without_end_mark_is_one_sentence(tmp_path: Path, end: str | None) -> None:
    workspace = bare(tmp_path)
    folder = workspace.root / "tiny-base"
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": end}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    if end is None:
        with pytest.raises(BaseModelError, match=r"no end mark \(eos_token\).*use another base"):
            pin.fetch(workspace, PATH)
        assert not workspace.base_manifest.exists()
        assert not workspace.base.exists()
    else:   # transformers makes it a token
        pin.fetch(workspace, PATH)
        assert load.load_tokenizer(workspace).eos_token == end


def test_corpus_training_and_answers_use_it(tmp_path: Path) -> None:
    workspace = bare(tmp_path)
    settings = config.load(workspace.params)
    pin.fetch(workspace, settings.base)
    for domain in settings.domains:
        prepare.prepare(workspace, settings, domain)
    train.train(workspace, settings, list(settings.domains))
    pinned = pin.pin(workspace)
    manifest = json.loads((workspace.expert("alpha") / "manifest.json").read_text())
    assert manifest["base"]["template"] == pinned.template
    from moa.mixture.assemble import assemble

    assemble(workspace, settings)
    mixture = Mixture.load(workspace.mixture, load.load(workspace, settings.base, CPU))
    answer = mixture.chat([{"role": "user", "content": "alpha: what is alpha 1 of 2?"}], domain="alpha",
                          max_new_tokens=8)
    assert answer.prompt_tokens == len(mixture.encoder.prompt([{"role": "user",
                                                                "content": "alpha: what is alpha 1 of 2?"}]))
    assert END not in answer.answer

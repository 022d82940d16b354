"""Decoding on random toy mixtures of three architectures: batches, stops, limits, draws, streams, chat bodies.

The toys compute in float64. Their logits are near-ties now and then, and float32 sums depend on the batch's shape in
the last bit; that float32 answers agree on a real base is tests/behaviour's to show.
"""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers import GenerationConfig as HfGenerationConfig

from moa.base.device import Device
from moa.base.encoding import ChatEncoder
from moa.base.load import Base
from moa.base.pin import BasePin
from moa.core.errors import UsageError
from moa.experts.lora import ExpertStack, LoraSpec
from moa.mixture.calibration import Prompts, fit
from moa.mixture.generation import engine
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.engine import GenerationBatch, GenerationConfig
from moa.mixture.generation.sampling import Sampling, generator
from moa.mixture.mixture import BASE, Answer, Listener, Mixture, Request, answering
from moa.mixture.router import features
from moa.serving import pyfunc
from tests import tiny

LABELS = ["alpha", "beta"]
ANSWERERS = [*LABELS, BASE]


@cache
def toy(architecture: str = "llama") -> Mixture:
    """A random base, two random experts that say something else, and a router that abstains on half of its prompts."""
    with TemporaryDirectory() as folder:
        tiny.base(Path(folder), architecture=architecture)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():   # a fresh model's small weights repeat one token for ever
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3, generator=random)
    base = Base(model, tiny.tokenizer(), BasePin("toy", "", "", "", "", 0, architecture), Device("cpu", "float64", ""))
    encoder = ChatEncoder(base.tokenizer, "", 256)
    prompts = [encoder.prompt(ask(f"{label} {number}")) for label in LABELS for number in range(8)]
    found = features(model, prompts)
    train = Prompts(found[::2], torch.arange(2).repeat_interleave(4), [str(number) for number in range(8)])
    router = fit(LABELS, train, train, max_abstention=None)
    router.threshold_C = torch.full((2,), 0.9999)   # unlike each prompt but those that it was trained on
    stack = ExpertStack(model, [LoraSpec(2, 4.0), LoraSpec(3, 3.0, rslora=True)], dtype=torch.float64)
    with torch.no_grad():
        stack.weights.normal_(0, 0.3, generator=random)
    return Mixture(base, stack, router, encoder, {label: label for label in LABELS})


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@contextmanager
def ending_at(mixture: Mixture, tokens: list[int]) -> Iterator[None]:
    """Inside, the base's own generation settings say that these tokens end an answer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture.base.model, "generation_config", HfGenerationConfig(eos_token_id=tokens))
        yield


def idle(mixture: Mixture) -> bool:
    return mixture.stack.selection.rows is None and not [t for t in threading.enumerate() if t.name == "moa-stream"]


# Batches.

rows = st.lists(st.tuples(st.text(max_size=40), st.sampled_from([None, *ANSWERERS])), min_size=1, max_size=6)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(rows=rows, ends=st.lists(st.integers(0, 258), max_size=80), limit=st.integers(1, 12))
def test_a_batch_writes_the_tokens_of_its_rows_alone(architecture: str, rows: list[tuple[str, str | None]],
                                                     ends: list[int], limit: int) -> None:
    mixture = toy(architecture)
    prompts, domains = [ask(text) for text, _ in rows], [domain for _, domain in rows]
    with ending_at(mixture, ends):
        together = mixture.generate(prompts, domains, max_new_tokens=limit)
        alone = [mixture.chat(prompt, domain, max_new_tokens=limit)
                 for prompt, domain in zip(prompts, domains, strict=True)]
        tokens = []
        by = [domain or answering(mixture.route([prompt])[0]) for prompt, domain in zip(prompts, domains, strict=True)]
        for group in (range(len(rows)), *([index] for index in range(len(rows)))):
            mixture.stack.select(torch.tensor([mixture.expert_of(by[index]) for index in group]))
            tokens += [row.ids for row in engine.decode(
                mixture.base.model, mixture.base.tokenizer, [mixture.encoder.prompt(prompts[index]) for index in group],
                limit, GenerationConfig())]
            mixture.stack.select(None)
    assert tokens[:len(rows)] == tokens[len(rows):]
    for one, same in zip(together, alone, strict=True):
        routed = {"confidence": None, "similarity": None}   # in float32
        assert replace(one, **routed) == replace(same, **routed)
        assert one.confidence == pytest.approx(same.confidence, abs=1e-5)
        assert one.similarity == pytest.approx(same.similarity, abs=1e-5)
        assert one.finish == "stop" or one.tokens == limit
    assert [one.tokens for one in together] == list(map(len, tokens[:len(rows)]))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_cache_changes_nothing(architecture: str) -> None:
    """Against a plain loop that computes everything anew for each token."""
    mixture = toy(architecture)
    prompt = mixture.encoder.prompt(ask("What is it?"))
    ids = list(prompt)
    mixture.stack.select(torch.tensor([1]))
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(mixture.base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    row, = engine.decode(mixture.base.model, mixture.base.tokenizer, [prompt], 12, GenerationConfig())
    mixture.stack.select(None)
    assert ids[len(prompt):][:len(row.ids)] == row.ids


def test_one_pass_routes_the_rows_that_nobody_chose_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = toy()
    passes: list[int] = []
    route = mixture.route
    monkeypatch.setattr(mixture, "route", lambda prompts: (passes.append(len(prompts)), route(prompts))[1])
    prompts = [ask(f"{label} {number}") for label in LABELS for number in range(8)]
    answers = mixture.generate(prompts, ["beta", BASE, *[None] * 14], max_new_tokens=2)
    assert passes == [14]
    assert [(one.domain, one.confidence) for one in answers[:2]] == [("beta", None), (BASE, None)]
    decided = route(prompts[2:])
    assert [(one.domain, one.abstained) for one in answers[2:]] == [(one.domain, one.abstained) for one in decided]
    assert {one.abstained for one in decided} == {True, False}
    by = [answering(one) for one in decided]
    assert [one.answer for one in mixture.generate(prompts[2:], by, max_new_tokens=2)] == \
        [one.answer for one in answers[2:]]


def test_nobody_asked_nobody_answers() -> None:
    assert toy().generate([]) == [] and toy().route([]) == []


def test_wrong_domains_are_refused() -> None:
    with pytest.raises(UsageError, match="no expert 'gamma'; it has alpha, beta, and base"):
        toy().generate([ask("a"), ask("b")], [None, "gamma"])
    with pytest.raises(UsageError, match="2 prompts and 1 domains"):
        toy().generate([ask("a"), ask("b")], ["alpha"])


def test_threads_take_turns() -> None:
    mixture = toy()
    asked = [(ask(f"question {number}"), domain) for number in range(4) for domain in ANSWERERS]
    alone = [mixture.chat(prompt, domain, max_new_tokens=10) for prompt, domain in asked]
    answers: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda index=index, prompt=prompt, domain=domain: answers.update(
        {index: mixture.chat(prompt, domain, max_new_tokens=10)})) for index, (prompt, domain) in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(asked))] == alone


# Where an answer ends.

def test_every_end_token_of_the_base_and_the_tokenizer_ends_an_answer() -> None:
    mixture = toy()
    prompt, whole = ask("How does it end?"), GenerationConfig(max_new_tokens=20)
    mixture.stack.select(torch.tensor([0]))
    free, = engine.decode(mixture.base.model, mixture.base.tokenizer, [mixture.encoder.prompt(prompt)], 20, whole)
    mixture.stack.select(None)
    assert free.finish == "length" and len(free.ids) == 20
    last = next(place for place in range(4, 20) if free.ids[place] not in free.ids[:place])
    with ending_at(mixture, [0, free.ids[last]]):
        assert mixture.base.tokenizer.eos_token_id in engine.end_tokens(mixture.base.model, mixture.base.tokenizer)
        answer = mixture.chat(prompt, "alpha", max_new_tokens=20)
        assert (answer.finish, answer.tokens) == ("stop", last + 1)
        assert answer.answer == mixture.base.tokenizer.decode(free.ids[:last], skip_special_tokens=True).strip()
        assert mixture.chat(prompt, "alpha", max_new_tokens=last).finish == "length"
    assert answer.prompt_tokens == len(mixture.encoder.prompt(prompt))


def test_other_settings_of_the_base_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, asked = toy(), ([ask("a"), ask("something longer")], ANSWERERS[:2])
    plain = mixture.generate(*asked, max_new_tokens=20)
    opinion = HfGenerationConfig(repetition_penalty=5.0, do_sample=True, temperature=9.0, no_repeat_ngram_size=1)
    monkeypatch.setattr(mixture.base.model, "generation_config", opinion)
    assert mixture.generate(*asked, max_new_tokens=20) == plain
    assert mixture.base.model.generation_config is opinion


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it() -> None:
    mixture, prompts = toy(), [ask("a"), ask("b and more")]
    whole = mixture.generate(prompts, LABELS, max_new_tokens=30)
    stop = whole[0].answer[5:8]
    cut = mixture.generate(prompts, LABELS, max_new_tokens=30, stop=["never written", stop])
    for before, after in zip(whole, cut, strict=True):
        assert after.answer == before.answer.partition(stop)[0].strip()
    assert cut[0].finish == "stop" and cut[0].tokens < whole[0].tokens


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_context_bounds_an_answer(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = toy(architecture)
    long, short = ask("long " * 8), ask("short")
    length = len(mixture.encoder.prompt(long))
    monkeypatch.setattr(mixture.base.model.config, "max_position_embeddings", length + 3)
    answers = mixture.generate([long, short], LABELS, max_new_tokens=20)
    assert [(one.finish, one.tokens) for one in answers] == [("length", 3), ("length", 20)]
    assert answers == [mixture.chat(long, "alpha", max_new_tokens=20), mixture.chat(short, "beta", max_new_tokens=20)]
    monkeypatch.setattr(mixture.base.model.config, "max_position_embeddings", length)
    with pytest.raises(UsageError, match=rf"Prompt 2 of 2 is {length} tokens long, and the base's context is {length}"):
        mixture.generate([short, long])
    with pytest.raises(UsageError, match=r"^The prompt is"):
        mixture.stream(long)


@pytest.mark.parametrize(("option", "value"), [
    ("max_new_tokens", 0), ("max_new_tokens", 1.5), ("max_new_tokens", True), ("temperature", -0.1),
    ("temperature", float("nan")), ("temperature", "hot"), ("temperature", 10**400), ("top_p", 0),
    ("top_p", 1.01), ("top_k", -1), ("top_k", None), ("seed", -1), ("seed", 0.5), ("seed", 1 << 63),
    ("stop", ""), ("stop", ["a", ""]), ("stop", 3)])
def test_a_bad_option_is_named(option: str, value: Any) -> None:
    for call in (lambda: toy().generate([ask("a")], **{option: value}),
                 lambda: toy().stream(ask("a"), **{option: value})):
        with pytest.raises(UsageError, match=rf"^{option} is .*; it must be "):
            call()


def test_a_failure_leaves_no_choice_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = toy()
    with broken(mixture), pytest.raises(RuntimeError, match="out of luck"):
        mixture.generate([ask("a")], ["alpha"])
    assert idle(mixture) and mixture.base.model.generation_config.eos_token_id is not None


@contextmanager
def broken(mixture: Mixture) -> Iterator[None]:
    """Inside, the base's third step after a prompt fails."""
    with forwards(mixture) as seen, pytest.MonkeyPatch.context() as patch:
        step = Decoding.step

        def fail(batch: Decoding, tokens: torch.Tensor) -> torch.Tensor:
            if len(seen) == 3:
                raise RuntimeError("out of luck")
            return step(batch, tokens)

        patch.setattr(Decoding, "step", fail)
        yield


# Rows of one batch that want different things.

@contextmanager
def forwards(mixture: Mixture) -> Iterator[list[tuple[int, int]]]:
    """Rows, and the furthest position that a row is at, of every pass of decoding inside."""
    seen: list[tuple[int, int]] = []
    begin, step = Decoding.__init__, Decoding.step

    def begun(batch: Decoding, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> None:
        assert model is mixture.base.model
        seen.append((len(ids), ids.shape[1] - 1))
        begin(batch, model, ids, mask)

    def stepped(batch: Decoding, tokens: torch.Tensor) -> torch.Tensor:
        seen.append((len(tokens), int(batch.position_B.max())))
        return step(batch, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoding, "__init__", begun)
        patch.setattr(Decoding, "step", stepped)
        yield seen


class Heard:
    """A listener that keeps what it hears, in one list with other listeners."""

    def __init__(self, name: str, events: list[tuple[str, Any]], until: int | None = None) -> None:
        self.name, self.events, self.until = name, events, until
        self.cancelled = threading.Event()

    def piece(self, text: str) -> None:
        self.events.append((self.name, text))
        if self.until is not None and len(self.text()) >= self.until:
            self.cancelled.set()

    def text(self) -> str:
        return "".join(what for name, what in self.events if name == self.name and isinstance(what, str))

    def listener(self) -> Listener:
        return Listener(piece=self.piece, ended=lambda answer: self.events.append((self.name, answer)),
                        cancelled=self.cancelled)


def test_streams_and_whole_answers_are_written_side_by_side() -> None:
    mixture, events = toy(), []
    first, second = Heard("first", events), Heard("second", events)
    begun: list[str] = []
    requests = [Request(messages=ask("one"), domain="alpha", options=GenerationConfig(max_new_tokens=20),
                        listener=replace(first.listener(), begun=begun.append)),
                Request(messages=ask("and the other"), domain="beta", options=GenerationConfig(max_new_tokens=20),
                        listener=second.listener()),
                Request(messages=ask("whole"), options=GenerationConfig(max_new_tokens=20))]
    with forwards(mixture) as seen:
        answers = mixture.answer(requests)
    assert len(seen) <= 20 and begun == ["alpha"]   # as many passes as one row takes
    names = [name for name, what in events if isinstance(what, str)]
    assert sum(a != b for a, b in itertools.pairwise(names)) > 3   # in turns, a character often being several tokens
    assert [first.text().strip(), second.text().strip()] == [answers[0].answer, answers[1].answer]
    assert [what for _, what in events if isinstance(what, Answer)] == answers[:2]
    for request, answer in zip(requests, answers, strict=True):
        assert answer == mixture.chat(request.messages, request.domain, max_new_tokens=20)


def test_a_short_answer_does_not_wait_for_a_long_one_and_costs_nothing_more() -> None:
    mixture, events = toy(), []
    long, limits = Heard("long", events), [1, 2, 2, 3, 4, 40]
    asked = [(ask(f"number {limit}"), "beta", limit) for limit in limits]
    with forwards(mixture) as seen:
        answers = mixture.answer([
            Request(messages=messages, domain=domain, options=GenerationConfig(max_new_tokens=limit),
                    listener=long.listener() if limit == 40 else Heard("short", events).listener())
            for messages, domain, limit in asked])
    assert [one.tokens for one in answers] == limits
    assert answers == [mixture.chat(messages, domain, max_new_tokens=limit) for messages, domain, limit in asked]
    ended = [place for place, (name, what) in enumerate(events) if name == "short" and isinstance(what, Answer)]
    assert len(ended) == 5 and long.text() and events[-1] == ("long", answers[-1])
    assert sum(isinstance(what, str) for _, what in events[ended[-1]:]) > 20   # and much of the long one comes later
    rows = [count for count, _ in seen]
    assert rows == sorted(rows, reverse=True) and rows[0] == 6 and len(rows) == 40 and rows[4:] == [1] * 36


def test_a_cancelled_stream_leaves_the_others_whole() -> None:
    mixture, events = toy(), []
    leaver, stayer = Heard("leaver", events, until=3), Heard("stayer", events)
    with forwards(mixture) as seen:
        cut, whole, plain = mixture.answer([
            Request(messages=ask("I leave"), domain="alpha", options=GenerationConfig(max_new_tokens=30),
                    listener=leaver.listener()),
            Request(messages=ask("I stay"), domain="beta", options=GenerationConfig(max_new_tokens=30),
                    listener=stayer.listener()),
            Request(messages=ask("Me too"), domain=BASE, options=GenerationConfig(max_new_tokens=30))])
    alone = mixture.chat(ask("I leave"), "alpha", max_new_tokens=30)
    said = cut.answer.rstrip(engine.UNFINISHED)   # it may be cut within a character
    assert cut.tokens < 10 < alone.tokens and alone.answer.startswith(said) and said
    assert whole == mixture.chat(ask("I stay"), "beta", max_new_tokens=30) and stayer.text().strip() == whole.answer
    assert plain == mixture.chat(ask("Me too"), BASE, max_new_tokens=30)
    assert [count for count, _ in seen] == [3] * cut.tokens + [2] * (30 - cut.tokens)


wishes = st.builds(dict, max_new_tokens=st.integers(1, 16), stop=st.lists(st.text("aeé ", min_size=1, max_size=2),
                                                                          max_size=2),
                   temperature=st.sampled_from([0, 0, 0.8, 1.5]), top_k=st.sampled_from([0, 20]),
                   top_p=st.sampled_from([1, 0.9]), seed=st.integers(0, 9))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(st.text(max_size=40), st.sampled_from(ANSWERERS), wishes, st.booleans()), min_size=1,
                     max_size=6), spare=st.integers(1, 20), ends=st.lists(st.integers(0, 258), max_size=40))
def test_a_row_is_the_same_whatever_its_neighbours_want(
        architecture: str, rows: list[tuple[str, str, dict[str, Any], bool]], spare: int, ends: list[int]) -> None:
    """Down to where the base's context ends, which no row is computed past."""
    mixture = toy(architecture)
    context = max(len(mixture.encoder.prompt(ask(text))) for text, *_ in rows) + spare
    events: list[tuple[str, Any]] = []
    heard = [Heard(str(place), events) for place in range(len(rows))]
    with ending_at(mixture, ends), pytest.MonkeyPatch.context() as patch, forwards(mixture) as seen:
        patch.setattr(mixture.base.model.config, "max_position_embeddings", context)
        together = mixture.answer([
            Request(messages=ask(text), domain=domain, options=GenerationConfig(**wish),
                    listener=heard[place].listener() if streams else Listener())
            for place, (text, domain, wish, streams) in enumerate(rows)])
        assert together == [mixture.chat(ask(text), domain, **wish) for text, domain, wish, _ in rows]
    assert max(position for _, position in seen) < context
    for place, (*_, streams) in enumerate(rows):
        assert heard[place].text().strip() == (together[place].answer if streams else "")


# Draws.

def test_a_seed_draws_the_same_whoever_is_beside_and_leaves_torch_alone() -> None:
    mixture = toy()
    before = torch.get_rng_state()
    draw = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "top_k": 50}
    asked = [(ask(f"number {number}"), domain) for number in range(2) for domain in ANSWERERS]
    together = mixture.generate(*map(list, zip(*asked, strict=True)), seed=3, **draw)
    assert together == [mixture.chat(prompt, domain, seed=3, **draw) for prompt, domain in asked]
    assert together != mixture.generate(*map(list, zip(*asked, strict=True)), seed=4, **draw)
    free = mixture.generate([asked[0][0]] * 4, [BASE] * 4, **draw)
    assert len({one.answer for one in free}) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_is_the_limit_of_drawing() -> None:
    mixture, asked = toy(), ([ask("a"), ask("bc")], LABELS)
    greedy = mixture.generate(*asked, max_new_tokens=12)
    assert mixture.generate(*asked, max_new_tokens=12, temperature=1.0, top_k=1) == greedy
    assert mixture.generate(*asked, max_new_tokens=12, temperature=1e-7) == greedy


def test_draws_follow_the_probabilities() -> None:
    """2,000 rows of one token: shares are within 4 standard deviations of the softmax at that temperature."""
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]).repeat(2000, 1)
    process = Sampling([(GenerationConfig(temperature=0.7), generator(None))] * 2000)
    shares = process(scores).bincount(minlength=5) / 2000
    wanted = (scores[0] / 0.7).softmax(-1)
    assert ((shares - wanted).abs() < 4 * (wanted * (1 - wanted) / 2000).sqrt()).all()


# Text as it is written.

@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30) | st.text("ab", max_size=30), stop=st.lists(st.text("abé", min_size=1, max_size=3),
                                                                             max_size=3))
def test_text_comes_in_whole_characters_and_stops_are_held_back(text: str, stop: list[str]) -> None:
    tokenizer = tiny.tokenizer()
    row, given_out = GenerationBatch(tokenizer, frozenset({tokenizer.eos_token_id}), stop, watched=True), []
    for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
        if not row.done:
            row.add(token)
            given_out.append(row.take())
    prefixes = (text[:end] for end in range(len(text) + 1))
    wanted = next((prefix[:min(prefix.find(one) for one in stop if one in prefix)] for prefix in prefixes
                   if any(one in prefix for one in stop)), text)
    assert "".join(given_out) == wanted == row.text and row.finish == "stop"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(given_out) or "\N{REPLACEMENT CHARACTER}" in text


@settings(max_examples=15, deadline=None)
@given(text=st.text(max_size=20), domain=st.sampled_from([None, *ANSWERERS]), start=st.integers(0, 20),
       length=st.integers(0, 4), seed=st.integers(0, 9) | st.none())
def test_a_stream_joined_is_the_answer(text: str, domain: str | None, start: int, length: int,
                                       seed: int | None) -> None:
    mixture = toy()
    options: dict[str, Any] = {"max_new_tokens": 24}
    if seed is not None:
        options |= {"temperature": 1.2, "seed": seed}
    whole = mixture.chat(ask(text), domain, **options)
    stop = whole.answer[start:start + length]
    options["stop"] = [stop, "unlikely"] if stop else []
    streamed = list(mixture.stream(ask(text), domain, **options))
    assert "".join(streamed).strip() == mixture.chat(ask(text), domain, **options).answer
    assert all(streamed) and not (stop and stop in "".join(streamed))
    assert idle(mixture)


def test_a_stream_comes_while_it_is_written() -> None:
    """Its writer is held at the 20th pass until it is told to end: the first piece has come by then."""
    mixture, began, pieces = toy(), list[threading.Event](), engine.stream_texts

    def told(work: Callable[[Any, threading.Event], Any]) -> Iterator[str]:
        def noted(tell: Any, cancelled: threading.Event) -> None:
            began.append(cancelled)
            work(tell, cancelled)
        return pieces(noted)

    with forwards(mixture) as seen, pytest.MonkeyPatch.context() as patch:
        counted = Decoding.step

        def held(batch: Decoding, tokens: torch.Tensor) -> torch.Tensor:
            if len(seen) == 20:
                began[0].wait()
            return counted(batch, tokens)

        patch.setattr(engine, "stream_texts", told)
        patch.setattr(Decoding, "step", held)
        stream = mixture.stream(ask("a long one"), "alpha", max_new_tokens=1000)
        assert next(stream) and len(seen) <= 20
        stream.close()   # type: ignore[attr-defined]
        assert len(seen) <= 21
    assert idle(mixture)
    assert mixture.chat(ask("a"), "beta", max_new_tokens=4)


def test_dropping_a_stream_ends_it() -> None:
    mixture = toy()
    for _ in mixture.stream(ask("a long one"), "beta", max_new_tokens=2000):
        break
    assert idle(mixture)


def test_a_streams_failure_is_its_readers() -> None:
    mixture = toy()
    with broken(mixture), pytest.raises(RuntimeError, match="out of luck"):
        list(mixture.stream(ask("a"), "alpha"))
    assert idle(mixture)
    with pytest.raises(UsageError, match="no expert 'gamma'"):
        mixture.stream(ask("a"), "gamma")


# The router's trace.

def test_a_trace_has_every_level_and_agrees_with_the_decision() -> None:
    mixture = toy()
    trace, (decision,) = mixture.trace(ask("alpha 3")), mixture.route([ask("alpha 3")])
    assert [choice.level for choice in trace] == list(range(mixture.base.model.config.num_hidden_layers))
    read = trace[mixture.router.reads]
    assert (read.domain, read.probability) == (decision.domain, pytest.approx(decision.confidence))


# Chat bodies.

def body(**more: Any) -> dict[str, Any]:
    return {"messages": ask("What is it?"), **more}


def test_a_chat_body_is_answered_with_its_options() -> None:
    mixture = toy()
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    reply = pyfunc.respond(mixture, body(model="moa/beta", max_tokens=6, stop=None, **options))
    answer = mixture.chat(body()["messages"], "beta", max_new_tokens=6, **options)
    assert reply["choices"] == [{"index": 0, "finish_reason": answer.finish, "logprobs": None,
                                 "message": {"role": "assistant", "content": answer.answer, "refusal": None}}]
    assert reply["model"] == "moa/beta" and reply["moa"] == {"domain": "beta", "confidence": None, "abstained": False,
                                                               "nearest": None, "similarity": None, "threshold": None}
    assert (reply["object"], reply["system_fingerprint"]) == ("chat.completion", None)
    assert reply["usage"] == {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens,
                              "total_tokens": answer.prompt_tokens + answer.tokens}
    greedy = pyfunc.respond(mixture, body(model="base", max_completion_tokens=20))["choices"][0]["message"]["content"]
    stopped = pyfunc.respond(mixture, body(model="base", max_completion_tokens=20, max_tokens=20, stop=greedy[3:5]))
    assert stopped["choices"][0]["message"]["content"] == greedy.partition(greedy[3:5])[0].strip()
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["model"] == "base"


@pytest.mark.parametrize(("more", "message"), [
    ({"max_tokens": "6"}, "`max_tokens`: Input should be a valid integer"),
    ({"max_completion_tokens": 0}, "`max_completion_tokens`: Input should be greater than or equal to 1"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "mean the same and differ"),
    ({"temperature": True}, "`temperature`: Input should be a valid number"),
    ({"top_p": 2}, "`top_p`: Input should be less than or equal to 1"),
    ({"seed": "x"}, "`seed`: Input should be a valid integer"),
    ({"stop": ["a", 1]}, r"`stop\[1\]`: Input should be a valid string"),
    ({"stop": {"a": "b"}}, "`stop`: Input should be a valid list"), ({"n": 2}, "`n` is not supported"),
    ({"model": "moa/gamma"}, "no expert 'gamma'"), ({"messages": ask("x" * 3000)}, r"The prompt is .* shorten it")])
def test_a_chat_body_that_asks_for_the_impossible_is_told_so(more: dict[str, Any], message: str) -> None:
    with pytest.raises(pyfunc.ChatError, match=message):
        pyfunc.respond(toy(), body(**more))

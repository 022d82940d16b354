"""A mixture at work: one base, stacked experts, a router; route, score and generate mixed batches.

Evaluation and serving both call `route`, so what is evaluated is what serves.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moa.base.encoding import ChatEncoder, Message
from moa.base.load import Base
from moa.core.errors import ArtifactError, UsageError
from moa.experts import peft_format
from moa.experts.batches import collate, microbatches, row_losses
from moa.experts.lora import BASE_ONLY, ExpertStack
from moa.mixture import artifact
from moa.mixture.expert_cache import ExpertCache, ExpertLoader
from moa.mixture.generation import engine
from moa.mixture.generation.engine import Finish, GenerationBatch, GenerationConfig, GenerationRequest, Tell
from moa.mixture.layer_routing import layer_selector
from moa.mixture.router import Choice, Decision, Router, features

BASE = "base"               # forced in place of a domain: no expert
SCORE_TOKENS = 2048         # padded tokens in one forward without gradients
NAMED = 20                  # experts in a message
Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Answer:
    """`domain` is the router's best guess or the caller's label; where the router abstained, the base answered."""

    answer: str
    domain: str
    confidence: float | None   # None when the caller chose
    abstained: bool
    finish: Finish             # "length" when the limit or the base's context ended it
    tokens: int                # written, the end marker included
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Callbacks of one answer, called while it is written by the thread that decodes."""

    begun: Tell | None = None                        # gets the expert's name, or base, once that is decided
    piece: Tell | None = None                        # gets text as it becomes certain
    ended: Callable[[Answer], None] | None = None    # gets the answer as soon as it ends
    cancelled: threading.Event | None = None         # once set, the answer ends where it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to answer. Its `domain` always wins over the router; "base" is the base alone."""

    messages: Conversation
    domain: str | None = None
    options: GenerationConfig = field(default_factory=GenerationConfig)
    listener: Listener = field(default_factory=Listener)


class Mixture:
    """A base with all experts of one mixture on it, and their router. Threads may share it: they take turns."""

    def __init__(self, base: Base, stack: ExpertStack, router: Router, encoder: ChatEncoder,
                 experts: dict[str, str], pages: ExpertCache | None = None) -> None:
        """Without `pages` the stack holds every expert, in the order of the router's labels."""
        self.base, self.stack, self.router, self.encoder = base, stack, router, encoder
        self.pages = pages or ExpertCache.resident(len(stack))
        self.experts = {**experts, BASE: BASE}   # who may answer: the digest of each, for what depends on that alone
        self.labels = router.labels
        self._turn = threading.RLock()   # the choice of experts is the model's, not a call's

    @classmethod
    def load(cls, directory: Path, base: Base, resident: int | None = None) -> Self:
        """Put the mixture in `directory` onto `base`, with at most `resident` experts in memory at a time; None = all.

        Where it has more, an expert is checked and read when it is first asked for, and whatever is wrong with it is
        raised there. Raises ArtifactError when content and manifest differ, or when the mixture was made for another
        base, tokenizer or template; the message says which.
        """
        manifest, router, folders = artifact.read(directory, base.pin, check=False)
        levels, width = router.mean_LD.shape
        config = base.model.config
        if (levels, width) != (config.num_hidden_layers, config.hidden_size):
            raise ArtifactError(f"The router in {directory} reads {levels} levels of width {width}, and the base has "
                                f"{config.num_hidden_layers} of {config.hidden_size}: run `moa assemble` again.")
        # A router that chooses experts layer by layer may choose any of them.
        most = resident if resident and router.stream == "base" else len(folders)
        stack, pages = _stacked(base, artifact.VerifiedExperts(directory, manifest), folders, min(most, len(folders)))
        return cls(base, stack, router, ChatEncoder(base.tokenizer, **manifest["prompt"]),
                   {label: expert["digest"] for label, expert in manifest["experts"].items()}, pages)

    def unload(self) -> Base:
        """Take the experts off again; the base is as it was."""
        self.stack.remove()
        return self.base

    def expert_of(self, domain: str) -> int:
        """Number of a domain's expert, or -1 for "base". Raises UsageError for a name the mixture does not have."""
        if domain == BASE:
            return BASE_ONLY
        if domain not in self.labels:
            more = [f"{len(self.labels) - NAMED} more"] if len(self.labels) > NAMED else []
            known = ", ".join([*self.labels[:NAMED], *more])
            raise UsageError(f"This mixture has no expert {domain!r}; it has {known}, and base.")
        return self.labels.index(domain)

    @contextmanager
    def _using(self, experts: Sequence[int]) -> Iterator[Tensor]:
        """Within the block, row b of every batch uses expert `experts[b]`, and no other thread uses the model.

        Yields the experts' slots in the stack, (B,).
        """
        with self._turn, self.pages.using(experts) as slots:
            slots_B = torch.tensor(slots, dtype=torch.long, device=self.base.device.device)
            self.stack.select(slots_B)
            try:
                yield slots_B
            finally:
                self.stack.select(None)

    # Route.

    def route(self, prompts: Sequence[Conversation]) -> list[Decision]:
        """The router's decision on each prompt, which is read no deeper than the rule does: under the base without
        experts, or, where the router was trained together with them, under those that it chooses layer by layer."""
        return self.router.decide(self._features(prompts, self.router.depth)) if prompts else []

    def trace(self, prompt: Conversation) -> list[Choice]:
        """What every level's own head says of a prompt; the rule makes one decision of the levels it reads."""
        return self.router.trace(self._features([prompt], None))[0]

    def _features(self, prompts: Sequence[Conversation], depth: int | None) -> Tensor:
        ids = [self.encoder.prompt(messages)[-self.encoder.max_tokens:] for messages in prompts]
        with self._using([]):
            return features(self.base.model, ids, depth, layer_selector(self.stack, self.router))

    # Score.

    @torch.no_grad()
    def losses(self, conversations: Sequence[Conversation], domains: Sequence[str]) -> list[tuple[float, int]]:
        """Mean loss in nats over the answer's tokens, and their number, of each conversation under its domain."""
        rows = [(self.expert_of(domain), self.encoder.row(messages))
                for messages, domain in zip(conversations, domains, strict=True)]
        result = [(0.0, 0)] * len(rows)
        for part in self.pages.parts([expert for expert, _ in rows]):
            for group in microbatches([rows[index] for index in part], SCORE_TOKENS):
                some = [rows[part[place]] for place in group]
                with self._using([expert for expert, _ in some]):
                    losses = row_losses(self.base.model, collate(some, self.base.device.device)).tolist()
                for place, (_, row), loss in zip(group, some, losses, strict=True):
                    result[part[place]] = loss / row.completion_tokens, row.completion_tokens
        return result

    # Generate.

    def generate(self, prompts: Sequence[Conversation], domains: Sequence[str | None] | None = None,
                 **options: Any) -> list[Answer]:
        """Answer a mixed batch, each row with its own expert; `options` are those of `GenerationConfig`.

        `domains` has a name for each prompt; rows with None, or all without `domains`, are routed. Raises UsageError.
        """
        chosen = GenerationConfig(**options)
        if domains is not None and len(domains) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(domains)} domains.")
        return self.answer([Request(messages=messages, domain=domain, options=chosen) for messages, domain
                            in zip(prompts, domains or [None] * len(prompts), strict=True)])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer all side by side, each with its own expert and options, those without a domain routed in one pass.

        Greedy answers are those of the requests alone, as far as rounding allows. Raises UsageError, before anything
        is written, for a domain that the mixture lacks and for a prompt that the base's context does not hold.
        """
        for domain in {request.domain for request in requests} - {None}:
            self.expert_of(str(domain))
        prompts = [self.encoder.prompt(request.messages) for request in requests]
        limits = engine.answer_budgets(self.base.model, prompts,
                                       [request.options.max_new_tokens for request in requests])
        routed = iter(self.route([request.messages for request in requests if request.domain is None]))
        decisions = [request.domain or next(routed) for request in requests]
        orders = [_order(*row) for row in zip(requests, prompts, limits, decisions, strict=True)]
        written = self._write(orders, decisions) if orders else []
        return [_answer(*row) for row in zip(decisions, map(len, prompts), written, strict=True)]

    def stream(self, prompt: Conversation, domain: str | None = None, **options: Any) -> Iterator[str]:
        """The answer to one conversation, in pieces of text as they become certain: whole characters, and nothing of
        a stop text. Joined and stripped they are what `generate` answers.

        Decoding has a thread of its own, which ends with the iterator. Raises UsageError, at once.
        """
        chosen = GenerationConfig(**options)
        encoded = self.encoder.prompt(prompt)
        limit, = engine.answer_budgets(self.base.model, [encoded], [chosen.max_new_tokens])
        if domain is not None:
            self.expert_of(domain)
        decision = self.route([prompt])[0] if domain is None else domain

        def work(tell: Tell, cancelled: threading.Event) -> None:
            self._write([GenerationRequest(prompt=encoded, limit=limit, options=chosen, tell=tell,
                                           cancelled=cancelled)],
                        [decision])

        return engine.stream_texts(work)

    def _write(self, orders: Sequence[GenerationRequest], decisions: Sequence[Decision | str]) -> list[GenerationBatch]:
        experts = [self.expert_of(_by(decision)) for decision in decisions]
        written: dict[int, GenerationBatch] = {}
        for part in self.pages.parts(experts):   # one, but for a batch of more experts than are held in memory
            written |= zip(part, self._decode([orders[index] for index in part], [experts[index] for index in part]),
                           strict=True)
        return [written[index] for index in range(len(orders))]

    def _decode(self, orders: Sequence[GenerationRequest], experts: Sequence[int]) -> list[GenerationBatch]:
        with self._using(experts) as slots_B:
            return engine.generate_batch(self.base.model, self.base.tokenizer, orders,
                                         lambda rows: self.stack.select(slots_B[rows]))

    def chat(self, messages: Conversation, domain: str | None = None, **options: Any) -> Answer:
        """Answer one conversation. A caller's `domain` always wins over the router; "base" is the base alone."""
        return self.generate([messages], [domain], **options)[0]


def _stacked(base: Base, checked: artifact.VerifiedExperts, folders: dict[str, Path], slots: int) -> tuple[ExpertStack,
                                                                                                           ExpertCache]:
    """A stack of so many slots on the base, and the experts' pages: in their slots if there is one for each."""
    labels = list(folders)
    everything = range(len(labels)) if slots == len(labels) else range(0)
    for expert in everything:
        checked.expert(labels[expert])
    specs = []
    for label, folder in folders.items():
        with artifact.artifact_errors(f"The expert {label!r} in {checked.mixture}"):
            specs.append(peft_format.read_spec(folder))
    widest = max(specs, key=lambda spec: spec.rank)
    stack = ExpertStack(base.model, specs if everything else [widest] * slots)
    loader = ExpertLoader(stack)

    def page_in(expert: int, slot: int) -> None:
        folder = checked.expert(labels[expert])
        with artifact.artifact_errors(f"The expert {labels[expert]!r} in {checked.mixture}"):
            loader.load(slot, folder)

    pages = ExpertCache(slots, page_in)
    try:
        pages.bring(everything)
    except BaseException:
        stack.remove()   # the base is the caller's
        raise
    return stack, pages


def _order(request: Request, prompt: list[int], limit: int, decision: Decision | str) -> GenerationRequest:
    """The request in tokens. Tells its listener which expert answers."""
    listener, ended = request.listener, None
    if listener.begun is not None:
        listener.begun(_by(decision))
    if (listener_ended := listener.ended) is not None:
        def ended(row: GenerationBatch) -> None:
            listener_ended(_answer(decision, len(prompt), row))
    return GenerationRequest(prompt=prompt, limit=limit, options=request.options, tell=listener.piece, ended=ended,
                             cancelled=listener.cancelled)


def _answer(decision: Decision | str, prompt_tokens: int, row: GenerationBatch) -> Answer:
    text, counts = row.text.strip(), (row.finish, len(row.ids), prompt_tokens)
    if isinstance(decision, str):
        return Answer(text, decision, None, False, *counts)
    return Answer(text, decision.domain, decision.confidence, decision.abstained, *counts)


def answering(decision: Decision) -> str:
    """Name of the expert that answers after this decision, or base when the router abstained."""
    return BASE if decision.abstained else decision.domain


def _by(decision: Decision | str) -> str:
    """Name of the expert that answers: the caller's choice, or the router's."""
    return decision if isinstance(decision, str) else answering(decision)

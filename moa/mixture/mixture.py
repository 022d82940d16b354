"""A loaded mixture: one base with stacked experts and their router. Routes prompts, measures losses, generates answers.

Rows with different experts share a batch. Evaluation and serving both decide by `Mixture.route`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moa.base.architecture import text_config
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

BASE = "base"               # in place of a domain's name: the base without an expert
SCORE_TOKENS = 2048         # most padded tokens in one forward of `Mixture.losses`
LISTED_EXPERTS = 20         # most experts that an error message lists
Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one conversation, with the routing decision behind it."""

    answer: str                # the text, without white space at its ends
    domain: str                # the caller's domain, or the router's most probable one, even where it abstained
    confidence: float | None   # calibrated probability of `domain`; None where the caller gave it, or after abstention
    abstained: bool            # True where the router abstained: the base answered without an expert
    similarity: float | None   # to the training prompts of `domain`, -1 to 1; None where the caller gave the domain
    threshold: float | None    # least similarity of a prompt that is like `domain`; None = the router never abstains
    finish: Finish             # "length" where the limit or the base's context ended the answer, else "stop"
    tokens: int                # of the answer, the end token included
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Callbacks of one answer, which the decoding thread calls during generation."""

    begun: Tell | None = None                        # called with the expert's name, or "base", after routing
    piece: Tell | None = None                        # called with each piece of text, as soon as it is certain
    ended: Callable[[Answer], None] | None = None    # called with the answer, as soon as it ends
    cancelled: threading.Event | None = None         # once set, the answer ends after its current token


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to answer. A `domain` replaces the router's decision; "base" is the base without an expert."""

    messages: Conversation
    domain: str | None = None
    options: GenerationConfig = field(default_factory=GenerationConfig)
    listener: Listener = field(default_factory=Listener)


class Mixture:
    """A base with the experts of one mixture and their router. Threads may share it: a lock lets one at a time in.

    Args:
        base: the base, with the layers of `stack` in it.
        stack: the experts' slots on the base.
        router: its labels are the experts' domains, in order.
        encoder: renders conversations with the mixture's prompt.
        experts: digest of each expert, by domain.
        pages: decides which expert is in which slot. None if the stack holds every expert, in the router's order.
    """

    def __init__(self, base: Base, stack: ExpertStack, router: Router, encoder: ChatEncoder,
                 experts: dict[str, str], pages: ExpertCache | None = None) -> None:
        self.base, self.stack, self.router, self.encoder = base, stack, router, encoder
        self.pages = pages or ExpertCache.resident(len(stack))
        self.experts = {**experts, BASE: BASE}   # digests by domain; `moa.evaluation` keys its cached answers by these
        self.labels = router.labels
        self._model_lock = threading.RLock()   # a selection of experts is state of the one model

    @classmethod
    def load(cls, directory: Path, base: Base, resident: int | None = None) -> Self:
        """Load the mixture in `directory` onto `base`.

        Args:
            directory: the mixture, as `moa.mixture.artifact` describes it.
            base: the base that the mixture was made for.
            resident: most experts in memory at a time; None for all. Where the mixture has more, an expert's digest is
                checked and its file read at its first use, which then raises the errors of the expert.

        Raises:
            ArtifactError: the files differ from the manifest, or the mixture was made for another base, tokenizer or
                chat template; the message says which.
        """
        manifest, router, folders = artifact.read(directory, base.pin, check=False)
        levels, width = router.mean_LD.shape
        config = text_config(base.model)
        if (levels, width) != (config.num_hidden_layers, config.hidden_size):
            raise ArtifactError(f"The router in {directory} reads {levels} levels of width {width}, and the base has "
                                f"{config.num_hidden_layers} of {config.hidden_size}: run `moa assemble` again.")
        # A router that selects experts layer by layer may select any of them in one forward: all must be resident.
        slots = resident if resident and router.stream == "base" else len(folders)
        stack, pages = _stack_experts(base, artifact.VerifiedExperts(directory, manifest), folders,
                                      min(slots, len(folders)))
        return cls(base, stack, router, ChatEncoder(base.tokenizer, **manifest["prompt"]),
                   {label: expert["digest"] for label, expert in manifest["experts"].items()}, pages)

    def unload(self) -> Base:
        """Remove the experts' layers and return the base as it was before `load`."""
        self.stack.remove()
        return self.base

    def expert_of(self, domain: str) -> int:
        """Number of a domain's expert, or -1 for "base". Raises UsageError for a name the mixture does not have."""
        if domain == BASE:
            return BASE_ONLY
        if domain not in self.labels:
            more = [f"{len(self.labels) - LISTED_EXPERTS} more"] if len(self.labels) > LISTED_EXPERTS else []
            known = ", ".join([*self.labels[:LISTED_EXPERTS], *more])
            raise UsageError(f"This mixture has no expert {domain!r}; it has {known}, and base.")
        return self.labels.index(domain)

    @contextmanager
    def _using(self, experts: Sequence[int]) -> Iterator[list[int]]:
        """Within the block, row b of every batch uses expert `experts[b]`, and no other thread uses the model.

        Yields the experts' slots in the stack.
        """
        with self._model_lock, self.pages.using(experts) as slots:
            self.stack.select(slots)
            try:
                yield slots
            finally:
                self.stack.select(None)

    # Route.

    def route(self, prompts: Sequence[Conversation]) -> list[Decision]:
        """The router's decision on each prompt.

        The base reads the prompts up to the deepest layer that the router's rule needs: without experts, or, after
        joint training, with the experts that the router selects layer by layer.
        """
        return self.router.decide(self._features(prompts, self.router.depth)) if prompts else []

    def trace(self, prompt: Conversation) -> list[Choice]:
        """The choice of the head of each level for one prompt, also of levels that the router's rule does not read."""
        return self.router.trace(self._features([prompt], None))[0]

    def _features(self, prompts: Sequence[Conversation], depth: int | None) -> Tensor:
        ids = [self.encoder.prompt(messages)[-self.encoder.max_tokens:] for messages in prompts]
        with self._using([]):
            return features(self.base.model, ids, depth, layer_selector(self.stack, self.router))

    # Score.

    @torch.no_grad()
    def losses(self, conversations: Sequence[Conversation], domains: Sequence[str]) -> list[tuple[float, int]]:
        """Mean loss in nats per target token, and the number of target tokens, of each conversation.

        Conversation i is read with the expert of `domains[i]`; "base" is the base without an expert. Raises UsageError
        for a domain that the mixture lacks.
        """
        rows = [(self.expert_of(domain), self.encoder.row(messages))
                for messages, domain in zip(conversations, domains, strict=True)]
        result = [(0.0, 0)] * len(rows)
        for part in self.pages.parts([expert for expert, _ in rows]):
            for group in microbatches([rows[index] for index in part], SCORE_TOKENS):
                batch = [rows[part[place]] for place in group]
                with self._using([expert for expert, _ in batch]):
                    losses = row_losses(self.base.model, collate(batch, self.base.device.device)).tolist()
                for place, (_, row), loss in zip(group, batch, losses, strict=True):
                    result[part[place]] = loss / row.completion_tokens, row.completion_tokens
        return result

    # Generate.

    def generate(self, prompts: Sequence[Conversation], domains: Sequence[str | None] | None = None,
                 **options: Any) -> list[Answer]:
        """Answer conversations in one batch, each with its own expert.

        Args:
            prompts: the conversations.
            domains: the domain whose expert answers each prompt, "base" for the base without an expert, or None to
                route the prompt. Without `domains` all prompts are routed.
            **options: fields of `GenerationConfig`, the same for all prompts.

        Raises:
            UsageError: an option or a domain is wrong, or a prompt exceeds the base's context.
        """
        config = GenerationConfig(**options)
        if domains is not None and len(domains) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(domains)} domains.")
        return self.answer([Request(messages=messages, domain=domain, options=config) for messages, domain
                            in zip(prompts, domains or [None] * len(prompts), strict=True)])

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests in one batch, each with its own expert and options. Requests without a domain are routed.

        A greedy answer does not depend on the other requests, up to rounding. Raises UsageError, before any answer
        begins, for a domain that the mixture lacks and for a prompt that exceeds the base's context.
        """
        for domain in {request.domain for request in requests} - {None}:
            self.expert_of(str(domain))
        prompts = [self.encoder.prompt(request.messages) for request in requests]
        limits = engine.answer_budgets(self.base.model, prompts,
                                       [request.options.max_new_tokens for request in requests])
        routed = iter(self.route([request.messages for request in requests if request.domain is None]))
        decisions = [request.domain or next(routed) for request in requests]
        rows = [_generation_request(*row) for row in zip(requests, prompts, limits, decisions, strict=True)]
        generated = self._generate(rows, decisions) if rows else []
        return [_answer(*row) for row in zip(decisions, map(len, prompts), generated, strict=True)]

    def stream(self, prompt: Conversation, domain: str | None = None, **options: Any) -> Iterator[str]:
        """Answer one conversation as an iterator of texts, each yielded as soon as it is certain.

        The texts have whole characters only and nothing of a stop text; joined and stripped they are the answer of
        `generate`, which also describes `options`. Decoding runs in a thread of its own, which ends with the iterator.
        Raises UsageError when called, not when first iterated.
        """
        config = GenerationConfig(**options)
        encoded = self.encoder.prompt(prompt)
        limit, = engine.answer_budgets(self.base.model, [encoded], [config.max_new_tokens])
        if domain is not None:
            self.expert_of(domain)
        decision = self.route([prompt])[0] if domain is None else domain

        def work(tell: Tell, cancelled: threading.Event) -> None:
            self._generate([GenerationRequest(prompt=encoded, limit=limit, options=config, tell=tell,
                                              cancelled=cancelled)],
                           [decision])

        return engine.stream_texts(work)

    def _generate(self, requests: Sequence[GenerationRequest],
                  decisions: Sequence[Decision | str]) -> list[GenerationBatch]:
        """Generate the answers, in several batches if the requests need more experts than the stack has slots."""
        experts = [self.expert_of(_answering_name(decision)) for decision in decisions]
        generated: dict[int, GenerationBatch] = {}
        for part in self.pages.parts(experts):
            generated |= zip(part, self._generate_batch([requests[index] for index in part],
                                                        [experts[index] for index in part]), strict=True)
        return [generated[index] for index in range(len(requests))]

    def _generate_batch(self, requests: Sequence[GenerationRequest], experts: Sequence[int]) -> list[GenerationBatch]:
        order = sorted(range(len(requests)), key=lambda index: experts[index])   # neighbours share a product on a GPU
        ordered = [requests[index] for index in order]
        with self._using([experts[index] for index in order]) as slots:
            generated = engine.generate_batch(self.base.model, self.base.tokenizer, ordered,
                                              lambda rows: self.stack.select([slots[row] for row in rows]))
        return [row for _, row in sorted(zip(order, generated, strict=True), key=lambda pair: pair[0])]

    def chat(self, messages: Conversation, domain: str | None = None, **options: Any) -> Answer:
        """Answer one conversation; `domain` and `options` are those of `generate`."""
        return self.generate([messages], [domain], **options)[0]


def _stack_experts(base: Base, verified: artifact.VerifiedExperts, folders: dict[str, Path],
                   slots: int) -> tuple[ExpertStack, ExpertCache]:
    """A stack with this number of slots on the base, and its cache, which holds all experts if each has a slot."""
    labels = list(folders)
    resident = range(len(labels)) if slots == len(labels) else range(0)
    for expert in resident:
        verified.expert(labels[expert])
    specs = []
    for label, folder in folders.items():
        with artifact.artifact_errors(f"The expert {label!r} in {verified.mixture}"):
            specs.append(peft_format.read_spec(folder))
    largest_rank = max(specs, key=lambda spec: spec.rank)
    # A GPU reads experts in the base's dtype in half the time; a CPU computes with them fastest in float32.
    dtype = base.model.dtype if base.device.device.startswith("cuda") else torch.float32
    stack = ExpertStack(base.model, specs if resident else [largest_rank] * slots, dtype=dtype)
    loader = ExpertLoader(stack)

    def page_in(expert: int, slot: int) -> None:
        folder = verified.expert(labels[expert])
        with artifact.artifact_errors(f"The expert {labels[expert]!r} in {verified.mixture}"):
            loader.load(slot, folder)

    pages = ExpertCache(slots, page_in)
    try:
        pages.bring(resident)
    except BaseException:
        stack.remove()   # the caller keeps the base, which must be as it was
        raise
    return stack, pages


def _generation_request(request: Request, prompt: list[int], limit: int, decision: Decision | str) -> GenerationRequest:
    """The request in token ids. Calls the listener's `begun`."""
    listener, ended = request.listener, None
    if listener.begun is not None:
        listener.begun(_answering_name(decision))
    if (listener_ended := listener.ended) is not None:
        def ended(row: GenerationBatch) -> None:
            listener_ended(_answer(decision, len(prompt), row))
    return GenerationRequest(prompt=prompt, limit=limit, options=request.options, tell=listener.piece, ended=ended,
                             cancelled=listener.cancelled)


def _answer(decision: Decision | str, prompt_tokens: int, row: GenerationBatch) -> Answer:
    text, counts = row.text.strip(), (row.finish, len(row.ids), prompt_tokens)
    if isinstance(decision, str):
        return Answer(text, decision, None, False, None, None, *counts)
    return Answer(text, decision.domain, stated_confidence(decision), decision.abstained, decision.score,
                  decision.threshold, *counts)


def stated_confidence(decision: Decision) -> float | None:
    """The confidence that is stated with an answer; None if the router abstained.

    The router's probabilities are those of its domains for a prompt that is of one of them, and add up to 1. Of a
    prompt that is like none they say nothing, and may be near 1 all the same.
    """
    return None if decision.abstained else decision.confidence


def answering(decision: Decision) -> str:
    """Name of the expert that answers after the router's decision; "base" if the router abstained."""
    return BASE if decision.abstained else decision.domain


def _answering_name(decision: Decision | str) -> str:
    """Name of the expert that answers: the caller's domain (a string), or by the router's decision."""
    return decision if isinstance(decision, str) else answering(decision)

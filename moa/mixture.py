"""A mixture at work: one base, stacked experts, a router; route, score and generate mixed batches.

Knows nothing of releases or corpora. The router that evaluation sees is the one that serves: both call `route`.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from moa import adapters, bundle, generation
from moa.base import Base
from moa.batches import collate, microbatches, row_losses
from moa.errors import ArtifactError, UsageError
from moa.generation import Finish, Options, Writing
from moa.heads import chooser
from moa.lora import BASE_ONLY, ExpertStack
from moa.router import Choice, Decision, Router, features
from moa.rows import Message
from moa.tokens import Encoder

BASE = "base"               # forced in place of a domain: no expert
SCORE_TOKENS = 2048         # padded tokens in one forward without gradients
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


class Mixture:
    """A base with all experts of one mixture on it, and their router. Threads may share it: they take turns."""

    def __init__(self, base: Base, stack: ExpertStack, router: Router, encoder: Encoder,
                 experts: dict[str, str]) -> None:
        self.base, self.stack, self.router, self.encoder = base, stack, router, encoder
        self.experts = {**experts, BASE: BASE}   # who may answer: the digest of each, for what depends on that alone
        self.labels = router.labels
        self._turn = threading.RLock()   # the choice of experts is the model's, not a call's

    @classmethod
    def load(cls, directory: Path, base: Base) -> Self:
        """Put the mixture in `directory` onto `base`. Raises ArtifactError when content and manifest differ, or when
        it was made for another base, tokenizer or template; the message says which."""
        manifest, router, folders = bundle.read(directory, base.pin)
        levels, width = router.mean_LD.shape
        config = base.model.config
        if (levels, width) != (config.num_hidden_layers, config.hidden_size):
            raise ArtifactError(f"The router in {directory} reads {levels} levels of width {width}, and the base has "
                                f"{config.num_hidden_layers} of {config.hidden_size}: run `moa assemble` again.")
        specs = []
        for label, folder in folders.items():
            with bundle.readable(f"The expert {label!r} in {directory}"):
                specs.append(adapters.read_spec(folder))
        stack = ExpertStack(base.model, specs)
        try:
            for expert, (label, folder) in enumerate(folders.items()):
                with bundle.readable(f"The expert {label!r} in {directory}"):
                    adapters.load(stack, expert, folder)
        except BaseException:
            stack.remove()   # the base is the caller's
            raise
        return cls(base, stack, router, Encoder(base.tokenizer, **manifest["prompt"]),
                   {label: expert["digest"] for label, expert in manifest["experts"].items()})

    def unload(self) -> Base:
        """Take the experts off again; the base is as it was."""
        self.stack.remove()
        return self.base

    def expert_of(self, domain: str) -> int:
        """Index of a domain's expert, or -1 for "base". Raises UsageError for a name the mixture does not have."""
        if domain == BASE:
            return BASE_ONLY
        if domain not in self.labels:
            raise UsageError(f"This mixture has no expert {domain!r}; it has {', '.join(self.labels)}, and base.")
        return self.labels.index(domain)

    @contextmanager
    def _using(self, experts_B: Tensor | None) -> Iterator[None]:
        """Inside, row b of every batch uses expert `experts_B[b]`, and no other thread uses the model."""
        with self._turn:
            self.stack.select(experts_B)
            try:
                yield
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
        with self._using(None):
            return features(self.base.model, ids, depth, chooser(self.stack, self.router))

    # Score.

    @torch.no_grad()
    def losses(self, conversations: Sequence[Conversation], domains: Sequence[str]) -> list[tuple[float, int]]:
        """Mean loss in nats over the answer's tokens, and their number, of each conversation under its domain."""
        rows = [(self.expert_of(domain), self.encoder.row(messages))
                for messages, domain in zip(conversations, domains, strict=True)]
        result = [(0.0, 0)] * len(rows)
        for group in microbatches(rows, SCORE_TOKENS):
            batch = collate([rows[index] for index in group], self.base.device.device)
            with self._using(batch.owners):
                losses = row_losses(self.base.model, batch).tolist()
            for index, loss in zip(group, losses, strict=True):
                tokens = rows[index][1].completion_tokens
                result[index] = loss / tokens, tokens
        return result

    # Generate.

    def generate(self, prompts: Sequence[Conversation], domains: Sequence[str | None] | None = None,
                 **options: Any) -> list[Answer]:
        """Answer a mixed batch, each row with its own expert; `options` are those of `generation.Options`.

        `domains` has a name for each prompt: it always wins over the router, and "base" is the base alone. Rows with
        None, or all without `domains`, are routed, in one pass. Everything is decoded side by side, but for rows that
        the base's context ends early: those are apart, so that no row runs past it. Greedy answers are those of the
        rows alone, as far as rounding allows. Raises UsageError.
        """
        chosen = Options(**options)
        if domains is not None and len(domains) != len(prompts):
            raise UsageError(f"There are {len(prompts)} prompts and {len(domains)} domains.")
        forced = [None] * len(prompts) if domains is None else list(domains)
        for domain in set(forced) - {None}:
            self.expert_of(str(domain))
        encoded = [self.encoder.prompt(messages) for messages in prompts]
        limits = generation.rooms(self.base.model, encoded, chosen.max_new_tokens)
        asked = iter(self.route([messages for messages, domain in zip(prompts, forced, strict=True) if domain is None]))
        decisions = [next(asked) if domain is None else domain for domain in forced]
        groups: dict[int, list[int]] = defaultdict(list)
        for row, limit in enumerate(limits):
            groups[limit].append(row)
        written: dict[int, Writing] = {}
        for limit, group in groups.items():
            batch = self._decode([encoded[row] for row in group], [decisions[row] for row in group], limit, chosen)
            written.update(zip(group, batch, strict=True))
        return [_answer(decision, len(prompt), written[row])
                for row, (decision, prompt) in enumerate(zip(decisions, encoded, strict=True))]

    def stream(self, prompt: Conversation, domain: str | None = None, **options: Any) -> Iterator[str]:
        """The answer to one conversation, in pieces of text as they become certain: whole characters, and nothing of
        a stop text. Joined and stripped they are what `generate` answers.

        Decoding has a thread of its own, which ends with the iterator. Raises UsageError, at once.
        """
        chosen = Options(**options)
        encoded = self.encoder.prompt(prompt)
        limit, = generation.rooms(self.base.model, [encoded], chosen.max_new_tokens)
        if domain is not None:
            self.expert_of(domain)
        decision = self.route([prompt])[0] if domain is None else domain

        def work(tell: Callable[[str], None], cancelled: threading.Event) -> None:
            self._decode([encoded], [decision], limit, chosen, tell=tell, cancelled=cancelled)

        return generation.pieces(work)

    def _decode(self, prompts: list[list[int]], decisions: Sequence[Decision | str], limit: int, options: Options,
                **streaming: Any) -> list[Writing]:
        experts = [self.expert_of(answering(one) if isinstance(one, Decision) else one) for one in decisions]
        with self._using(torch.tensor(experts, device=self.base.device.device)):
            return generation.decode(self.base.model, self.base.tokenizer, prompts, limit, options, **streaming)

    def chat(self, messages: Conversation, domain: str | None = None, **options: Any) -> Answer:
        """Answer one conversation. A caller's `domain` always wins over the router; "base" is the base alone."""
        return self.generate([messages], [domain], **options)[0]


def _answer(decision: Decision | str, prompt_tokens: int, row: Writing) -> Answer:
    text, counts = row.text.strip(), (row.finish, len(row.ids), prompt_tokens)
    if isinstance(decision, str):
        return Answer(text, decision, None, False, *counts)
    return Answer(text, decision.domain, decision.confidence, decision.abstained, *counts)


def answering(decision: Decision) -> str:
    """Who answers after this decision: the chosen expert, or the base when the router abstained."""
    return BASE if decision.abstained else decision.domain

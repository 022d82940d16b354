"""A mixture at work: one base, stacked experts, a router; route, score and generate mixed batches.

Knows nothing of releases or corpora. The router that evaluation sees is the one that serves: both call `route`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moa import digests
from moa.base import Base
from moa.batches import collate, microbatches, row_losses
from moa.errors import ArtifactError, UsageError
from moa.lora import BASE_ONLY, ExpertStack, read_spec
from moa.router import Decision, Router, features
from moa.rows import Message
from moa.tokens import Encoder
from moa.workspace import MANIFEST, read_json

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


class Mixture:
    """A base with all experts of one mixture on it, and their router."""

    def __init__(self, base: Base, stack: ExpertStack, router: Router, encoder: Encoder,
                 experts: dict[str, str]) -> None:
        self.base, self.stack, self.router, self.encoder = base, stack, router, encoder
        self.experts = {**experts, BASE: BASE}   # who may answer: the digest of each, for what depends on that alone
        self.labels = router.labels

    @classmethod
    def load(cls, directory: Path, base: Base) -> Self:
        """Put the mixture in `directory` onto `base`. Raises ArtifactError when content and manifest differ, or when
        it was made for another base, tokenizer or template; the message says which."""
        from safetensors.torch import load_file

        if not (directory / MANIFEST).is_file():
            raise ArtifactError(f"{directory} holds no mixture: run `moa assemble` first.")
        manifest = read_json(directory / MANIFEST)
        other = [part for part in ("weights", "tokenizer", "template")
                 if manifest["base"][part] != getattr(base.pin, part)]
        if other:
            raise ArtifactError(f"The mixture was made for {manifest['base']['source']}, and the {' and '.join(other)} "
                                f"of this workspace's base ({base.pin.source}) differ.")
        content = {key: value for key, value in manifest.items() if key != "digest"}
        router = directory / "router.safetensors"
        if digests.of_json(content) != manifest["digest"] or digests.of_file(router) != manifest["router"]["digest"]:
            raise ArtifactError(f"The mixture in {directory} is not what its manifest says: its router or manifest "
                                "changed; run `moa assemble` again.")
        folders = {label: directory / "experts" / label for label in manifest["labels"]}
        for label, folder in folders.items():
            files = [path for path in folder.iterdir() if path.name != MANIFEST]
            if digests.of_files(files, folder) != manifest["experts"][label]["digest"]:
                raise ArtifactError(f"The expert {label!r} in {directory} is not the one its manifest pins.")
        stack = ExpertStack(base.model, [read_spec(folder) for folder in folders.values()])
        try:
            for expert, folder in enumerate(folders.values()):
                stack.load(expert, folder)
        except ArtifactError:
            stack.remove()   # the base is the caller's
            raise
        heads = load_file(router)
        facts = manifest["router"]
        trained = Router(manifest["labels"], heads["mean"], heads["scale"], heads["weight"], heads["bias"],
                         facts["rule"], facts["layer"], facts["temperature"], facts["threshold"])
        return cls(base, stack, trained, Encoder(base.tokenizer, **manifest["prompt"]),
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

    def route(self, prompts: Sequence[Conversation]) -> list[Decision]:
        """The router's decision on each prompt: the base without experts is asked, no deeper than the rule reads."""
        self.stack.select(None)
        ids = [self.encoder.prompt(messages)[-self.encoder.max_tokens:] for messages in prompts]
        return self.router.decide(features(self.base.model, ids, self.router.depth))

    @torch.no_grad()
    def losses(self, conversations: Sequence[Conversation], domains: Sequence[str]) -> list[tuple[float, int]]:
        """Mean loss in nats over the answer's tokens, and their number, of each conversation under its domain."""
        rows = [(self.expert_of(domain), self.encoder.row(messages))
                for messages, domain in zip(conversations, domains, strict=True)]
        result = [(0.0, 0)] * len(rows)
        for group in microbatches(rows, SCORE_TOKENS):
            batch = collate([rows[index] for index in group], self.base.device.device)
            self.stack.select(batch.owners)
            for index, loss in zip(group, row_losses(self.base.model, batch).tolist(), strict=True):
                tokens = rows[index][1].completion_tokens
                result[index] = loss / tokens, tokens
        return result

    @torch.no_grad()
    def generate(self, prompts: Sequence[Conversation], domains: Sequence[str], max_new_tokens: int = 256) -> list[str]:
        """Greedy answers of one mixed batch, each row with its own expert, left-padded, with a KV cache."""
        from transformers import GenerationConfig

        tokenizer, device = self.base.tokenizer, self.base.device.device
        encoded = [self.encoder.prompt(messages) for messages in prompts]
        longest = max(map(len, encoded))
        ids = torch.full((len(encoded), longest), tokenizer.eos_token_id, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(encoded):
            ids[row, longest - len(prompt):] = torch.tensor(prompt)
            mask[row, longest - len(prompt):] = 1
        self.stack.select(torch.tensor([self.expert_of(domain) for domain in domains], device=device))
        config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=tokenizer.eos_token_id,
                                  pad_token_id=tokenizer.eos_token_id)
        written: Tensor = self.base.model.generate(ids, attention_mask=mask, generation_config=config)
        self.stack.select(None)
        return [text.strip() for text in tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)]

    def chat(self, messages: Conversation, domain: str | None = None, max_new_tokens: int | None = None) -> Answer:
        """Answer one conversation. A caller's `domain` always wins over the router; "base" is the base alone."""
        if domain is not None:
            self.expert_of(domain)
            answer, = self.generate([messages], [domain], max_new_tokens or 256)
            return Answer(answer, domain, None, False)
        decision, = self.route([messages])
        answer, = self.generate([messages], [answering(decision)], max_new_tokens or 256)
        return Answer(answer, decision.domain, decision.confidence, decision.abstained)


def answering(decision: Decision) -> str:
    """Who answers after this decision: the chosen expert, or the base when the router abstained."""
    return BASE if decision.abstained else decision.domain


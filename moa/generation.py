"""Decoding: token ids of prompts in, written rows out, and text as soon as it is certain.

Knows nothing of experts, routing or conversations: whoever calls has set the model up for these rows.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from moa.errors import UsageError

Finish = Literal["stop", "length"]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"   # how a decoder shows the first bytes of a character


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to decode. Raises UsageError that names the option whose value means nothing.

    With a `seed`, a row draws from a generator of its own: the same prompt and seed give the same answer, whatever is
    beside it in the batch, as far as rounding allows. So one prompt twice in a batch gives one answer twice.
    """

    max_new_tokens: int = 256         # the end marker counts
    temperature: float = 0.0          # 0 = greedy: the likeliest token, and the other options of sampling do nothing
    top_p: float = 1.0                # draw from the likeliest tokens that have this share together; 1 = all
    top_k: int = 0                    # draw from this many likeliest tokens; 0 = all
    seed: int | None = None           # None = another answer each time
    stop: str | Sequence[str] = ()    # texts that end an answer and are cut from it

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        checks = {
            "max_new_tokens": (_whole(self.max_new_tokens) and self.max_new_tokens >= 1, "a whole number of 1 or more"),
            "temperature": (_number(self.temperature) and self.temperature >= 0, "a number of 0 or more"),
            "top_p": (_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            "top_k": (_whole(self.top_k) and self.top_k >= 0, "a whole number of 0 or more"),
            "seed": (self.seed is None or (_whole(self.seed) and 0 <= self.seed < 1 << 63),
                     "a whole number of 0 or more, below 2**63"),
            "stop": (isinstance(stop, Sequence) and all(isinstance(one, str) and one for one in stop),
                     "a text or several, none empty"),
        }
        for name, (right, wanted) in checks.items():
            if not right:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be {wanted}.")
        object.__setattr__(self, "stop", tuple(stop))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def rooms(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens may be written after each prompt: what is asked for, bounded by what the model's context leaves.

    Raises UsageError for a prompt that leaves none.
    """
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= context:
            which = f"Prompt {number} of {len(prompts)}" if len(prompts) > 1 else "The prompt"
            raise UsageError(f"{which} is {len(prompt)} tokens long, and the base's context is {context} tokens, the "
                             "answer's included: shorten it.")
    return [int(min(max_new_tokens, context - len(prompt))) for prompt in prompts]


# One row.

class Writing:
    """A row as it is written: `add` takes its tokens one at a time, `take` hands out text that nothing can change.

    Text is decoded while it comes only when `watched`, or for the sake of stop texts. What `take` holds back: bytes of
    an unfinished character, and an ending that may yet become a stop text.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], stop: Sequence[str], watched: bool) -> None:
        self.tokenizer, self.ends, self.stop = tokenizer, ends, stop
        self.watched = watched or bool(stop)
        self.ids: list[int] = []
        self.finish: Finish = "length"
        self.done = False
        self.text = ""
        self._taken = 0             # characters of `text` that were handed out
        self._window = self._read = 0   # ids[_window:_read] is in `text`, and the context of what comes next

    def add(self, token: int) -> None:
        if token in self.ends:   # no part of the text, whether or not the tokenizer calls it special
            self.finish = "stop"
            self.end()
        self.ids.append(token)
        if self.watched and not self.done:
            self._decode(last=False)

    def end(self) -> None:
        """No more tokens: whatever is still held back is text."""
        if not self.done:
            self._decode(last=True)
            self.done = True

    def take(self) -> str:
        """Text that became certain since the last call."""
        certain = len(self.text)
        if not self.done:
            certain -= max((length for stop in self.stop for length in range(1, len(stop))
                            if self.text.endswith(stop[:length])), default=0)
        piece = self.text[self._taken:certain]
        self._taken = max(self._taken, certain)
        return piece

    def _decode(self, last: bool) -> None:
        """Append what the new ids add to the text. They are decoded together with those before, because some
        decoders treat the beginning of a text differently."""
        before = self._plain(self.ids[self._window:self._read])
        both = self._plain(self.ids[self._window:])
        if both.endswith(UNFINISHED) and not last:
            return
        self.text += both[len(before):]
        self._window, self._read = self._read, len(self.ids)
        found = [place for place in map(self.text.find, self.stop) if place >= 0]
        if found:
            self.text = self.text[:min(found)]
            self.finish, self.done = "stop", True

    def _plain(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


# A batch.

def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and all those of the base's own generation settings."""
    own = model.generation_config.eos_token_id
    return frozenset({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def decode(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int, options: Options, *,
           tell: Callable[[str], None] | None = None, cancelled: threading.Event | None = None) -> list[Writing]:
    """Decode the prompts as one batch, left-padded, with a KV cache, up to `limit` tokens each.

    `tell` gets the pieces of text of a single row as they become certain. Decoding ends early once `cancelled` is set.
    """
    ends = end_tokens(model, tokenizer)
    rows = [Writing(tokenizer, ends, options.stop, watched=tell is not None) for _ in prompts]
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt):] = torch.tensor(prompt)
        mask[b, longest - len(prompt):] = 1
    with _no_settings_of_its_own(model), torch.inference_mode():
        model.generate(ids.to(model.device), attention_mask=mask.to(model.device),
                       generation_config=GenerationConfig(max_new_tokens=limit, do_sample=False),
                       logits_processor=_sampling(options, len(rows)),
                       stopping_criteria=StoppingCriteriaList([_Watch(rows, tell, cancelled)]))
    for row in rows:
        row.end()
    if tell is not None:
        tell(rows[0].take())
    return rows


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """Inside, the base's generation_config says nothing: transformers would fill our gaps from it, with a repetition
    penalty for instance, and answers must not depend on a file that no digest covers."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class _Watch(StoppingCriteria):
    """Hands every new token to its row, and stops the rows that are done."""

    def __init__(self, rows: list[Writing], tell: Callable[[str], None] | None,
                 cancelled: threading.Event | None) -> None:
        self.rows, self.tell, self.cancelled = rows, tell, cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:   # noqa: ARG002 - (B, T) -> (B,)
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.done:
                row.add(token)
        if self.tell is not None:
            self.tell(self.rows[0].take())
        enough = self.cancelled is not None and self.cancelled.is_set()
        return torch.tensor([enough or row.done for row in self.rows], device=input_ids.device)


def _sampling(options: Options, rows: int) -> LogitsProcessorList:
    """What turns the likeliest token into a drawn one: transformers' own filters, and noise of our own."""
    if options.temperature == 0:
        return LogitsProcessorList()
    filters: list[LogitsProcessor] = [TemperatureLogitsWarper(float(options.temperature))]
    if options.top_k:
        filters.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        filters.append(TopPLogitsWarper(float(options.top_p)))
    return LogitsProcessorList([*filters, _Draw(options.seed, rows)])


class _Draw(LogitsProcessor):
    """Gumbel noise: the likeliest token after it is a draw from the softmax before it (Gumbel 1954; Maddison et al.
    2014, arXiv 1411.0030). Each row has its own generator, so neither its neighbours nor the rest of the program
    change its draws, nor the reverse."""

    def __init__(self, seed: int | None, rows: int) -> None:
        self.generators = [torch.Generator() for _ in range(rows)]
        for generator in self.generators:
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:   # noqa: ARG002 - scores (B, V) -> (B, V)
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=generator)
                             for generator in self.generators])
        return scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log().to(scores)


# A stream.

def pieces(work: Callable[[Callable[[str], None], threading.Event], Any]) -> Iterator[str]:
    """What `work(tell, cancelled)` tells, as it tells it, from a thread of its own.

    Its exceptions are raised here. Closing the iterator, or dropping it, sets `cancelled` and waits for the thread.
    """
    told: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def run() -> None:
        try:
            work(told.put, cancelled)
            told.put(None)
        except BaseException as error:   # it is the caller's
            told.put(error)

    thread = threading.Thread(target=run, name="moa-stream", daemon=True)
    thread.start()
    try:
        while (piece := told.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        cancelled.set()
        thread.join()

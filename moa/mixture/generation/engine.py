"""Generation: token ids of prompts to answers, with their text while it is written.

The caller selects the experts of the rows beforehand, or in the callback `choose`.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moa.core.errors import UsageError
from moa.mixture.generation import decoding, native
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.sampling import GenerationConfig, Sampling, generator

Finish = Literal["stop", "length"]
Tell = Callable[[str], None]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"   # how a decoder shows the first bytes of a character


def answer_budgets(model: Any, prompts: Sequence[Sequence[int]], asked: Sequence[int]) -> list[int]:
    """Most tokens to write after each prompt: the number asked for, bounded by what the model's context leaves.

    Raises UsageError for a prompt that leaves none.
    """
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= context:
            which = f"Prompt {number} of {len(prompts)}" if len(prompts) > 1 else "The prompt"
            raise UsageError(f"{which} is {len(prompt)} tokens long, and the base's context is {context} tokens, the "
                             "answer's included: shorten it.")
    return [int(min(most, context - len(prompt))) for prompt, most in zip(prompts, asked, strict=True)]


# One row.

class GenerationBatch:
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
        """End the row: what was still held back becomes text."""
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

@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Prompt, limit and options of one row, and its callbacks, which the decoding thread calls."""

    prompt: Sequence[int]
    limit: int                                       # tokens to write at most, no more than `answer_budgets` allows
    options: GenerationConfig
    tell: Tell | None = None                         # gets pieces of text as they become certain
    # gets the row as soon as it ends
    ended: Callable[[GenerationBatch], None] | None = None
    cancelled: threading.Event | None = None         # once set, the row ends where it is


class RowState:
    """A request while its row is decoded."""

    def __init__(self, order: GenerationRequest, tokenizer: Any, ends: frozenset[int]) -> None:
        self.order, self.place = order, len(order.prompt)   # the position of its next token, written or padding
        self.writing = GenerationBatch(tokenizer, ends, order.options.stop, watched=order.tell is not None)
        self.random = generator(order.options.seed)

    @property
    def left(self) -> int:
        return self.order.limit - len(self.writing.ids)

    def add(self, token: int) -> None:
        self.place += 1
        order, writing = self.order, self.writing
        if writing.done:   # what the batch computes for a row that has ended
            return
        writing.add(token)
        if self.left <= 0 or (order.cancelled is not None and order.cancelled.is_set()):
            writing.end()
        if order.tell is not None and (piece := writing.take()):
            order.tell(piece)
        if writing.done and order.ended is not None:
            order.ended(writing)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's, and all those of the base's own generation settings."""
    own = model.generation_config.eos_token_id
    return frozenset({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


def generate_batch(model: Any, tokenizer: Any, orders: Sequence[GenerationRequest],
                   choose: Callable[[list[int]], None] | None = None) -> list[GenerationBatch]:
    """Decode the orders as one batch, left-padded, with a KV cache, each by its own options and up to its own limit.

    Rows that have ended leave the batch once they are a quarter of it, or when the base's context would end under
    them. `choose` gets the indices of the orders that are in the batch, at its beginning and whenever rows have left;
    without it, rows leave only when all have ended.
    """
    ends = end_tokens(model, tokenizer)
    rows = [RowState(order, tokenizer, ends) for order in orders]
    ids, mask = (tensor.to(model.device) for tensor in _padded([order.prompt for order in orders]))
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    here = list(range(len(rows)))
    with torch.inference_mode():
        if choose is not None:
            choose(here)
        batch = _way(model)(model, ids, mask)
        while True:
            tokens = _until_some_leave(batch, [rows[index] for index in here], None if choose is None else context)
            stay = [b for b, index in enumerate(here) if not rows[index].writing.done]
            here = [here[b] for b in stay]
            if choose is None or not here:
                return [row.writing for row in rows]
            choose(here)
            kept = torch.tensor(stay, device=ids.device)
            batch.keep(kept)
            batch.step(tokens[kept])


def _way(model: Any) -> type[Decoding]:
    """The fastest way to decode with the model as it stands."""
    if not decoding.supports_step(model):
        return Decoding
    return native.CompiledDecoding if native.supports_native(model) else decoding.LlamaDecoding


def _until_some_leave(batch: Decoding, rows: Sequence[RowState], context: float | None) -> Tensor:
    """Decode until all rows, or enough for a smaller batch, have ended. Returns the tokens not yet passed on, (B).

    `context` is the model's; None = rows leave only when all have ended.
    """
    choice = Sampling([(row.order.options, row.random) for row in rows])
    while True:
        tokens_B = choice(batch.logits_BV)
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            row.add(token)
        done = [row for row in rows if row.writing.done]
        if len(done) == len(rows) or (context is not None and (
                4 * len(done) >= len(rows) or any(row.place >= context for row in done))):
            return tokens_B
        batch.step(tokens_B)


def decode(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int,
           options: GenerationConfig) -> list[GenerationBatch]:
    """`generate_batch` for rows with the same limit and options and the experts that the caller selected."""
    return generate_batch(model, tokenizer,
                          [GenerationRequest(prompt=prompt, limit=limit, options=options) for prompt in prompts])


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids with zeros before the shorter prompts, and the mask of what is prompt; both (B, T)."""
    longest = max(map(len, prompts), default=0)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, longest - len(prompt):] = torch.tensor(prompt)
        mask[b, longest - len(prompt):] = 1
    return ids, mask


# A stream.

def stream_texts(work: Callable[[Tell, threading.Event], Any]) -> Iterator[str]:
    """Run `work(tell, cancelled)` in a thread of its own and yield the texts that it passes to `tell`.

    Its exceptions are raised here. Closing the iterator, or dropping it, sets `cancelled` and waits for the thread.
    """
    texts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def run() -> None:
        try:
            work(texts.put, cancelled)
            texts.put(None)
        except BaseException as error:   # raised in the caller's thread
            texts.put(error)

    thread = threading.Thread(target=run, name="moa-stream", daemon=True)
    thread.start()
    try:
        while (piece := texts.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            if piece:
                yield piece
    finally:
        cancelled.set()
        thread.join()

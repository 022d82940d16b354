"""Generation: a batch of prompts in token ids to answers, whose text can be streamed.

`generate_batch` decodes a batch, `stream_texts` turns the callbacks of a row into an iterator of texts. This module
does not select experts: the caller selects those of the rows beforehand, or in the callback `choose`.
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moa.base.architecture import text_config
from moa.core.errors import UsageError
from moa.mixture.generation import decoding, native, static_decoding
from moa.mixture.generation.decoding import Decoding
from moa.mixture.generation.sampling import GenerationConfig, Sampling, generator

Finish = Literal["stop", "length"]
Tell = Callable[[str], None]
UNFINISHED = "\N{REPLACEMENT CHARACTER}"   # a tokenizer decodes the first bytes of a longer character to this


def answer_budgets(model: Any, prompts: Sequence[Sequence[int]], asked: Sequence[int]) -> list[int]:
    """The most tokens that each answer may have: the number in `asked`, or the rest of the model's context if smaller.

    Raises UsageError for a prompt that fills the context.
    """
    context = getattr(text_config(model), "max_position_embeddings", None) or math.inf
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) >= context:
            which = f"Prompt {number} of {len(prompts)}" if len(prompts) > 1 else "The prompt"
            raise UsageError(f"{which} is {len(prompt)} tokens long, and the base's context is {context} tokens, the "
                             "answer's included: shorten it.")
    return [int(min(budget, context - len(prompt))) for prompt, budget in zip(prompts, asked, strict=True)]


# One row.

class GenerationBatch:
    """The answer of one row while it is generated: `add` appends a token, `take` returns the text that is now certain.

    Text is certain once later tokens cannot change it: `take` withholds an unfinished character, and an ending with
    which a stop text begins. Tokens are decoded one by one only if needed for streaming (`watched`) or for stop texts,
    else once at the end.

    Args:
        tokenizer: the base's tokenizer.
        ends: tokens that end the answer (`end_tokens`).
        stop: texts that end the answer and are cut from it.
        watched: whether `take` is called before the answer ends.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int], stop: Sequence[str], watched: bool) -> None:
        self.tokenizer, self.ends, self.stop = tokenizer, ends, stop
        self.watched = watched or bool(stop)
        self.ids: list[int] = []
        self.finish: Finish = "length"
        self.done = False
        self.text = ""
        self._taken = 0                 # characters of `text` that `take` has returned
        self._window = self._read = 0   # ids[:_read] are in `text`; ids[_window:_read] are decoded again as context

    def add(self, token: int) -> None:
        """Append a token; an end token or a stop text ends the answer."""
        if token in self.ends:   # ended before the append: an end token is never part of the text
            self.finish = "stop"
            self.end()
        self.ids.append(token)
        if self.watched and not self.done:
            self._decode(last=False)

    def end(self) -> None:
        """End the answer: the text that was withheld is part of it."""
        if not self.done:
            self._decode(last=True)
            self.done = True

    def take(self) -> str:
        """The text that became certain since the last call."""
        certain = len(self.text)
        if not self.done:
            certain -= max((length for stop in self.stop for length in range(1, len(stop))
                            if self.text.endswith(stop[:length])), default=0)
        piece = self.text[self._taken:certain]
        self._taken = max(self._taken, certain)
        return piece

    def _decode(self, last: bool) -> None:
        """Append the text of the new ids. They are decoded together with the ids before them, because some tokenizers
        decode the beginning of a text differently, for example without a leading space."""
        context = self._text_of(self.ids[self._window:self._read])
        extended = self._text_of(self.ids[self._window:])
        if extended.endswith(UNFINISHED) and not last:
            return
        self.text += extended[len(context):]
        self._window, self._read = self._read, len(self.ids)
        starts = [start for start in map(self.text.find, self.stop) if start >= 0]
        if starts:
            self.text = self.text[:min(starts)]
            self.finish, self.done = "stop", True

    def _text_of(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


# A batch.

@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Prompt, limit and options of one row, and its callbacks, which the decoding thread calls."""

    prompt: Sequence[int]                            # token ids
    limit: int                                       # most tokens of the answer, within `answer_budgets`
    options: GenerationConfig
    tell: Tell | None = None                         # called with each piece of text, as soon as it is certain
    ended: Callable[[GenerationBatch], None] | None = None   # called with the answer, as soon as it ends
    cancelled: threading.Event | None = None         # once set, the answer ends after its current token


class RowState:
    """A request with its answer, random generator and position, while its row is in the batch."""

    def __init__(self, request: GenerationRequest, tokenizer: Any, ends: frozenset[int],
                 device: torch.device | str) -> None:
        self.request = request
        self.position = len(request.prompt)   # of the next token, which is ignored once the answer has ended
        self.answer = GenerationBatch(tokenizer, ends, request.options.stop, watched=request.tell is not None)
        self.random = generator(request.options.seed, device)

    def add(self, token: int) -> None:
        """Append a token to the answer, end it at its limit or when cancelled, and call the request's callbacks."""
        self.position += 1
        request, answer = self.request, self.answer
        if answer.done:   # the batch computes a token for every row that is still in it
            return
        answer.add(token)
        if len(answer.ids) >= request.limit or (request.cancelled is not None and request.cancelled.is_set()):
            answer.end()
        if request.tell is not None and (piece := answer.take()):
            request.tell(piece)
        if answer.done and request.ended is not None:
            request.ended(answer)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's end token and those of the model's `generation_config`."""
    of_model = model.generation_config.eos_token_id
    return frozenset({tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])} - {None})


def generate_batch(model: Any, tokenizer: Any, requests: Sequence[GenerationRequest],
                   choose: Callable[[list[int]], None] | None = None) -> list[GenerationBatch]:
    """Generate the answers to the requests in one batch, each with its own options and limit.

    Rows whose answers have ended leave the batch when they are a quarter of it, or when one of them would exceed the
    model's context.

    Args:
        model: the base, with the experts' layers on it.
        tokenizer: the base's tokenizer.
        requests: one for each row of the batch.
        choose: selects experts for a batch of these indices into `requests`. It is called at the beginning and whenever
            rows have left. None if the caller has selected them: then no row leaves before all answers have ended.

    Returns:
        The answers, in the order of the requests.
    """
    ends = end_tokens(model, tokenizer)
    rows = [RowState(request, tokenizer, ends, model.device) for request in requests]
    ids_BT, mask_BT = (tensor.to(model.device) for tensor in _padded([request.prompt for request in requests]))
    context = getattr(text_config(model), "max_position_embeddings", None) or math.inf
    active = list(range(len(rows)))   # the row of `rows` that each row of the batch is
    with torch.inference_mode():
        if choose is not None:
            choose(active)
        batch = _decoding_class(model)(model, ids_BT, mask_BT)
        while True:
            tokens_B = _decode_until_rows_leave(batch, [rows[index] for index in active],
                                                None if choose is None else context)
            unfinished = [b for b, index in enumerate(active) if not rows[index].answer.done]
            active = [active[b] for b in unfinished]
            if choose is None or not active:
                return [row.answer for row in rows]
            choose(active)
            unfinished_B = torch.tensor(unfinished, device=ids_BT.device)
            batch.keep(unfinished_B)
            batch.step(tokens_B[unfinished_B])


def _decoding_class(model: Any) -> type[Decoding]:
    """The fastest class for this model and the experts that are selected on it now."""
    if not decoding.supports_step(model):
        return Decoding
    if model.device.type in static_decoding.STATIC_ON:
        return static_decoding.StaticDecoding
    return native.CompiledDecoding if native.supports_native(model) else decoding.LlamaDecoding


def _decode_until_rows_leave(batch: Decoding, rows: Sequence[RowState], context: float | None) -> Tensor:
    """Decode until all answers, or enough for a smaller batch, have ended.

    `context` is the model's context in tokens; None to continue until all answers have ended. Returns the last tokens,
    (B), which `batch` has not read.
    """
    sampling = Sampling([(row.request.options, row.random) for row in rows])
    while True:
        tokens_B = sampling(batch.logits_BV)
        for row, token in zip(rows, tokens_B.tolist(), strict=True):
            row.add(token)
        done = [row for row in rows if row.answer.done]
        if len(done) == len(rows) or (context is not None and (
                4 * len(done) >= len(rows) or any(row.position >= context for row in done))):
            return tokens_B
        batch.step(tokens_B)


def decode(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], limit: int,
           options: GenerationConfig) -> list[GenerationBatch]:
    """`generate_batch` for prompts, in token ids, that share a limit and options; the caller has selected experts."""
    return generate_batch(model, tokenizer,
                          [GenerationRequest(prompt=prompt, limit=limit, options=options) for prompt in prompts])


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids padded with zeros on the left, and the mask, 1 at the prompts' tokens; both (B, T)."""
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

    The iterator raises the exceptions of `work`. Closing or deleting the iterator sets `cancelled` and waits for the
    thread.
    """
    texts: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def run() -> None:
        try:
            work(texts.put, cancelled)
            texts.put(None)
        except BaseException as error:   # the iterator raises it in the caller's thread
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

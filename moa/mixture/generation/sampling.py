"""Generation options of a row, and the sampling of its tokens."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moa.core.errors import UsageError

NOT_READ = torch.empty(0, dtype=torch.long)   # these filters take the tokens so far, and do not look at them


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
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
                given = repr(getattr(self, name))
                shown = given if len(given) <= 80 else f"{given[:77]}..."
                raise UsageError(f"{name} is {shown}; it must be {wanted}.")
        object.__setattr__(self, "stop", tuple(stop))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:   # a whole number that no float holds
        return False


def generator(seed: int | None) -> Generator:
    """A row's own source of chance."""
    made = Generator()
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


class Sampling:
    """The next token of each row: the likeliest, or a drawn one in the rows that want it, by transformers' own filters
    and noise.

    The noise is Gumbel's: the likeliest token after it is a draw from the softmax before it (Gumbel 1954; Maddison et
    al. 2014, arXiv 1411.0030). Each row has its own generator, so neither its neighbours nor the rest of the program
    change its draws, nor the reverse.
    """

    def __init__(self, rows: Sequence[tuple[GenerationConfig, Generator]]) -> None:
        self.generators = [generator for _, generator in rows]
        self.groups: dict[tuple[float, int, float], list[int]] = defaultdict(list)   # rows by what filters them
        for b, (options, _) in enumerate(rows):
            if options.temperature > 0:
                self.groups[float(options.temperature), options.top_k, float(options.top_p)].append(b)

    def __call__(self, scores: Tensor) -> Tensor:   # (B, V) -> (B)
        scores = scores.clone() if self.groups else scores
        for settings, group in self.groups.items():
            drawn = scores[group]
            for each in _filters(*settings):
                drawn = each(NOT_READ, drawn)
            noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=self.generators[b])
                                 for b in group])
            scores[group] = drawn - noise.clamp(min=torch.finfo(noise.dtype).tiny).log().to(scores)
        return scores.argmax(-1)


def _filters(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    filters: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    return filters

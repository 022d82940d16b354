"""Options of generation (`GenerationConfig`), and the choice of each row's next token by them (`Sampling`)."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moa.core.errors import UsageError

# At a lower temperature the most probable token has all of the probability, and logits divided by it may be infinite.
LEAST_TEMPERATURE = 1e-6
# A LogitsProcessor's first argument, the ids so far: those of temperature, top-k and top-p ignore it.
IGNORED_IDS = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """Options of decoding one answer.

    A `seed` makes sampling repeatable: the same prompt and seed give the same answer, up to rounding, whatever other
    rows are in the batch. The same prompt and seed twice in a batch give the same answer twice.

    Raises:
        UsageError: an option has a value that it does not allow; the message names the option.
    """

    max_new_tokens: int = 256         # most tokens of an answer, the end token included
    # 0 = greedy decoding, for which top_p, top_k and seed have no effect. Below LEAST_TEMPERATURE it is greedy, too.
    temperature: float = 0.0
    top_p: float = 1.0                # sample from the most probable tokens whose probabilities reach this sum; 1 = all
    top_k: int = 0                    # sample from this number of most probable tokens; 0 = all
    seed: int | None = None           # None = a new random seed for each answer
    stop: str | Sequence[str] = ()    # strings that end an answer; the answer does not include them

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        checks = {
            "max_new_tokens": (_is_integer(self.max_new_tokens) and self.max_new_tokens >= 1,
                               "a whole number of 1 or more"),
            "temperature": (_is_finite_number(self.temperature) and self.temperature >= 0, "a number of 0 or more"),
            "top_p": (_is_finite_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            "top_k": (_is_integer(self.top_k) and self.top_k >= 0, "a whole number of 0 or more"),
            "seed": (self.seed is None or (_is_integer(self.seed) and 0 <= self.seed < 1 << 63),
                     "a whole number of 0 or more, below 2**63"),
            "stop": (isinstance(stop, Sequence) and all(isinstance(text, str) and text for text in stop),
                     "a string or a list of strings, none of them empty"),
        }
        for name, (valid, requirement) in checks.items():
            if not valid:
                value = repr(getattr(self, name))
                shown = value if len(value) <= 80 else f"{value[:77]}..."
                raise UsageError(f"{name} is {shown}; it must be {requirement}.")
        object.__setattr__(self, "stop", tuple(stop))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:   # an integer too large for a float
        return False


def generator(seed: int | None, device: torch.device | str = "cpu") -> Generator:
    """A random generator for the tokens of one row, on the device of its logits; with None, it has a random seed."""
    generator = Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class Sampling:
    """Chooses the next token of each row of a batch from its logits.

    Rows with temperature 0 get the most probable token. The others get a sample, after the filters of transformers for
    temperature, top-k and top-p. It is drawn by the Gumbel-max trick: the argmax of logits plus Gumbel noise is a
    sample of their softmax (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030). Each row draws from its own generator,
    so its samples depend neither on the other rows nor on torch's global generator.

    Args:
        rows: options and random generator of each row of the batch.
    """

    def __init__(self, rows: Sequence[tuple[GenerationConfig, Generator]]) -> None:
        self.generators = [generator for _, generator in rows]
        self.groups: dict[tuple[float, int, float], list[int]] = defaultdict(list)   # rows by arguments of `_filters`
        for b, (options, _) in enumerate(rows):
            if options.temperature >= LEAST_TEMPERATURE:
                self.groups[float(options.temperature), options.top_k, float(options.top_p)].append(b)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """The next token of each row, (B)."""
        scores_BV = logits_BV.clone() if self.groups else logits_BV
        for settings, rows in self.groups.items():
            filtered = scores_BV[rows]
            for logits_filter in _filters(*settings):
                filtered = logits_filter(IGNORED_IDS, filtered)
            # Minus the logarithm of exponential noise is Gumbel noise.
            noise = torch.stack([torch.empty(scores_BV.shape[1], device=self.generators[b].device).exponential_(
                                     generator=self.generators[b]) for b in rows])
            scores_BV[rows] = filtered - noise.clamp(min=torch.finfo(noise.dtype).tiny).log().to(scores_BV)
        return scores_BV.argmax(-1)


def _filters(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    filters: list[LogitsProcessor] = [TemperatureLogitsWarper(temperature)]
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    return filters

"""Slows the toy model: where MOA_TEST_SLOW_MODEL is 10, every pass takes ten times as long as it would
on an idle machine.

A pass is a forward or backward of a model in torch, or a decoding step that moa wrote out or compiled.
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import Any

FACTOR = float(os.environ.get("MOA_TEST_SLOW_MODEL") or 1)
WIDEST = 256   # hidden size of a toy; a real base is wider, and keeps its speed


class _Here(threading.local):
    inside = False   # a pass within a pass, as a model within its language model, is slowed once
    toy = False      # whether the last forward was a toy's: a backward does not say whose it is


_here = _Here()


def slow_down(owner: Any, name: str, is_toy: Callable[[Any], bool]) -> None:
    """Make the function `name` of a class or module sleep after each call whose first argument `is_toy`.

    For a multiple of the thread's own time: what a call waits for on a busy machine is not the model's.
    """
    call = getattr(owner, name)

    @functools.wraps(call)
    def slow(*args: Any, **named: Any) -> Any:
        if _here.inside or not is_toy(args[0]):
            return call(*args, **named)
        _here.inside, began = True, time.thread_time()
        try:
            return call(*args, **named)
        finally:
            _here.inside = False
            time.sleep((FACTOR - 1) * (time.thread_time() - began))

    setattr(owner, name, slow)


def _toy(model: Any) -> bool:
    _here.toy = getattr(model.config.get_text_config(), "hidden_size", WIDEST) <= WIDEST
    return _here.toy


if FACTOR > 1:
    from wrapt import when_imported

    when_imported("transformers.modeling_utils")(lambda module: slow_down(module.PreTrainedModel, "__call__", _toy))
    when_imported("torch.autograd")(lambda module: slow_down(module, "backward", lambda _: _here.toy))
    for module, kind in (("moa.mixture.generation.decoding", "LlamaDecoding"),
                         ("moa.mixture.generation.native", "CompiledDecoding")):
        when_imported(module)(lambda module, kind=kind: slow_down(getattr(module, kind), "_next_logits",
                                                                  lambda decoding: _toy(decoding.model)))

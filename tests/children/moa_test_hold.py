"""Holds a process in the middle of its work: `Gate` of tests/waiting.py sets MOA_TEST_HOLD to MODULE:FUNCTION=PATH."""

import functools
import os
import time
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


def hold(module: Any, name: str, gate: Path) -> None:
    """Make the function `name` of a module wait before each call while the file `gate` exists."""
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    call = getattr(owner, last)

    @functools.wraps(call)
    def held(*args: Any, **named: Any) -> Any:
        if gate.exists():
            with gate.with_suffix(".reached").open("a") as file:
                file.write(f"{os.getpid()}\n")
        while gate.exists():
            time.sleep(POLL_SECONDS)
        return call(*args, **named)

    setattr(owner, last, held)


if "MOA_TEST_HOLD" in os.environ:
    from wrapt import when_imported

    place, _, path = os.environ["MOA_TEST_HOLD"].partition("=")
    where, _, function = place.partition(":")
    when_imported(where)(lambda module: hold(module, function, Path(path)))

"""moa's own C: compiled with the machine's compiler when first needed, kept in the user's cache, loaded.

Where there is no compiler, or another kind of machine, there is no library, and callers do the same work with torch.
`MOA_NATIVE=0` says so on any machine. Knows nothing of what the C computes.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from moa.core.paths import user_cache

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
SECONDS = 120   # that a compiler may take
CPUINFO = Path("/proc/cpuinfo")


@cache
def library(name: str, defines: Sequence[str] = ()) -> ctypes.CDLL | None:
    """The library made of csrc/NAME.c, or None where it cannot be made."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    here = platform.system() == "Linux" and platform.machine() == "x86_64"   # where it was compared
    if compiler is None or not here or os.environ.get("MOA_NATIVE") == "0":
        return None
    source = Path(__file__).parent / "csrc" / f"{name}.c"
    command = [compiler, *FLAGS, *(f"-D{define}" for define in defines), str(source), "-lm"]
    try:
        sources = [source.read_bytes(), source.with_name("vector.h").read_bytes()]
        digest = hashlib.sha256(repr([sources, command, sorted(cpu())]).encode()).hexdigest()[:16]
        target = user_cache() / f"{name}-{digest}.so"
        if target.exists():
            with suppress(OSError):   # cut off, or of another system: it is made anew
                return ctypes.CDLL(str(target))
        _compile(command, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        # Cache folder read-only or full, no home folder, or a compiler error: callers use the PyTorch path.
        return None


def library_for(name: str, dtype: object) -> ctypes.CDLL | None:
    """The one for numbers of this torch dtype: float32, or bfloat16 where the CPU multiplies it."""
    if str(dtype) == "torch.bfloat16" and "avx512_bf16" in cpu():
        return library(name, ("BF16",))
    return library(name) if str(dtype) == "torch.float32" else None


def _compile(command: Sequence[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, timeout=SECONDS)
        made.replace(target)   # a process beside this one may have done the same


@cache
def cpu() -> frozenset[str]:
    """What the CPU says that it can do: a home may be shared by machines of several kinds."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())

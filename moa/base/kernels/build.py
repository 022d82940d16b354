"""Builds moa's C libraries: the machine's compiler compiles each at its first use, into the user's cache folder.

Without a compiler, on a system other than x86-64 Linux, or with `MOA_NATIVE=0`, there is no library, and callers use
torch instead.
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
SECONDS = 120   # timeout of the compiler
CPUINFO = Path("/proc/cpuinfo")
TESTED = ("Linux", "x86_64")   # the only system and processors that the C code was tested on
NAMES = ("lora", "pieces", "step")   # the libraries


def compiler() -> str | None:
    """Path of the C compiler that `library` uses, the first there is of $CC, cc, gcc and clang; None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)


def unavailable() -> str | None:
    """Why there are no libraries here, as a clause; None where they can be compiled."""
    if os.environ.get("MOA_NATIVE") == "0":
        return "MOA_NATIVE=0 switches moa's C code off"
    if (system := (platform.system(), platform.machine())) != TESTED:
        return f"moa's C code is for {' '.join(TESTED)}, and this is {' '.join(system)}"
    return None if compiler() else "there is no C compiler (cc, gcc or clang)"


@cache
def library(name: str, defines: Sequence[str] = ()) -> ctypes.CDLL | None:
    """Compile csrc/NAME.c, or find it compiled in the cache, and load the library.

    Args:
        name: the source file without its suffix.
        defines: macros to define.

    Returns:
        The loaded library; None where it is disabled or cannot be compiled.
    """
    cc = compiler()
    if cc is None or unavailable() is not None:
        return None
    source = Path(__file__).parent / "csrc" / f"{name}.c"
    command = [cc, *FLAGS, *(f"-D{define}" for define in defines), str(source), "-lm"]
    try:
        sources = [source.read_bytes(), source.with_name("vector.h").read_bytes()]
        digest = hashlib.sha256(repr([sources, command, sorted(cpu())]).encode()).hexdigest()[:16]
        target = user_cache() / f"{name}-{digest}.so"
        if target.exists():
            with suppress(OSError):   # truncated, or of another system: it is compiled again
                return ctypes.CDLL(str(target))
        _compile(command, target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError):
        # Cache folder read-only or full, no home folder, or a compiler error: callers use the PyTorch path.
        return None


def library_for(name: str, dtype: object) -> ctypes.CDLL | None:
    """The library that `library` builds for a torch dtype.

    None unless `dtype` is float32, or bfloat16 on a CPU with instructions that multiply it.
    """
    if str(dtype) == "torch.bfloat16" and "avx512_bf16" in cpu():
        return library(name, ("BF16",))
    return library(name) if str(dtype) == "torch.float32" else None


def _compile(command: Sequence[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        compiled = Path(scratch) / target.name
        subprocess.run([*command, "-o", str(compiled)], check=True, capture_output=True, timeout=SECONDS)
        compiled.replace(target)   # atomic, because another process may compile the same library


@cache
def cpu() -> frozenset[str]:
    """The CPU's feature flags, part of the cache key because machines of several kinds may share a home folder."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return frozenset(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())

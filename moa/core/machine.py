"""The cores and the memory that this process may use: what its cgroup, its CPU affinity and the host allow.

In a container the host's own numbers are too large. Limits are read from the files of this process's cgroup, which
`/proc/self/cgroup` names, and of the cgroups above it; the smallest one holds. Both versions of cgroups are read. A
file that is missing or does not hold a number sets no limit.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
HOST = "host"           # in place of the name of a limit
AFFINITY = "CPU affinity"
THREADS = "OMP_NUM_THREADS"   # environment variable that torch reads when it is imported
# Variables of OpenMP's library that say how threads wait: how often they look before they sleep, or in words.
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = 10_000   # some tens of microseconds; the library's own number is some milliseconds
NUMBER = re.compile(r"[0-9]{1,20}", re.ASCII)
# Files of a cgroup, of version 2 and 1: most bytes, bytes in use, and the line of memory.stat with the part of these
# that the kernel takes back first, such as the cached content of files that were read once.
MEMORY_FILES = (("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))


@dataclass(frozen=True, slots=True)
class Cores:
    """The CPU cores that this process may use, and the smallest limit: HOST, AFFINITY or the path of a file."""

    count: int   # at least 1; part of a core counts as one
    host: int
    limit: str


@dataclass(frozen=True, slots=True)
class Memory:
    """The bytes of memory that this process may use, and the smallest limit: HOST or the path of a file."""

    total: int
    free: int
    host: int
    limit: str


def cores(root: Path = ROOT) -> Cores:
    """The cores that this process may use; `root` is the folder that holds `proc` and `sys`."""
    host = os.cpu_count() or 1
    found = [(host, HOST), (_affinity(), AFFINITY)]
    for folder in _cgroups(root, "cpu"):
        for name, quota in (("cpu.max", _quota(_text(folder / "cpu.max"))),
                            ("cpu.cfs_quota_us", _quota(_text(folder / "cpu.cfs_quota_us"),
                                                        _text(folder / "cpu.cfs_period_us")))):
            if quota is not None:
                found.append((max(1, math.ceil(quota)), _shown(folder / name, root)))
    count, limit = min(found, key=lambda each: each[0])   # of equal ones the first
    return Cores(count, host, limit)


def memory(root: Path = ROOT) -> Memory:
    """The memory that this process may use; `root` is the folder that holds `proc` and `sys`."""
    kibibytes = _fields(_text(root / "proc" / "meminfo"))
    host = kibibytes.get("MemTotal:", 0) * 1024 or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total, limit = host, HOST
    free = kibibytes["MemAvailable:"] * 1024 if "MemAvailable:" in kibibytes else host
    for folder in _cgroups(root, "memory"):
        for most_file, used_file, reclaimable in MEMORY_FILES:
            most = _number(_text(folder / most_file))
            if most is None or most >= host:
                continue
            used = _number(_text(folder / used_file)) or 0
            used -= _fields(_text(folder / "memory.stat")).get(reclaimable, 0)
            free = min(free, most - max(0, used))
            if most < total:
                total, limit = most, _shown(folder / most_file, root)
    return Memory(total, max(0, min(free, total)), host, limit)


def configure_threads(root: Path = ROOT) -> None:
    """Set how many threads torch starts and how they wait, in this process and in its children.

    By itself torch knows the CPU affinity and no cgroup. Where a cgroup allows fewer cores, this sets THREADS, unless
    the user has set it. Beside other work, threads that spin while they wait for a slower one take the core that it
    needs; with few SPINS they sleep soon, unless the user has said how they wait. It must be called before torch is
    imported.
    """
    if not os.environ.get(THREADS) and (count := cores(root).count) < _affinity():
        os.environ[THREADS] = str(count)
    if not any(map(os.environ.get, WAITING)):
        os.environ[WAITING[0]] = str(SPINS)


def _affinity() -> int:
    """The number of cores that the scheduler may run this process on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroups with the controller `cpu` or `memory` and of those above, its own first.

    A folder need not exist: in a container, `/proc/self/cgroup` may name a path of the host.
    """
    mount = root / "sys" / "fs" / "cgroup"
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        # Version 2 has one tree and names no controllers; version 1 has one for each set of controllers.
        trees = dict.fromkeys((mount / names, mount / controller)) if names else (mount,)
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for tree in trees:
            for depth in range(len(parts), -1, -1):
                yield tree.joinpath(*parts[:depth])


def _quota(quota: str, period: str = "") -> float | None:
    """Cores that a quota allows: microseconds of computing in each period. None = no limit.

    `cpu.max` holds both numbers, or `max` and the period. A quota of -1, or of no time at all, is no limit.
    """
    words = (*quota.split()[:2], *period.split()[:1])
    numbers = [_number(word) for word in words]
    if len(numbers) < 2 or not numbers[0] or not numbers[1]:
        return None
    return numbers[0] / numbers[1]


def _fields(text: str) -> dict[str, int]:
    """The first number after the name at the beginning of each line, as in /proc/meminfo and memory.stat."""
    lines = (line.split() for line in text.splitlines())
    return {words[0]: number for words in lines
            if len(words) > 1 and (number := _number(words[1])) is not None}


def _number(text: str) -> int | None:
    """A whole number; None for any other text."""
    return int(text) if NUMBER.fullmatch(text := text.strip()) else None


def _text(path: Path) -> str:
    """The file's content, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):   # ValueError: no UTF-8, or a NUL in the path
        return ""


def _shown(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root).as_posix()}"

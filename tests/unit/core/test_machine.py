"""The cores and the memory that a process may use, from folders made as /proc and /sys are."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moa.core import machine
from moa.core.machine import Cores, Memory, cores, memory

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712\n"
V2, CPU, MEM = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup/memory"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(monkeypatch, 8)


def allowed(monkeypatch: pytest.MonkeyPatch, affinity: int) -> None:
    """A host with 8 cores, on `affinity` of which this process may run."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)


def host(root: Path, cgroup: str, **files: str) -> Path:
    """A folder with a host of 16 GiB, of which 12 are free, and these files by path."""
    content = {"proc/meminfo": f"MemTotal: {16 << 20} kB\nMemFree: 1 kB\nMemAvailable: {12 << 20} kB\n",
               "proc/self/cgroup": cgroup, **files}
    for name, text in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_without_a_limit_the_host_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = host(tmp_path, "0::/\n", **{f"{V2}/cgroup.procs": ""})
    assert cores(root) == Cores(8, 8, "host")
    assert memory(root) == Memory(16 * GIB, 12 * GIB, 16 * GIB, "host")
    allowed(monkeypatch, 3)
    assert cores(root) == Cores(3, 8, "CPU affinity")


@pytest.mark.parametrize(("cgroup", "files", "count", "limit"), [
    ("0::/\n", {f"{V2}/cpu.max": "200000 100000\n"}, 2, f"/{V2}/cpu.max"),
    ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 2, f"/{V2}/cpu.max"),
    ("0::/\n", {f"{V2}/cpu.max": "10000 100000\n"}, 1, f"/{V2}/cpu.max"),
    ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, 8, "host"),
    ("0::/\n", {f"{V2}/cpu.max": "6400000 100000\n"}, 8, "host"),   # more than there are
    ("0::/\n", {f"{V2}/cpu.max": "1000 0\n"}, 8, "host"),
    ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "max 100000\n", f"{V2}/a/cpu.max": "300000 100000\n",
                   f"{V2}/c/cpu.max": "100000 100000\n"}, 3, f"/{V2}/a/cpu.max"),   # of its own and those above
    ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "100000 50000\n", f"{V2}/a/cpu.max": "300000 100000\n"}, 2,
     f"/{V2}/a/b/cpu.max"),
    ("3:cpu,cpuacct:/a\n1:name=systemd:/x\n", {f"{CPU}/a/cpu.cfs_quota_us": "250000\n",
                                               f"{CPU}/a/cpu.cfs_period_us": "100000\n"}, 3,
     f"/{CPU}/a/cpu.cfs_quota_us"),
    # Docker on version 1: the path is the host's, and the container's files lie at the top.
    ("3:cpu,cpuacct:/docker/0a\n", {f"{CPU}/cpu.cfs_quota_us": "100000\n", f"{CPU}/cpu.cfs_period_us": "50000\n"}, 2,
     f"/{CPU}/cpu.cfs_quota_us"),
    ("3:cpu,cpuacct:/\n", {f"{CPU}/cpu.cfs_quota_us": "-1\n", f"{CPU}/cpu.cfs_period_us": "100000\n"}, 8, "host"),
    # The tree is mounted under the controller's own name.
    ("3:cpuacct,cpu:/\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
                           "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 1,
     "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    ("4:memory:/\n", {f"{CPU}/cpu.cfs_quota_us": "100000\n", f"{CPU}/cpu.cfs_period_us": "100000\n"}, 8, "host")])
def test_the_smallest_limit_of_its_cgroups_counts(tmp_path: Path, cgroup: str, files: dict[str, str], count: int,
                                                  limit: str) -> None:
    assert cores(host(tmp_path, cgroup, **files)) == Cores(count, 8, limit)


@pytest.mark.parametrize(("cgroup", "files", "expected"), [
    ("0::/\n", {f"{V2}/memory.max": "max\n", f"{V2}/memory.current": f"{GIB}\n"},
     Memory(16 * GIB, 12 * GIB, 16 * GIB, "host")),
    ("0::/\n", {f"{V2}/memory.max": f"{4 * GIB}\n", f"{V2}/memory.current": f"{3 * GIB}\n",
                f"{V2}/memory.stat": f"anon 5\ninactive_file {2 * GIB}\ntotal_inactive_file 7\n"},
     Memory(4 * GIB, 3 * GIB, 16 * GIB, f"/{V2}/memory.max")),
    # The cgroup above has the larger limit and less left of it.
    ("0::/a\n", {f"{V2}/a/memory.max": f"{4 * GIB}\n", f"{V2}/a/memory.current": "0\n",
                 f"{V2}/memory.max": f"{6 * GIB}\n", f"{V2}/memory.current": f"{5 * GIB}\n"},
     Memory(4 * GIB, 1 * GIB, 16 * GIB, f"/{V2}/a/memory.max")),
    # The cgroup allows more than the host has free.
    ("0::/\n", {f"{V2}/memory.max": f"{14 * GIB}\n", f"{V2}/memory.current": "0\n"},
     Memory(14 * GIB, 12 * GIB, 16 * GIB, f"/{V2}/memory.max")),
    ("4:memory:/a\n", {f"{MEM}/a/memory.limit_in_bytes": UNLIMITED_V1, f"{MEM}/a/memory.usage_in_bytes": "5\n"},
     Memory(16 * GIB, 12 * GIB, 16 * GIB, "host")),
    ("4:memory:/docker/0a\n", {f"{MEM}/memory.limit_in_bytes": f"{2 * GIB}\n",
                               f"{MEM}/memory.usage_in_bytes": f"{2 * GIB}\n",
                               f"{MEM}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n"},
     Memory(2 * GIB, GIB, 16 * GIB, f"/{MEM}/memory.limit_in_bytes"))])
def test_the_memory_left_is_that_of_the_fullest_cgroup(tmp_path: Path, cgroup: str, files: dict[str, str],
                                                       expected: Memory) -> None:
    assert memory(host(tmp_path, cgroup, **files)) == expected


def test_without_proc_the_operating_system_says_what_there_is(tmp_path: Path) -> None:
    found = memory(tmp_path)
    assert found.total == found.host == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.limit == "host" and cores(tmp_path).limit == "host"


def test_this_machine_has_cores_and_memory() -> None:
    found = memory()
    assert 0 < found.free <= found.total <= found.host and cores().count >= 1


@given(quota=st.integers(1, 10**9), period=st.integers(1, 10**6))
def test_a_quota_is_rounded_up_to_whole_cores(tmp_path: Path, quota: int, period: int) -> None:
    root = host(tmp_path, "0::/\n", **{f"{V2}/cpu.max": f"{quota} {period}\n"})
    assert cores(root).count == min(8, math.ceil(quota / period))


LINES = st.text(st.characters(codec="utf-8"), max_size=40)
NUMBERS = st.one_of(LINES, st.integers(-2, 1 << 80).map(str), st.sampled_from(["max", "max 100000", "5 ", "٣ ٤"]))


CGROUPS = st.one_of(LINES, st.sampled_from(["0::/", "0::/a", "2:cpu:/a", "3:memory:/", "4:cpu,memory:/a/../b"]))


@given(cgroup=st.lists(CGROUPS), meminfo=LINES, numbers=st.lists(NUMBERS, min_size=6, max_size=6))
def test_whatever_the_files_hold_there_is_an_answer(tmp_path: Path, cgroup: list[str], meminfo: str,
                                                    numbers: list[str]) -> None:
    names = ("cpu.max", "memory.max", "memory.current", "memory.stat")
    files = {f"{V2}/{folder}{name}": text for folder in ("", "a/") for name, text in zip(names, numbers, strict=False)}
    files |= {f"{MEM}/memory.limit_in_bytes": numbers[4], f"{V2}/cpu/a/cpu.cfs_quota_us": numbers[5],
              f"{V2}/cpu/a/cpu.cfs_period_us": numbers[0]}
    root = host(tmp_path, "\n".join(cgroup), **files)
    (root / "proc" / "meminfo").write_text(f"{meminfo}\nMemTotal: {16 << 20} kB\n", encoding="utf-8")
    assert 1 <= cores(root).count <= 8
    found = memory(root)
    assert 0 <= found.free <= found.total <= found.host


@pytest.mark.parametrize(("quota", "affinity", "before", "after"), [
    ("200000 100000", 8, None, "2"), ("200000 100000", 8, "5", "5"), ("200000 100000", 8, "", "2"),
    ("200000 100000", 2, None, None), ("max 100000", 8, None, None)])
def test_torch_gets_as_many_threads_as_a_cgroup_allows_cores(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, affinity: int, before: str | None,
        after: str | None) -> None:
    """Where the user has not said how many, and where torch would not find it out by itself."""
    allowed(monkeypatch, affinity)
    if before is None:
        monkeypatch.setenv(machine.THREADS, "")   # so that it is restored after the test
        monkeypatch.delenv(machine.THREADS)
    else:
        monkeypatch.setenv(machine.THREADS, before)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    machine.configure_threads(host(tmp_path, "0::/\n", **{f"{V2}/cpu.max": quota}))
    assert os.environ.get(machine.THREADS) == after


@pytest.mark.parametrize(("before", "after"), [
    ({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_threads_that_wait_sleep_soon_unless_the_user_says_how_they_wait(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], after: str | None) -> None:
    for name in machine.WAITING:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    machine.configure_threads(host(tmp_path, "0::/\n"))
    assert os.environ.get("GOMP_SPINCOUNT") == after

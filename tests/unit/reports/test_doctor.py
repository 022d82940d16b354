"""What `moa doctor` finds of the machine, and what it calls wrong."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa.base.kernels import build
from moa.core.errors import BaseModelError
from moa.core.paths import Workspace
from moa.reports import doctor
from moa.reports.doctor import Doctor

GIB = 1 << 30
HOUR = 3600.0


# What is wrong.

@pytest.mark.parametrize(("total", "free", "wrong"), [
    (100 * GIB, 6 * GIB, False), (100 * GIB, 4 * GIB, True),            # 5 %
    (4 * GIB, 1.5 * GIB, False), (4 * GIB, 0.9 * GIB, True),            # 1 GiB
    (4000 * GIB, 11 * GIB, False), (4000 * GIB, 9 * GIB, True)])        # 10 GiB
def test_a_disk_that_is_nearly_full(total: float, free: float, wrong: bool) -> None:
    disk = {"path": "/srv", "holds": ["workspace"], "total": total, "free": free}
    said = doctor.disk_problem(disk)
    assert (said is not None) is wrong
    if said:
        assert said.startswith("The disk at /srv (workspace) has ") and "`dvc gc --workspace`" in said
        assert "TMPDIR" in str(doctor.disk_problem({**disk, "holds": ["temporary files"]}))


def test_threads() -> None:
    assert doctor.thread_problem(4, 4) is None and doctor.thread_problem(1, 4) is None
    assert doctor.thread_problem(8, 2) == ("torch computes with 8 threads and may use 2 cores, which is slow: unset "
                                           "OMP_NUM_THREADS, or set it to 2.")


@given(before=st.floats(1e9, 2e9), took=st.floats(0, 30), skew=st.floats(-HOUR, HOUR))
def test_a_disks_clock(before: float, took: float, skew: float) -> None:
    """The file is written in between the two readings of the machine's clock."""
    said = doctor.skew_problem(before + took / 2 + skew, before, before + took)
    rounding = 1e-3
    if abs(skew) < doctor.DISK_SKEW - rounding:
        assert said is None
    elif abs(skew) > doctor.DISK_SKEW + took + rounding:
        assert said is not None and ("ahead of" if skew > 0 else "behind") in said


def test_a_record_from_the_future() -> None:
    assert doctor.future_problem("newest commit", 1e9, 1e9 + HOUR) is None
    assert doctor.future_problem("newest commit", 1e9 + 30, 1e9) is None
    assert doctor.future_problem("newest commit", 1e9 + HOUR, 1e9) == (
        "The newest commit is from 2001-09-09T02:46:40+00:00, and this machine's clock says 2001-09-09T01:46:40+00:00: "
        "set the clock (a time server keeps it right), or wait, if another clock was wrong.")


@pytest.mark.parametrize(("driver", "cards", "reason", "visible", "wrong"), [
    ("550.1", 0, "the CPU computes bfloat16, chosen by auto", None, True),
    ("550.1", 0, "the CPU computes bfloat16, chosen by auto", "", False),   # hidden on purpose
    ("550.1", 0, "the CPU computes bfloat16", None, False),                 # params.yaml names the CPU
    ("550.1", 1, "H100 computes bfloat16, chosen by auto", None, False),
    (None, 0, "the CPU computes bfloat16, chosen by auto", None, False)])
def test_a_card_that_torch_does_not_see(driver: str | None, cards: int, reason: str, visible: str | None,
                                        wrong: bool) -> None:
    said = doctor.driver_problem(driver, cards, reason, visible)
    assert (said is not None) is wrong
    assert not said or said.startswith("NVIDIA's driver 550.1 is here and torch ")


def test_memory_in_which_no_expert_can_be_trained() -> None:
    experts = {"free_bytes": GIB, "base_bytes": 2 * GIB, "training": {"bytes": GIB, "fit": 0}}
    assert doctor.memory_problem(experts, "cpu") == (
        "1.0 GiB of memory are free (cpu), the base takes 2.0 GiB, and an expert in training 1.0 GiB: end other "
        "programs, lower train.rank, or use a machine with more memory.")
    assert doctor.memory_problem({**experts, "training": {"bytes": GIB, "fit": 1}}, "cpu") is None


def test_an_error_within_a_check_is_a_problem_and_ends_that_check_alone() -> None:
    examined = Doctor()
    with examined.checking("base"):
        raise BaseModelError("No base: run `moa base`.")
    with examined.checking("disk"):
        raise PermissionError(13, "Permission denied", "/srv/x")
    with pytest.raises(ZeroDivisionError), examined.checking("bug"):
        raise ZeroDivisionError
    assert [(problem.check, problem.message) for problem in examined.problems] == [
        ("base", "No base: run `moa base`."),
        ("disk", "The check of disk failed: Permission denied (/srv/x); mend that, and run `moa doctor` again.")]


def test_a_call_that_does_not_return_is_abandoned() -> None:
    assert doctor.within(60, lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        doctor.within(60, lambda: {}["x"])
    ended = threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        doctor.within(0.1, lambda: ended.wait(600))
    ended.set()


# What there is.

def test_cards_as_torch_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.cards() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda index: SimpleNamespace(name=f"card {index}", major=8 + index, minor=index))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index * GIB, 80 * GIB))
    assert doctor.cards() == [
        {"device": "cuda:0", "name": "card 0", "total": 80 * GIB, "free": 0, "capability": "8.0"},
        {"device": "cuda:1", "name": "card 1", "total": 80 * GIB, "free": GIB, "capability": "9.1"}]


def test_a_card_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    examined = Doctor()
    doctor._device(examined, None)
    assert [problem.message for problem in examined.problems] == [
        "torch cannot use the CUDA devices (RuntimeError: CUDA error: out of memory): see what `nvidia-smi` says, or "
        "name cpu in execution.devices."]
    assert examined.facts["cards"] == [] and examined.facts["device"] is None


@pytest.mark.parametrize(("script", "found"), [
    ("echo 550.54.15; echo 550.54.15", "550.54.15"), ("echo", None),
    ("echo 'Failed to initialize NVML'; exit 18", None), (None, None)])
def test_the_driver_as_nvidia_smi_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None,
                                          found: str | None) -> None:
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver() == found


@pytest.mark.parametrize(("device", "dtype", "reason"), [
    ("cuda:0", "bfloat16", "moa's C code computes on CPUs alone"),
    ("cpu", "float64", "moa's C code does not compute float64")])
def test_where_the_c_code_is_of_no_use(monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, reason: str) -> None:
    monkeypatch.setattr(build, "unavailable", lambda: None)
    examined = Doctor()
    doctor._compiler(examined, device, dtype)
    assert examined.facts["compiler"]["reason"] == reason and examined.facts["compiler"]["libraries"] == []
    assert not examined.problems


@pytest.mark.parametrize(("dtype", "flags", "reason", "problems"), [
    ("float32", set(), None, 1), ("bfloat16", {"avx512_bf16"}, None, 1),
    ("bfloat16", set(), "this CPU has no instructions for bfloat16", 0)])
def test_a_compiler_that_cannot_build_it(monkeypatch: pytest.MonkeyPatch, dtype: str, flags: set[str],
                                         reason: str | None, problems: int) -> None:
    monkeypatch.setattr(build, "unavailable", lambda: None)
    monkeypatch.setattr(build, "compiler", lambda: "/opt/cc")
    monkeypatch.setattr(build, "cpu", lambda: frozenset(flags))
    monkeypatch.setattr(build, "library", lambda name, defines=(): None)
    examined = Doctor()
    doctor._compiler(examined, "cpu", dtype)
    assert examined.facts["compiler"] == {"path": "/opt/cc", "libraries": [], "reason": reason}
    assert len(examined.problems) == problems
    for problem in examined.problems:
        assert problem.message.startswith("/opt/cc could not build moa's C code (lora, pieces, step), and torch ")


# The page.

def facts(**changes: Any) -> dict[str, Any]:
    return {"moa": "1.2", "python": "3.12.1", "packages": {"torch": "2.13.0", "peft": None}, "system": "Linux 6 x86_64",
            "cores": {"count": 2, "host": 64, "limit": "/sys/fs/cgroup/cpu.max"}, "threads": 2,
            "memory": {"total": 4 * GIB, "free": 3 * GIB, "host": 16 * GIB, "limit": "/sys/fs/cgroup/memory.max"},
            "disks": [{"path": "/srv", "holds": ["workspace", "temporary files"], "total": 9 * GIB, "free": GIB}],
            "device": {"device": "cpu", "dtype": "float32", "reason": "the CPU has no fast bfloat16, chosen by auto"},
            "compiler": {"path": "/usr/bin/cc", "libraries": ["lora", "step"], "reason": None}, "cards": [],
            "driver": None, "cuda": None, "problems": []} | changes


def test_the_text_of_a_machine() -> None:
    assert doctor.text(facts()).splitlines() == [
        "moa       1.2, Python 3.12.1, torch 2.13.0, peft missing",
        "system    Linux 6 x86_64",
        "cores     2 of the host's 64 (limit: /sys/fs/cgroup/cpu.max); torch uses 2 threads",
        "memory    4.0 GiB of the host's 16.0 GiB (limit: /sys/fs/cgroup/memory.max), 3.0 GiB free",
        "disk      1.0 GiB of 9.0 GiB free at /srv (workspace, temporary files)",
        "device    cpu in float32: the CPU has no fast bfloat16, chosen by auto",
        "compiler  /usr/bin/cc; C code for lora, step",
        "card      none",
        "", "Nothing is wrong."]
    host = facts(cores={"count": 1, "host": 1, "limit": "host"}, threads=1,
                 memory={"total": GIB, "free": GIB, "host": GIB, "limit": "host"},
                 compiler={"path": None, "libraries": [], "reason": "there is no C compiler"}, driver="550",
                 cuda="13.0",
                 cards=[{"device": "cuda:0", "name": "H", "total": GIB, "free": GIB, "capability": "9.0"}],
                 problems=[{"check": "clock", "message": "It is late."}])
    lines = doctor.text(host).splitlines()
    assert lines[2:4] == ["cores     1; torch uses 1 thread", "memory    1.0 GiB, 1.0 GiB free"]
    assert lines[6:] == ["compiler  none; torch computes: there is no C compiler",
                         "card      cuda:0 H, 1.0 GiB of 1.0 GiB free, compute capability 9.0",
                         "driver    550, torch built for CUDA 13.0", "", "WRONG  It is late."]


def test_the_text_of_a_workspace() -> None:
    found = facts(
        workspace="/srv/w", base={"source": "path:b", "parameters": 1234567, "digest": "d"},
        experts={"rank": 8, "base_bytes": GIB, "free_bytes": 3 * GIB, "serving": {"bytes": 1024, "fit": 2000},
                 "training": {"bytes": 8192, "fit": 250}},
        mlflow={"address": "sqlite:///x", "champion": 3}, lock={"state": "at work", "pid": 12, "since": "noon"})
    assert doctor.text(found).splitlines()[8:14] == [
        "workspace         /srv/w",
        "base              path:b, 1,234,567 parameters",
        "experts to serve  at most 2,000 of rank 8, 1.0 KiB each, beside 1.0 GiB of the base",
        "experts to train  at most 250 of rank 8, 8.0 KiB each, beside 1.0 GiB of the base",
        "mlflow            sqlite:///x, champion: version 3",
        "lock              a run is at work (pid 12, since noon)"]
    for state, said in (("killed", "free: a run was killed ("), ("silent", "held, without a sign of life (")):
        assert f"lock              {said}" in doctor.text({**found, "lock": {**found["lock"], "state": state}})
    fresh = doctor.text({**found, "base": None, "experts": None, "mlflow": {"address": "a", "champion": None},
                         "lock": {"state": "free"}})
    assert "not fetched yet: `moa base`" in fresh and "a, no champion" in fresh and "lock" not in fresh


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    examined = Doctor()
    doctor._disk_clock(examined, Workspace(tmp_path))
    assert [problem.check for problem in examined.problems] == ["write"]
    assert examined.problems[0].message == (f"The workspace cannot be written (Read-only file system): make {tmp_path} "
                                            "writable for this user, or free some space.")

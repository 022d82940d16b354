"""How a library of moa's C is compiled, kept and found, and when there is none."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa.base.kernels import build

pytestmark = pytest.mark.skipif(build.library_for("step", torch.float32) is None, reason="no compiler, or another CPU")


def asked(folder: Path, **environment: str) -> str:
    """What another process, whose cache is `folder`, says of the library."""
    script = "from moa.base.kernels.build import library; found = library('step'); print(found and found.lanes())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          env=os.environ | {"XDG_CACHE_HOME": str(folder)} | environment)
    return done.stdout.strip()


def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    assert asked(tmp_path) in ("8", "16")
    [made] = (tmp_path / "moa").iterdir()
    before = made.stat().st_mtime_ns
    assert asked(tmp_path, PATH="/usr/bin:/bin") in ("8", "16")
    assert [each.stat().st_mtime_ns for each in (tmp_path / "moa").iterdir()] == [before]


@pytest.mark.slow
def test_processes_that_compile_at_once_leave_one_library(tmp_path: Path) -> None:
    script = "from moa.base.kernels.build import library; print(library('step').lanes())"
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                                  env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(3)]
    assert len({process.communicate()[0] for process in processes}) == 1
    assert all(process.returncode == 0 for process in processes) and len(list((tmp_path / "moa").iterdir())) == 1


@pytest.mark.parametrize("trouble", ["switched off", "no compiler", "a compiler that refuses", "no room"])
def test_without_it_there_is_none_and_nothing_is_left(tmp_path: Path, trouble: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tools / "cc").chmod(0o755)
    cache = tmp_path / "cache"
    if trouble == "switched off":
        assert asked(cache, MOA_NATIVE="0") == "None"
    elif trouble == "no compiler":
        assert asked(cache, PATH=str(tmp_path)) == "None"
    elif trouble == "a compiler that refuses":
        assert asked(cache, PATH=str(tools)) == "None"
    elif trouble == "no room":
        cache.write_text("a file where the folder should be")
        assert asked(cache) == "None"
        return
    assert not (cache / "moa").exists() or not list((cache / "moa").iterdir())


def test_a_library_that_is_cut_off_is_made_anew(tmp_path: Path) -> None:
    asked(tmp_path)
    [made] = (tmp_path / "moa").iterdir()
    made.write_bytes(made.read_bytes()[:100])
    assert asked(tmp_path) in ("8", "16")


def test_where_nothing_says_what_the_cpu_can_do_there_is_none_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CPUINFO", Path("/nowhere"))
    monkeypatch.setattr(build, "cpu", build.cpu.__wrapped__)
    assert build.library_for("step", torch.bfloat16) is None


def test_another_source_or_cpu_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "cpu", lambda: frozenset({"another"}))
    made = build.library.__wrapped__("step")
    assert isinstance(made, ctypes.CDLL) and len(list((tmp_path / "moa").iterdir())) == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.__wrapped__("step")
    assert len(list((tmp_path / "moa").iterdir())) == 2

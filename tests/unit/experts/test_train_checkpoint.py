"""Checkpoints are written beside the training, which waits for the copy of its state alone."""

import errno
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from moa.core.paths import Workspace
from moa.experts import train
from moa.experts.cotraining import Progress


@pytest.fixture
def learner() -> Any:
    weights = torch.arange(4.0)
    return SimpleNamespace(name="alpha", progress=Progress(step=1), weights=weights,
                           tensors=lambda: {"weights": weights, "best": weights})


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> train.Checkpoint:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    return train.Checkpoint(Workspace(tmp_path), {"alpha": "print"})


def test_a_slow_disk_delays_no_step(checkpoint: train.Checkpoint, learner: Any, monkeypatch: pytest.MonkeyPatch
                                    ) -> None:
    slow, begun, released = safetensors.torch.save_file, threading.Semaphore(0), threading.Event()

    def save_file(*args: Any, **more: Any) -> None:
        begun.release()
        assert released.wait(60)
        slow(*args, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    checkpoint.save_now_and_then([learner])
    assert begun.acquire(timeout=60)
    learner.weights.add_(1)   # the training goes on, and the file gets the state of before
    checkpoint.save_now_and_then([learner])
    assert not begun.acquire(timeout=0.2) and not checkpoint.path.exists()
    released.set()
    checkpoint.save([learner])
    restored: list[Any] = []
    again = SimpleNamespace(name="alpha", progress=Progress(), restore=lambda *state: restored.append(state))
    checkpoint.restore([again])
    (progress, tensors), = restored
    assert progress.step == 1 and torch.equal(tensors["weights"], learner.weights)
    checkpoint.clear()
    assert not list(checkpoint.folder.iterdir())


def test_what_is_written_is_the_state_at_the_time_of_the_call(checkpoint: train.Checkpoint, learner: Any) -> None:
    checkpoint.save_now_and_then([learner])
    learner.weights.add_(1)
    checkpoint._wait()
    restored: list[Any] = []
    checkpoint.restore([SimpleNamespace(name="alpha", progress=Progress(),
                                        restore=lambda *state: restored.append(state))])
    assert torch.equal(restored[0][1]["weights"], torch.arange(4.0))


def test_a_full_disk_is_an_error_of_the_next_save(checkpoint: train.Checkpoint, learner: Any,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    checkpoint.save_now_and_then([learner])
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save([learner])


def test_copies_take_a_small_share_of_the_time(checkpoint: train.Checkpoint, learner: Any) -> None:
    checkpoint.save([learner])
    checkpoint._copying, before = 1e6, checkpoint.last
    checkpoint.save_now_and_then([learner])
    assert checkpoint.last == before

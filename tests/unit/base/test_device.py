"""The device and dtype that the base runs on."""

import re

import pytest
import torch

from moa.base.device import Device, pick_device
from moa.core.errors import BaseModelError


def test_the_device_is_explained_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOA_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=supported: answer, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        picked = pick_device()
        assert (picked.device, picked.dtype) == ("cpu", dtype)
        assert picked.reason
    monkeypatch.setenv("MOA_DTYPE", "float32")
    assert pick_device(["cpu"]) == Device("cpu", "float32", "MOA_DTYPE says so")
    monkeypatch.setenv("MOA_DTYPE", "int3")
    with pytest.raises(BaseModelError, match="MOA_DTYPE"):
        pick_device()


@pytest.mark.parametrize(("named", "count", "said"), [
    ("cuda:1", 0, "The device 'cuda:1' (of --device, MOA_DEVICE or execution.devices) cannot be used: torch sees no "
                  "CUDA device here; use auto or cpu."),
    ("cuda:3", 1, "is not there: torch sees cuda:0."), ("cuda:3", 2, "is not there: torch sees cuda:0 to cuda:1."),
    ("gpu", 1, "is not known to torch: use auto, cpu, or cuda:0.")])
def test_a_device_that_is_not_there_is_named_with_those_that_are(monkeypatch: pytest.MonkeyPatch, named: str,
                                                                 count: int, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(BaseModelError, match=re.escape(said)):
        pick_device([named])


@pytest.mark.parametrize(("named", "current"), [(["cuda:1"], 1), ("auto", 0)])
@pytest.mark.parametrize("fast", [True, False])
def test_the_card_that_was_asked_for_decides_the_dtype_and_is_named(monkeypatch: pytest.MonkeyPatch, fast: bool,
                                                                    named: str | list[str], current: int) -> None:
    """A V100 or T4 emulates bfloat16, slower than it computes float32."""
    monkeypatch.delenv("MOA_DTYPE", raising=False)
    asked: list[int] = []

    class Current:
        def __init__(self, device: str) -> None:
            self.index = int(device.partition(":")[2] or 0)

        def __enter__(self) -> None:
            asked.append(self.index)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or fast)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"card {asked[-1]}")
    picked = pick_device(named)
    assert asked == [current] and picked.dtype == ("bfloat16" if fast else "float32")
    assert picked.reason.startswith(f"card {current} {'computes' if fast else 'has no fast'} bfloat16")

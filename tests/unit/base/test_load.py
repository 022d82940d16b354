"""The device and dtype that the base is loaded on. test_pin.py loads bases as it fetches them."""

import pytest
import torch

from moa.base import load
from moa.core.errors import BaseModelError


def test_the_device_is_explained_and_can_be_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOA_DTYPE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for supported, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda answer=supported: answer, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        picked = load.pick_device()
        assert (picked.device, picked.dtype) == ("cpu", dtype)
        assert picked.reason
    monkeypatch.setenv("MOA_DTYPE", "float32")
    assert load.pick_device(["cpu"]) == load.Device("cpu", "float32", "MOA_DTYPE says so")
    monkeypatch.setenv("MOA_DTYPE", "int3")
    with pytest.raises(BaseModelError, match="MOA_DTYPE"):
        load.pick_device()
    with pytest.raises(BaseModelError, match="no CUDA device"):
        load.pick_device(["cuda:1"])

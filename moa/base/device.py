"""The device and dtype that the base runs on.

Imports only the standard library and moa.core.errors, and torch inside the functions.
"""

import os
from dataclasses import dataclass

from moa.core.errors import BaseModelError

FLOATS = ("bfloat16", "float16", "float32", "float64")   # torch dtypes that MOA_DTYPE may name


@dataclass(frozen=True, slots=True)
class Device:
    """Where the base runs, in which torch dtype, and the reason for the choice."""

    device: str
    dtype: str
    reason: str


def pick_device(devices: str | list[str] = "auto") -> Device:
    """Choose the device and dtype to run the base on.

    bfloat16 without instructions for it, on a CPU or on a GPU from before 2020, is slower than float32. The environment
    variable MOA_DTYPE overrides.

    Args:
        devices: `execution.devices` of params.yaml: "auto" or a list whose first entry is used.

    Returns:
        The named device, else a GPU where there is one, else the CPU, with the faster of bfloat16 and float32.

    Raises:
        BaseModelError: torch does not see the named device, or MOA_DTYPE is no dtype.
    """
    import torch

    named = None if devices == "auto" or not devices else devices if isinstance(devices, str) else devices[0]
    if named:
        _require(named)
    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        with torch.cuda.device(device):   # the other functions are of the current device
            # Not `is_bf16_supported()` alone: it is true where bfloat16 is emulated, as on a V100 or T4.
            fast, what = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name()
    elif device == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")   # private: absent in some versions
        fast, what = any(getattr(torch.cpu, check, bool)() for check in checks), "the CPU"
    else:
        fast, what = False, device
    dtype = "bfloat16" if fast else "float32"
    reason = f"{what} {'computes' if fast else 'has no fast'} bfloat16" + ("" if named else ", chosen by auto")
    if override := os.environ.get("MOA_DTYPE"):
        if override not in FLOATS:
            raise BaseModelError(f"MOA_DTYPE is {override!r}; allowed: {', '.join(FLOATS)}.")
        dtype, reason = override, "MOA_DTYPE says so"
    return Device(device, dtype, reason)


def _require(named: str) -> None:
    """Raise BaseModelError unless torch sees the device that --device, MOA_DEVICE or execution.devices names."""
    import torch

    asked = f"The device {named!r} (of --device, MOA_DEVICE or execution.devices)"
    try:
        device = torch.device(named)
    except RuntimeError:
        raise BaseModelError(f"{asked} is not known to torch: use auto, cpu, or cuda:0.") from None
    if device.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise BaseModelError(f"{asked} cannot be used: torch sees no CUDA device here; use auto or cpu.")
    if device.index is not None and device.index >= count:
        seen = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise BaseModelError(f"{asked} is not there: torch sees {seen}.")

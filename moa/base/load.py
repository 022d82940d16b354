"""Loads the pinned base: chooses device and dtype, verifies the content, and opens model and tokenizer."""

import os
from dataclasses import dataclass
from typing import Any

from moa.base import sources
from moa.base.pin import DTYPES, BasePin, locate, pin, tokenizer_digest, verify
from moa.core.config import BaseParams
from moa.core.errors import BaseModelError
from moa.core.paths import Workspace


@dataclass(frozen=True, slots=True)
class Device:
    """Where the base runs, in which torch dtype, and the reason for the choice."""

    device: str
    dtype: str
    reason: str


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base: `model` is frozen and in eval mode."""

    model: Any
    tokenizer: Any
    pin: BasePin
    device: Device


def pick_device(devices: str | list[str] = "auto") -> Device:
    """Choose the device and dtype to run the base on.

    bfloat16 on a CPU without instructions for it is slower than float32. The environment variable MOA_DTYPE overrides.

    Args:
        devices: `execution.devices` of params.yaml: "auto" or a list whose first entry is used.

    Returns:
        The named device, else a GPU where there is one, else the CPU, with the faster of bfloat16 and float32.

    Raises:
        BaseModelError: torch sees no CUDA device but one is named, or MOA_DTYPE is no dtype.
    """
    import torch

    named = None if devices == "auto" or not devices else devices if isinstance(devices, str) else devices[0]
    if named and named.startswith("cuda") and not torch.cuda.is_available():
        raise BaseModelError(f"execution.devices names {named!r}, but torch sees no CUDA device here; use auto.")
    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda"):
        fast, dtype_reason = torch.cuda.is_bf16_supported(), "the GPU"
    elif device == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")   # private: absent in some versions
        fast, dtype_reason = any(getattr(torch.cpu, check, bool)() for check in checks), "the CPU"
    else:
        fast, dtype_reason = False, device
    dtype = "bfloat16" if fast else "float32"
    reason = f"{dtype_reason} {'computes' if fast else 'has no fast'} bfloat16" + ("" if named else ", chosen by auto")
    if override := os.environ.get("MOA_DTYPE"):
        if override not in DTYPES.values():
            raise BaseModelError(f"MOA_DTYPE is {override!r}; allowed: {', '.join(DTYPES.values())}.")
        dtype, reason = override, "MOA_DTYPE says so"
    return Device(device, dtype, reason)


def load_tokenizer(workspace: Workspace) -> Any:
    """Open the fetched base's tokenizer. Raises BaseModelError when it is missing or changed since it was fetched."""
    from transformers import AutoTokenizer

    pinned = pin(workspace)
    if tokenizer_digest(workspace.base) != pinned.tokenizer:
        raise BaseModelError("The base's tokenizer changed since it was fetched: run `moa base` to fetch it again.")
    sources.silence_transformers()
    return AutoTokenizer.from_pretrained(workspace.base, trust_remote_code=False)


def load(workspace: Workspace, params: BaseParams, device: Device | None = None) -> Base:
    """Verify the base and load it, frozen and in eval mode, onto `device` (default: `pick_device()`).

    Raises BaseModelError when it differs from its pin or transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    pinned = verify(workspace, params)
    device = device or pick_device()
    sources.silence_transformers()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            locate(workspace, params), dtype=getattr(torch, device.dtype), attn_implementation="sdpa",
            use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(f"The base {pinned.source} cannot be loaded: {sources.first_line(error)}") from None
    model = model.to(device.device).eval().requires_grad_(False)
    # transformers projects a slice of the last positions; on a CPU in bfloat16 that took 190 times as long as a copy.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    return Base(model, load_tokenizer(workspace), pinned, device)


def recomputable_layers(model: Any) -> list[Any]:
    """The layers of a model whose activations Transformers can compute again in the backward (gradient checkpointing).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

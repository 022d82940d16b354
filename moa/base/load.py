"""Loads the pinned base: verifies the content, and opens model and tokenizer."""

from dataclasses import dataclass
from typing import Any

from moa.base import sources
from moa.base.device import Device, pick_device
from moa.base.pin import BasePin, locate, pin, tokenizer_digest, verify
from moa.core.config import BaseParams
from moa.core.errors import BaseModelError
from moa.core.paths import Workspace


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base: `model` is frozen and in eval mode."""

    model: Any
    tokenizer: Any
    pin: BasePin
    device: Device


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
            locate(workspace, params), dtype=getattr(torch, device.dtype),
            use_safetensors=True, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise BaseModelError(f"The base {pinned.source} cannot be loaded: {sources.first_line(error)}") from None
    model = model.to(device.device).eval().requires_grad_(False)
    # transformers projects a slice of the last positions; on a CPU in bfloat16 that took 190 times as long as a copy.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    return Base(model, load_tokenizer(workspace), pinned, device)

"""How many experts fit into memory beside the base, from the shapes of the base's layers: no weights are loaded.

An expert of rank r has P = r * (the sum of inputs + outputs of the layers that it adapts) parameters. In training they
are in float32 (`moa.experts.lora.ExpertStack`), so one copy takes 4 * P bytes.

    serving     1 copy, on a GPU in the base's dtype (`moa.mixture.mixture`), else in float32. The stack of a mixture
                has room for experts on all linear layers, whatever `train.targets` says.
    training    4 copies on the device: weights, gradients and the two moments of AdamW. And 4 in the machine's memory
                while a checkpoint is written: weights, best weights and the moments of all experts of the process.

Activations, caches of keys and values, and copies of the base's weights in another order take memory as well, which
depends on the rows. So the numbers are the most that fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.base.sources import silence_transformers
from moa.core.errors import BaseModelError

FLOAT32 = 4           # bytes of a number
TRAINING_COPIES = 4   # of an expert in training, on the device
CHECKPOINT_COPIES = 4   # of an expert, in the machine's memory, while a checkpoint is written


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes in memory: of the base's weights, of one expert that serves, and of one in training."""

    base: int
    serving: int
    training: int

    def fits(self, free: int, expert: int) -> int:
        """The most experts of `expert` bytes each that fit beside the base into `free` bytes."""
        return max(0, free - self.base) // expert


def sizes(model: Any, rank: int, targets: str | Sequence[str], base_bytes: int, *, shared: bool) -> Sizes:
    """The bytes that a base and its experts take.

    Args:
        model: the base, of which only shapes are read (`skeleton`).
        rank: of the experts.
        targets: `train.targets` of params.yaml.
        base_bytes: of one number of the base's weights.
        shared: whether the device's memory is the machine's, so that checkpoints take from it, too.

    Raises:
        ArtifactError: a target matches no linear layer.
    """
    copies = TRAINING_COPIES + (CHECKPOINT_COPIES if shared else 0)
    return Sizes(base_bytes * sum(weight.numel() for weight in model.parameters()),
                 (FLOAT32 if shared else base_bytes) * expert_parameters(model, rank, "all-linear"),
                 FLOAT32 * expert_parameters(model, rank, targets) * copies)


def expert_parameters(model: Any, rank: int, targets: str | Sequence[str]) -> int:
    """The number of parameters of one expert. Raises ArtifactError when a target matches no linear layer."""
    from moa.experts.lora import target_layers

    return rank * sum(layer.in_features + layer.out_features for layer in target_layers(model, targets).values())


def skeleton(folder: Path) -> Any:
    """The model that config.json in `folder` describes, without memory for its weights (on torch's device `meta`).

    Raises BaseModelError where transformers cannot make it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    silence_transformers()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"The base's config.json cannot be used ({type(error).__name__}): run `moa base` to fetch "
                             "the base again.") from error

"""What moa needs to know of a causal language model of transformers."""

from typing import Any


def recomputable_layers(model: Any) -> list[Any]:
    """The layers of a model whose activations Transformers can compute again in the backward (gradient checkpointing).
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def text_config(model: Any) -> Any:
    """The configuration of the part of a model that reads text: of one that also sees, its sizes lie within another."""
    return model.config.get_text_config(decoder=True)

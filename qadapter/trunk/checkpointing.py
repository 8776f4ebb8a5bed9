"""Checkpoints of activations, which the blocks of a trunk make by themselves once it was told."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoints_reentrantly(trunk: nn.Module) -> bool:
    """Whether a checkpointed block would give no gradients for inputs that need none."""
    return any(
        module.gradient_checkpointing
        and getattr(module._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
        for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)
    )

"""Activation checkpointing: the strategy `ckpt`, and plans with an option for each layer."""

from memscope.strategies.ckpt.checkpoint import Checkpoint
from memscope.strategies.ckpt.layer_plan import LayerPlan

__all__ = ["Checkpoint", "LayerPlan"]

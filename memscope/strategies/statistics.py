"""Modules whose forward pass in training depends on the batch it is given, or counts how often it runs.

Splitting a batch gives them other statistics, and running them again in the backward pass updates them twice.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

__all__ = ["keeps_statistics"]

_POWER_ITERATIONS = ("_SpectralNorm", "SpectralNorm")
"""Classes of PyTorch's two implementations of spectral norm, which update an estimate in each forward pass.

Sources: torch/nn/utils/parametrizations.py (a parametrization) and torch/nn/utils/spectral_norm.py (a hook), 2.13.
"""


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module, or one inside it, computes or updates statistics in each forward pass of a training step.

    These are batch norm, instance norm with running statistics, and spectral norm. Their mode does not count: training
    begins with `model.train()`. Statistics of other packages' modules are not known here.
    """
    return any(map(_keeps_own, module.modules()))


def _keeps_own(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, _NormBase):
        return module.track_running_stats
    return any(type(one).__name__ in _POWER_ITERATIONS for one in (module, *module._forward_pre_hooks.values()))

"""Muon for the matrices of a model, and AdamW for its other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """The groups with `use_muon` are updated by `torch.optim.Muon`, the others by `torch.optim.AdamW`.

    Both work on the groups and the state of this optimizer, so schedulers and checkpoints see one optimizer.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float = 0.95) -> None:
        """Build both optimizers for groups; `momentum` is Muon's."""
        super().__init__(params, {"lr": 1e-3, "use_muon": False})
        muon = [group for group in self.param_groups if group["use_muon"]]
        others = [group for group in self.param_groups if not group["use_muon"]]
        # With this adjustment, Muon takes AdamW's learning rate and weight decay (torch/optim/_muon.py, 2.9 to 2.13).
        self._muon = torch.optim.Muon(muon, momentum=momentum, adjust_lr_fn="match_rms_adamw") if muon else None
        self._others = torch.optim.AdamW(others) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        both: list[tuple[Any, bool]] = [(self._muon, True), (self._others, False)]
        for optimizer, is_muon in both:
            if optimizer is not None:
                optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] is is_muon]
                optimizer.state = self.state
                optimizer.step()
        return loss

"""Activation checkpointing of chosen layers: by index, or with an option for each layer from a plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.ckpt.apply import apply_options, recomputed
from memscope.strategies.ckpt.layer_plan import LayerPlan
from memscope.strategies.ckpt.layers import chosen_layers, named_layers, planned_layers
from memscope.strategies.ckpt.options import Option
from memscope.strategies.ckpt.segment import in_segments
from memscope.strategies.statistics import keeps_statistics
from memscope.workload.description import Workload
from memscope.workload.settings import setting

__all__ = ["Checkpoint"]


class Checkpoint(Strategy):
    """Drop the activations of chosen layers in the forward pass and compute them again in the backward pass.

    `ckpt:sqrt` recomputes √n segments of the n layers, each as a whole. A plan file has an option for each layer:
    recompute nothing, everything or parts of it, or offload its activations to the host. `memscope advise` writes a
    plan file for a budget.
    """

    name = "ckpt"
    stage = Stage.WRAP
    exact = True
    trains = "what the backward pass needs"
    changes = "the running statistics of batch norm, which recomputation updates again"
    provides = frozenset({"recomputation"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "↓",
        "gradient": "–",
        "optimizer_state": "–",
        "computation": "↑",
    }

    @dataclass(frozen=True)
    class Config:
        """Which layers are recomputed: `layers`, `sqrt`, `plan` or `auto`."""

        layers: str = "all"
        """Indices of the layers, counted through all lists: all, every-2 (0, 2, 4 and so on), 0-15, 3; or several,
        joined by +."""
        layer_list: str = setting("layer-list", "")
        """Names of the lists of modules that are the layers, such as transformer.h, joined by +; empty: every list of
        repeated layers."""
        sqrt: bool = False
        """One checkpoint over each of √n segments of the n layers of a list, as equal as can be (Chen et al., "Training
        Deep Nets with Sublinear Memory Cost", 2016): √n inputs are kept, and √n layers recomputed at once."""
        plan: str = ""
        """File with an option for each layer, as written by memscope advise."""
        auto: bool = False
        """Find the cheapest plan that fits the budget."""
        budget: str = ""
        """With auto: memory of the device, such as 40GB, 37.3GiB or 90%."""

        def __post_init__(self) -> None:
            if self.sqrt and (self.layers != "all" or self.plan or self.auto):
                raise ValueError("sqrt chooses the segments: leave layers, plan and auto out")
            if self.plan and (self.layers != "all" or self.layer_list):
                raise ValueError("plan names layers and their options: leave layers and layer-list out")
            if self.auto and (self.plan or self.layers != "all"):
                raise ValueError("auto chooses layers and their options: leave layers and plan out")
            if self.budget and not self.auto:
                raise ValueError("budget goes with auto: write ckpt:auto,budget=40GB")

    _plan: LayerPlan | None = None
    """The plan that was given, or that was read from the file."""

    @classmethod
    def of(cls, plan: LayerPlan, file: str = "") -> Checkpoint:
        """The strategy that applies a plan, which was saved to `file`, or is in no file."""
        strategy = cls(cls.Config(plan=file or "(not in a file)"))
        strategy._plan = plan
        return strategy

    def check(self, workload: Workload) -> list[Problem]:
        """Find that the model has no layers, lacks the chosen ones, or is not the model of the plan."""
        if self.config.auto:
            return [Problem("auto chooses nothing by itself", _HOW_TO_RESOLVE)]
        try:
            layers, _ = self._chosen(workload.model)
        except UsageError as error:
            config = self.config
            given = "sqrt" if config.sqrt else f"plan={config.plan}" if config.plan else f"layers={config.layers}"
            return [Problem(f"{given},layer-list={config.layer_list}" if config.layer_list else given, str(error))]
        return self._plan.check(workload.model, layers) if self._plan else []

    def is_exact(self, workload: Workload) -> bool:
        """Whether no batch norm is computed again: its running statistics would be updated twice."""
        if self.config.auto:
            return not any(map(keeps_statistics, named_layers(workload.model, self.config.layer_list).values()))
        layers, options = self._chosen(workload.model)
        return not any(keeps_statistics(module) for module in recomputed(layers, options))

    def apply(self, workload: Workload) -> None:
        """Wrap the forwards of the chosen layers or their parts; modules, names and weights stay unchanged.

        Raises:
            UsageError: when an option does not suit its layer, or `auto` is not resolved.
        """
        if self.config.auto:
            raise UsageError(f"ckpt: auto chooses nothing by itself: {_HOW_TO_RESOLVE}")
        layers, options = self._chosen(workload.model)
        apply_options(layers, options)
        others = self._plan.other_settings(workload.settings) if self._plan else []
        if others:
            warnings.warn(
                f"the checkpoint plan {self.config.plan} was made for other settings, so its peak and time do not "
                f"hold: {'; '.join(others)}",
                stacklevel=2,
            )

    def _chosen(self, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Option]]:
        """The model's layers and the option of each, by name and in order."""
        if self.config.plan and self._plan is None:
            self._plan = LayerPlan.load(self.config.plan)
        if self._plan is not None:
            return planned_layers(model, self._plan.layers), self._plan.options
        layers = named_layers(model, self.config.layer_list)
        if self.config.sqrt:
            return layers, in_segments(model, layers)
        modules = list(layers.values())
        chosen = {id(modules[index]) for index in chosen_layers(self.config.layers, len(layers))}
        return layers, {name: Option("full" if id(layer) in chosen else "none") for name, layer in layers.items()}


_HOW_TO_RESOLVE = "memscope advise and memscope profile replace it by the plan for a budget; or give plan=FILE"

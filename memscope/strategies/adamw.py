"""The implementation of the optimizer's step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import Optimizer

from memscope.strategies import Problem, Stage, Strategy
from memscope.workload.description import Workload
from memscope.workload.optimizer import built_by

__all__ = ["OptimizerStep"]


class OptimizerStep(Strategy):
    """Update all parameters at once (foreach), one by one, or in a fused kernel; for AdamW and similar optimizers.

    The workload's own optimizer is rebuilt with the `fused` and `foreach` flags of `torch.optim`.
    """

    name = "adamw"
    stage = Stage.OPTIM
    exact = True
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "–",
        "optimizer_state": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """The implementation to use."""

        fused: bool = False
        """One kernel updates all parameters, without temporaries; its step counters are on the device."""
        foreach: bool = True
        """Unless fused: update all parameters at once (PyTorch's default on a GPU). false: update them one by one, with
        temporaries for only one at a time."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Fused and one by one, without the implementation that the optimizer already uses."""
        optimizer = _built(workload)
        groups = optimizer.param_groups if optimizer else []
        offered = [cls.Config(fused=True), cls.Config(foreach=False)]
        return [config for config in offered if not all(_is_set_to(config, group) for group in groups)]

    def check(self, workload: Workload) -> list[Problem]:
        """Report an optimizer that lacks the implementation or cannot be rebuilt."""
        optimizer = _built(workload)
        if optimizer is None:
            return []
        name, flag, taken = type(optimizer).__name__, self._flag, _parameters_of(optimizer)
        if flag not in taken:
            return [Problem(f'the optimizer {name} has no "{flag}" argument', _instead(flag, taken))]
        lost = [key for key in taken if key not in {"params", "fused", "foreach", *optimizer.defaults}]
        if lost:
            what = f'the optimizer {name} cannot be rebuilt: its defaults do not contain "{lost[0]}"'
            return [Problem(what, f"remove this strategy and pass {flag} to the optimizer where it is built")]
        try:
            self._rebuilt(optimizer)
        except Exception as error:  # constructors raise any type; the message is theirs
            return [Problem(f"the optimizer {name} rejects {flag}: {error}", _instead(flag, taken))]
        return []

    def apply(self, workload: Workload) -> None:
        """Wrap the workload's optimizer factory."""
        build = workload.optimizer_factory
        workload.optimizer_factory = lambda parameters, model: self._rebuilt(built_by(build, parameters, model))

    @property
    def _flag(self) -> str:
        return "fused" if self.config.fused else "foreach"

    def _rebuilt(self, optimizer: Optimizer) -> Optimizer:
        kind: Any = type(optimizer)
        taken = _parameters_of(optimizer)
        flags = {"fused": self.config.fused, "foreach": self.config.foreach and not self.config.fused}
        flags = {key: value for key, value in flags.items() if key in taken}
        arguments = {key: value for key, value in optimizer.defaults.items() if key in taken}
        rebuilt: Optimizer = kind([group | flags for group in optimizer.param_groups], **arguments | flags)
        if optimizer.state:
            rebuilt.load_state_dict({**rebuilt.state_dict(), "state": optimizer.state_dict()["state"]})
        return rebuilt


def _built(workload: Workload) -> Optimizer | None:
    """The workload's optimizer; None if it cannot be built, which `Training.start` reports."""
    trainable = [parameter for parameter in workload.model.parameters() if parameter.requires_grad]
    try:
        return built_by(workload.optimizer_factory, trainable, workload.model) if trainable else None
    except Exception:
        return None


def _parameters_of(optimizer: Optimizer) -> Sequence[str]:
    return list(inspect.signature(type(optimizer)).parameters)


def _is_set_to(config: OptimizerStep.Config, group: Mapping[str, Any]) -> bool:
    """Whether a parameter group already uses `config`.

    Without either flag, PyTorch chooses (torch/optim/adam.py, `adam`, 2.13).
    """
    fused, foreach = group.get("fused"), group.get("foreach")
    if config.fused:
        return bool(fused)
    return not fused and not foreach and (fused, foreach) != (None, None)


def _instead(flag: str, taken: Sequence[str]) -> str:
    other = "choose foreach=false" if flag == "fused" and "foreach" in taken else "remove this strategy"
    return f'{other}, or train with an optimizer that has "{flag}", such as torch.optim.AdamW'

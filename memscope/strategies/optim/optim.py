"""The strategy `optim`: another optimizer, or another implementation of the same one's step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.optim.kinds import KINDS, Kind, is_real, optimizer_named
from memscope.workload.description import Workload
from memscope.workload.optimizer import built_by
from memscope.workload.settings import choice, non_defaults

__all__ = ["Optim"]

_ALLOWED = ("adamw-8bit", "paged-adamw-8bit", "adafactor")
"""The optimizers with less state that `memscope advise` tries in place of Adam's, the one most like it first."""


class Optim(Strategy):
    """Train with another optimizer, such as optim:adamw-8bit, or run the step of the same one in another way.

    A new optimizer takes over the parameter groups, and of their options those that mean the same: learning rate and
    weight decay, and between Adam and its variants the betas and epsilon. Without a name (optim:fused), the workload's
    own optimizer is rebuilt with the flags. Optimizers of bitsandbytes, torchao, galore-torch, schedulefree and
    transformers need that library; without bitsandbytes, a stand-in with the same state can be simulated.
    """

    name = "optim"
    stage = Stage.OPTIM
    exact = True
    trains = "the optimizer"
    changes = "the optimizer"
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """The optimizer and its implementation."""

        name: (
            Literal[
                "adafactor", "adagrad", "adam", "adamw", "adamw-4bit", "adamw-8bit", "adamw-fp8", "galore", "lion",
                "lion-8bit", "muon", "paged-adamw", "paged-adamw-8bit", "paged-lion", "paged-lion-8bit", "rmsprop",
                "schedulefree-adamw", "sgd", "torchao-adamw-8bit",
            ]
            | None
        ) = choice()  # fmt: skip
        """The optimizer, written alone (optim:adamw-8bit); none: the workload's own. 8bit, paged and lion are of
        bitsandbytes, 4bit, fp8 and torchao of torchao. muon and galore take the matrices between embedding and output
        layer; AdamW takes the rest."""
        fused: bool = False
        """One kernel updates all parameters, without temporaries; its step counters are on the device."""
        foreach: bool = True
        """Unless fused: update all parameters at once (PyTorch's default on a GPU). false: update them one by one, with
        temporaries for only one at a time."""
        momentum: float | None = None
        """Momentum of sgd, rmsprop and muon; none: the optimizer's default."""
        beta1: float | None = None
        """Decay of a first moment of adafactor, which has none by default."""
        embeddings: Literal[8, 32] = 8
        """Bits of the 8-bit optimizers' state of embeddings. transformers' Trainer keeps 32."""
        block: int | None = None
        """Elements that share a scale in torchao's states; none: 256, and 128 for 4 bits."""
        rank: int = 128
        """Rank of galore's projection."""
        gap: int = 200
        """Steps between two updates of galore's projection."""
        scale: float = 0.25
        """Scale of galore's update."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Fused and one by one, without the implementation in use; then, in place of Adam, optimizers with less state.

        Only the first two are exact.
        """
        optimizer = _built(workload)
        groups = optimizer.param_groups if optimizer else []
        offered = [cls.Config(fused=True), cls.Config(foreach=False)]
        found = [config for config in offered if not all(_is_set_to(config, group) for group in groups)]
        others: Any = _ALLOWED if optimizer is not None and _is_adam(optimizer) else ()
        return [*found, *(cls.Config(name) for name in others if type(optimizer).__name__ != KINDS[name].class_name)]

    def check(self, workload: Workload) -> list[Problem]:
        """Report settings that the optimizer lacks, a library that is not installed, or what cannot be rebuilt."""
        optimizer = _built(workload)
        if self.config.name is None:
            return self._unnamed_settings() or ([] if optimizer is None else self._check_rebuilding(optimizer))
        kind = KINDS[self.config.name]
        lacking = sorted(self._set - {*kind.takes})
        found = [Problem(f"{self.config.name} has no setting {key}", f"remove {key}") for key in lacking]
        counts = {"rank": self.config.rank, "gap": self.config.gap, "block": self.config.block}
        wrong = {key: count for key, count in counts.items() if count is not None and count < 1}
        found += [Problem(f"{key}={count}", "choose at least 1") for key, count in wrong.items()]
        is_simulated = not any(map(is_real, workload.model.parameters()))
        missing = kind.problem(is_simulated=is_simulated)
        if missing or found:
            return [*found, *([missing] if missing else [])]
        return self._check_rebuilding(optimizer) if optimizer and self._keeps(optimizer) else []

    def is_exact(self, workload: Workload) -> bool:
        """Whether the optimizer stays the same, and only the implementation of its step changes."""
        if self.config.name is None:
            return True
        optimizer = _built(workload)
        return optimizer is not None and self._keeps(optimizer) and self.config.momentum is None

    def apply(self, workload: Workload) -> None:
        """Wrap the workload's optimizer factory."""
        factory = workload.optimizer_factory

        def build(parameters: Sequence[nn.Parameter], model: nn.Module) -> Optimizer:
            return self._changed(built_by(factory, parameters, model), model)

        workload.optimizer_factory = build
        if self.config.name is not None:
            workload.notes = (*workload.notes, *KINDS[self.config.name].told)

    @property
    def _set(self) -> set[str]:
        """The names of the settings that differ from the defaults, but for the optimizer's."""
        return {*non_defaults(self.config)} - {"name"}

    @property
    def _flag(self) -> str:
        return "fused" if self.config.fused else "foreach"

    def _unnamed_settings(self) -> list[Problem]:
        owners = {key: [name for name, kind in KINDS.items() if key in kind.takes] for key in sorted(self._set)}
        return [
            Problem(f"{key} is a setting of {' and '.join(names)}", f"name the optimizer: optim:{names[-1]},{key}=…")
            for key, names in owners.items()
            if key not in {"fused", "foreach"}
        ]

    def _keeps(self, optimizer: Optimizer) -> bool:
        """Whether the workload's own optimizer is the one that is named."""
        if self.config.name is None:
            return True
        kind = KINDS[self.config.name]
        return "foreach" in kind.takes and type(optimizer) is getattr(torch.optim, kind.class_name, None)

    def _changed(self, optimizer: Optimizer, model: nn.Module) -> Optimizer:
        if self._keeps(optimizer):
            return self._rebuilt(optimizer)
        kind, config = KINDS[self.config.name], self.config
        settings = {**vars(config), "foreach": config.foreach and not config.fused}
        return optimizer_named(config.name, _groups(optimizer, kind), settings, model)

    def _check_rebuilding(self, optimizer: Optimizer) -> list[Problem]:
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

    def _rebuilt(self, optimizer: Optimizer) -> Optimizer:
        kind: Any = type(optimizer)
        taken = _parameters_of(optimizer)
        flags = {"fused": self.config.fused, "foreach": self.config.foreach and not self.config.fused}
        if self.config.momentum is not None:
            flags["momentum"] = self.config.momentum
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


def _groups(optimizer: Optimizer, kind: Kind) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer with what another one can take over, and what the optimizer does not know.

    Betas and epsilon mean the same in Adam and its variants only.
    """
    kept = kind.carried if _is_adam(optimizer) else kind.carried - {"betas", "eps"}
    return [
        {key: _number(value) for key, value in group.items() if key in kept or key not in optimizer.defaults}
        for group in optimizer.param_groups
    ]


def _number(value: Any) -> Any:
    """A learning rate in a tensor as a number, which every optimizer accepts."""
    return float(value) if isinstance(value, Tensor) else value


def _is_adam(optimizer: Optimizer) -> bool:
    return "adam" in type(optimizer).__name__.lower() and len(optimizer.defaults.get("betas", ())) == 2


def _parameters_of(optimizer: Optimizer) -> Sequence[str]:
    return list(inspect.signature(type(optimizer)).parameters)


def _is_set_to(config: Optim.Config, group: Mapping[str, Any]) -> bool:
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

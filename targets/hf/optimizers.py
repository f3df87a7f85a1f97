"""The optimizers of `TrainingArguments.optim`, with the parameter groups of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from memscope.errors import UsageError, nearest

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["optimizer_factory", "optimizer_named_by_trainer", "optimizer_notes"]

_ALIASES = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch"}
_NOT_SIMULATED = ("ademamix", "galore", "apollo", "lomo", "grokadamw", "stable_adamw", "schedule_free", "rmsprop_bnb")
"""Parts of the names of further optimizers of the Trainer (`OptimizerNames` in training_args.py, 5.23)."""


def optimizer_named_by_trainer(name: str, place: str) -> str:
    """The name, if the optimizer can be simulated.

    Raises:
        UsageError: it is unknown or not supported.
    """
    from memscope.strategies.optim import TRAINER_NAMES

    name = _ALIASES.get(name, name)
    if name in TRAINER_NAMES:
        return name
    if any(part in name for part in _NOT_SIMULATED):
        raise UsageError(
            f'{place}="{name}" is not supported. Choose another with --set optimizer=NAME. '
            f"Valid: {', '.join(sorted(TRAINER_NAMES))}"
        )
    raise UsageError(f'{place}="{name}": {nearest(name, TRAINER_NAMES)}')


def optimizer_notes(name: str) -> Sequence[str]:
    """What a trace with the optimizer does not show."""
    from memscope.strategies.optim import KINDS, TRAINER_NAMES

    return KINDS[TRAINER_NAMES[optimizer_named_by_trainer(name, "hf: optimizer")][0]].told


def optimizer_factory(name: str) -> Callable[[Iterable[nn.Parameter], nn.Module], Optimizer]:
    """A function that builds the optimizer from the trainable parameters of a model.

    As in the Trainer, matrices decay and vectors do not: two groups (`get_decay_parameter_names` in
    transformers/trainer.py leaves out biases and weights of norms, which are vectors).

    Raises:
        UsageError: the optimizer is unknown or not supported.
    """
    from memscope.strategies.optim import TRAINER_NAMES, optimizer_named

    kind, settings = TRAINER_NAMES[optimizer_named_by_trainer(name, "hf: optimizer")]

    def factory(parameters: Iterable[nn.Parameter], model: nn.Module) -> Optimizer:
        given = list(parameters)
        parts = [p for p in given if p.ndim > 1], [p for p in given if p.ndim <= 1]
        groups = [{"params": part, "lr": 1e-5, "weight_decay": 0.0} for part in parts if part]
        return optimizer_named(kind, groups, settings, model)

    return factory

"""The optimizers of `TrainingArguments.optim`, with the parameter groups of the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from memscope.errors import UsageError, nearest
from memscope.targets.hf.libraries import needed

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["optimizer_factory", "optimizer_named"]

_TORCH = {
    "adamw_torch": ("AdamW", {}),
    "adamw_torch_fused": ("AdamW", {"fused": True}),
    "sgd": ("SGD", {}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
}
"""Name → class of torch.optim, and its arguments (`_get_torch_optimizer` in transformers/trainer_optimizer.py)."""
_OTHER = ("adafactor",)
_QUANTIZED = ("bnb", "8bit", "4bit", "paged", "lion", "ademamix")
"""Parts of the names of optimizers of bitsandbytes and torchao."""


def optimizer_named(name: str, place: str) -> str:
    """The name, if the optimizer can be simulated.

    Raises:
        UsageError: it is unknown or not supported.
    """
    valid = (*_TORCH, *_OTHER)
    name = {"adamw_hf": "adamw_torch", "adamw": "adamw_torch"}.get(name, name)
    if name in valid:
        return name
    if any(part in name for part in _QUANTIZED):
        raise UsageError(
            f'{place}="{name}" is not supported: its states have a format of another library (bitsandbytes, torchao). '
            f"Choose another with --set optimizer=NAME. Valid: {', '.join(sorted(valid))}"
        )
    raise UsageError(f'{place}="{name}": {nearest(name, valid)}')


def optimizer_factory(name: str) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """A function that builds the optimizer from the trainable parameters.

    As in the Trainer, matrices decay and vectors do not: two groups (`get_decay_parameter_names` in
    transformers/trainer.py leaves out biases and weights of norms, which are vectors).

    Raises:
        UsageError: the optimizer is unknown or not supported.
    """
    name = optimizer_named(name, "hf: optimizer")

    def factory(parameters: Iterable[nn.Parameter]) -> Optimizer:
        given = list(parameters)
        decayed, plain = [p for p in given if p.ndim > 1], [p for p in given if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.0}, {"params": plain, "weight_decay": 0.0}]
        return _built([group for group in groups if group["params"]], name)

    return factory


def _built(groups: list[dict[str, Any]], name: str) -> Optimizer:
    import torch

    if name == "adafactor":
        adafactor: Any = needed("transformers").Adafactor
        return adafactor(groups, lr=1e-3, scale_parameter=False, relative_step=False)  # type: ignore[no-any-return]
    kind, arguments = _TORCH[name]
    optimizer: Optimizer = getattr(torch.optim, kind)(groups, lr=1e-5, **arguments)
    return optimizer

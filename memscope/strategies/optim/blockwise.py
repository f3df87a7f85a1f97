"""What stands in for bitsandbytes' optimizers in a simulation where bitsandbytes is not installed.

It makes the same state as version 0.50.2 (bitsandbytes/optim/optimizer.py), by the same operators in the same order,
and one operator in place of its kernels, which take no memory of PyTorch's allocator (backends/cuda/ops.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memscope.errors import UsageError

__all__ = ["STANDS_IN", "BlockwiseOptimizer"]

STANDS_IN = (
    "bitsandbytes is not installed: a stand-in made the state of version 0.50.2. It leaves out the arithmetic of the "
    "update, so it cannot train; pip install bitsandbytes"
)
"""The note of a simulation that used the stand-in."""

_BLOCK = 256
"""Elements that share a scale (`init_state`)."""
_LEAST_8BIT = 4096
"""Elements below which a state stays in float32 (`min_8bit_size`)."""
_LEAST_PAGED = 100_000
"""Elements below which a state is not paged (`get_state_buffer`)."""
_CODES = 256
"""Values that 8 bits can have: those of a code book, in float32 (`create_dynamic_map`)."""


class BlockwiseOptimizer(Optimizer):
    """An optimizer with one or two states of 8 or 32 bits per parameter, which may be paged."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        states: int,
        bits: int,
        is_paged: bool,
        in_32_bits: Collection[int] = (),
    ) -> None:
        """Prepare to make states.

        Args:
            params: parameters or groups.
            states: tensors of state per parameter: 2 for Adam, 1 for Lion.
            bits: bits of an element of a state, 8 or 32.
            is_paged: whether large states are in managed memory.
            in_32_bits: ids of parameters whose states have 32 bits.
        """
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.0})
        self.is_paged = is_paged
        self._bits, self._in_32_bits = bits, frozenset(in_32_bits)
        self._numbers = range(1, states + 1)
        self._codes = {number: torch.zeros(_CODES) for number in self._numbers} if bits == 8 else {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make the state of each parameter that has a gradient, and pass it to the operator.

        Raises:
            UsageError: a parameter has values, which this class cannot update.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter)
        return loss

    def _update(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        parameter.data = parameter.data.contiguous()
        parameter.grad = parameter.grad.contiguous()  # type: ignore[union-attr]
        state["step"] += 1
        changed = [state[f"{key}{n}"] for key in ("state", "absmax") for n in self._numbers if f"{key}{n}" in state]
        _update()(parameter, changed, parameter.grad)

    def _begin(self, parameter: Tensor, state: dict[str, Any]) -> None:
        is_small = parameter.numel() < _LEAST_8BIT or id(parameter) in self._in_32_bits
        dtype = torch.uint8 if self._bits == 8 and not is_small else torch.float32
        state["step"] = 0
        for number in self._numbers:
            state[f"state{number}"] = self._buffer(parameter, dtype)
        for number in self._numbers if dtype is torch.uint8 else ():
            blocks = -(-parameter.numel() // _BLOCK)
            state[f"absmax{number}"] = torch.zeros((blocks,), dtype=torch.float32, device=parameter.device)
            state[f"qmap{number}"] = self._codes[number]

    def _buffer(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        if self.is_paged and parameter.numel() >= _LEAST_PAGED:
            return self.get_paged(*parameter.shape, dtype=dtype, device=parameter.device)
        return torch.zeros_like(parameter, dtype=dtype)

    @staticmethod
    def get_paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A state that may be paged. Without a GPU it is not, as in bitsandbytes; a simulated GPU replaces this."""
        return torch.zeros(shape, dtype=dtype, device=device)


@cache
def _update() -> Any:
    """The operator that stands for a kernel: it reads gradients, and changes parameters and states."""

    @torch.library.custom_op("memscope::blockwise_update", mutates_args=("parameter", "states"))
    def update(parameter: Tensor, states: list[Tensor], gradient: Tensor) -> None:
        raise UsageError("bitsandbytes is not installed, and its stand-in cannot train: pip install bitsandbytes")

    update.register_fake(lambda parameter, states, gradient: None)
    return update

"""flash_attn.ops.triton.layer_norm: layer norm and RMS norm, with a residual added, as one kernel.

The time of the kernel is not estimated. Source: flash_attn/ops/triton/layer_norm.py of flash-attention 2.8.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages.signatures import with_parameters
from memscope.simulation.refusal import NotSimulated

__all__ = ["layer_norms"]

_REFUSED: dict[str, Any] = {
    "x1": None, "weight1": None, "bias1": None, "rowscale": None, "return_dropout_mask": False, "out": None,
    "residual_out": None,
}  # fmt: skip
"""Options that only have their default value here: of parallel residuals, and for results that the caller makes."""


class _Options(NamedTuple):
    dropout_p: float
    prenorm: bool
    residual_dtype: torch.dtype | None
    out_dtype: torch.dtype | None
    is_rms_norm: bool
    programs: int
    """Programs of the backward kernel, each with gradients of the weights of its own."""


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, options: _Options
    ) -> Any:
        rows = _rows(x)
        out = torch.empty_like(rows, dtype=options.out_dtype or x.dtype)
        added = rows
        dtype = x.dtype if options.residual_dtype is None else options.residual_dtype
        if residual is not None or dtype != x.dtype or options.dropout_p > 0:
            added = torch.empty_like(rows, dtype=dtype)
        mean = None if options.is_rms_norm else rows.new_empty(len(rows), dtype=torch.float32)
        rstd = rows.new_empty(len(rows), dtype=torch.float32)
        seeds = rows.new_empty(len(rows), dtype=torch.int64) if options.dropout_p > 0 else None
        weight = weight.contiguous()
        ctx.save_for_backward(added, weight, bias if bias is None else bias.contiguous(), seeds, mean, rstd)
        ctx.options, ctx.shape, ctx.dtype, ctx.adds = options, x.shape, x.dtype, residual is not None
        result = out.reshape(x.shape)
        return (result, added.reshape(x.shape)) if options.prenorm else result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        added, weight, bias, *_ = ctx.saved_tensors
        rows, _residual = _rows(grads[0]), _rows(grads[1]) if ctx.options.prenorm else None
        width = rows.shape[-1]
        grad = added.new_empty(added.shape, dtype=ctx.dtype)
        alone = ctx.adds and (ctx.dtype != added.dtype or ctx.options.dropout_p > 0)
        grad_residual = torch.empty_like(added) if alone else grad
        parts = [
            weight.new_empty((ctx.options.programs, width), dtype=torch.float32)
            for one in (weight, bias)
            if one is not None
        ]
        summed = [part.sum(0).to(one.dtype) for part, one in zip(parts, (weight, bias), strict=False)]
        return (
            grad.reshape(ctx.shape),
            summed[0],
            summed[1] if bias is not None else None,
            grad_residual.reshape(ctx.shape) if ctx.adds else None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """The tensor as a matrix `[tokens, width]` with dense rows."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(programs: int, name: str, given: Mapping[str, Any]) -> Any:
    for option, default in _REFUSED.items():
        if given[option] is not default:
            raise NotSimulated(f"flash_attn's {name}: {option} is not simulated. Leave it out, or use torch.nn")
    x, residual = given["x"], given["residual"]
    if x.shape[-1] * x.element_size() > 65_536:
        raise NotSimulated(f"flash_attn's {name} takes rows of at most 64 KiB, and got {x.shape[-1]} values")
    kept = residual.dtype if residual is not None else torch.float32 if given["residual_in_fp32"] else None
    options = _Options(
        given["dropout_p"], given["prenorm"], kept, given["out_dtype"], given.get("is_rms_norm", True), programs
    )
    return _Norm.apply(x, given["weight"], given["bias"], residual, options)  # type: ignore[no-untyped-call]


class _RMSNorm(nn.Module):
    """RMS norm as a module."""

    run: Callable[..., Any]
    """rms_norm_fn."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        fill = torch.zeros if zero_centered_weight else torch.ones
        self.weight = nn.Parameter(fill(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """The normalized sum of `x` and `residual`; and the sum if `prenorm` is true."""
        return type(self).run(
            x,
            self.weight,
            None,
            residual=residual,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
        )


def layer_norms(device: Device) -> dict[str, Any]:
    """Functions and modules by name. The number of multiprocessors decides the temporaries of the backward pass."""
    options = {
        "residual": None, "x1": None, "weight1": None, "bias1": None, "eps": 1e-6, "dropout_p": 0.0, "rowscale": None,
        "prenorm": False, "residual_in_fp32": False, "zero_centered_weight": False, "is_rms_norm": False,
        "return_dropout_mask": False, "out_dtype": None, "out": None, "residual_out": None,
    }  # fmt: skip
    of_rms = {name: value for name, value in options.items() if name != "is_rms_norm"}
    functions = {
        name: with_parameters(name, ("x", "weight", "bias"), taken, partial(_run, 8 * device.multiprocessors, name))
        for name, taken in (("layer_norm_fn", options), ("rms_norm_fn", of_rms))
    }
    return {**functions, "RMSNorm": type("RMSNorm", (_RMSNorm,), {"run": staticmethod(functions["rms_norm_fn"])})}

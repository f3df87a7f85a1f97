"""Results of real kernels that differ from those of fake tensors: larger storages, other dtypes, another order.

`FakeTensorMode` gets shapes right. A storage that keeps the size of an intermediate result, or a tensor that stays on
the host, matters only when memory is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memscope.simulation.refusal import NotSimulated

__all__ = ["OWN_ORDER", "ctc_loss", "results"]

aten = torch.ops.aten
ResultKernel = Callable[..., Any]


def results(*, on_gpu: bool) -> Mapping[Any, ResultKernel]:
    """Return, by operator, the function to call in its place on fake tensors, with the same arguments.

    Args:
        on_gpu: whether the fake tensors stand for GPU tensors.
    """
    return {**_ANYWHERE, **(_ON_GPU if on_gpu else _ON_CPU)}


def _keeps_size_of_input(operator: Any) -> ResultKernel:
    """A loss of one number, in a storage as large as all losses.

    The kernel allocates the storage for the losses and then resizes it to the shape `[]`, which frees nothing.

    Source: the meta functions of mse_loss and smooth_l1_loss and soft_margin_loss_out in
    aten/src/ATen/native/Loss.cpp, binary_cross_entropy_out_cpu there and binary_cross_entropy_out_cuda in cuda/Loss.cu;
    a revision after 2.5 and one after 2.9.
    """
    names = [argument.name for argument in operator._schema.arguments]

    def loss(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("reduction", 1) == 0:  # at::Reduction::None
            return operator(*args, **kwargs)
        values, target = given["self"], given["target"]
        shape = torch.broadcast_shapes(values.shape, target.shape)
        return torch.empty(shape, dtype=torch.result_type(values, target)).as_strided((), ())

    return loss


def _statistics_in_float32(operator: Any) -> ResultKernel:
    """A norm that keeps its mean and inverse deviation in float32, even for an input of 16 bits.

    Source: layer_norm_cuda in
    aten/src/ATen/native/cuda/layer_norm_kernel.cu, batch_norm_cuda in cuda/Normalization.cu (2.6 to 2.15).
    """

    def norm(*args: Any, **kwargs: Any) -> Any:
        output, *statistics = operator(*args, **kwargs)
        return output, *(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in statistics)

    return norm


def _layer_norm_on_cpu(values: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Any:
    """Layer norm that keeps its mean and inverse deviation in the dtype of its weights.

    Source: `layer_norm_cpu` in aten/src/ATen/native/layer_norm.cpp and `param_scalar_type` in cpu/mixed_data_type.h
    (2.6 to 2.13).
    """
    output, *statistics = aten.native_layer_norm.default(values, shape, weight, bias, epsilon)
    given = next((one.dtype for one in (weight, bias) if one is not None), values.dtype)
    return output, *(one.to(given) for one in statistics)


def _sparse(*args: Any, **kwargs: Any) -> Any:
    raise NotSimulated(
        "sparse tensors, such as the gradient of nn.Embedding(sparse=True), cannot be simulated: their size after "
        "equal indices are merged depends on values. Remove sparse=True, or record a real run"
    )


def _lstm(*args: Any, **kwargs: Any) -> Any:
    raise NotSimulated(
        "nn.LSTM cannot be simulated on a CPU: only oneDNN knows the size of the workspace that its layer keeps "
        "for the backward pass, and the fake kernel has none. Use nn.LSTMCell, or record a real run: --device cpu"
    )


def _log_softmax_gradient(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    """A gradient without gaps, in the order of its dimensions; that of the fake kernel has the strides of `grad`.

    Source: TORCH_META_FUNC(log_softmax_backward_data) in aten/src/ATen/native/SoftMax.cpp (2.6 to 2.13).
    """
    return torch.empty(grad.size(), dtype=input_dtype)


def _layer_norm_gradients(*args: Any) -> Any:
    """Gradients of layer norm, that of its input without gaps; in the fake kernel it has the strides of its argument.

    Source: layer_norm_backward_cpu in aten/src/ATen/native/layer_norm.cpp, layer_norm_backward_cuda in
    cuda/layer_norm_kernel.cu (2.6 to 2.13): LEGACY_CONTIGUOUS_MEMORY_FORMAT.
    """
    of_input, *of_weights = aten.native_layer_norm_backward.default(*args)
    if of_input is not None and not of_input.is_contiguous():
        of_input = of_input.new_empty(of_input.size())
    return of_input, *of_weights


def ctc_loss(log_probs: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The losses of a batch, and the logarithms of alpha that are kept for the backward pass; there is no fake kernel.

    Source: ctc_loss_gpu_template in aten/src/ATen/native/cuda/LossCTC.cu (revisions before and after 2.0).

    Args:
        log_probs: `[input length, batch, labels]`.
        longest: length of the longest target.
    """
    steps, batch, _ = log_probs.shape
    return log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 2 * longest + 1)


def _histogram(values: Tensor, bins: int = 100, *bounds: float, **named: float) -> Tensor:
    """Counts of the input's dtype. A CPU has no kernel for integers, and the fake kernel refuses them there.

    Source: _histc_cuda in aten/src/ATen/native/cuda/SummaryOps.cu (2.6 to 2.13).
    """
    return torch.empty(bins, dtype=values.dtype)


def _grouped_product(
    first: Tensor, second: Tensor, offsets: Tensor | None = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """The products of groups of rows or columns, as in layers of experts; each row of the result is padded to 16 bytes.

    The meta function takes bfloat16 only, and pads only in a build with CUDA; the kernels take any dtype. Source:
    create_grouped_gemm_output_tensor in aten/src/ATen/native/GroupedMMUtils.h, 2.9 to 2.13.
    """
    size = [first.shape[-2], second.shape[-1]]
    if first.ndim == second.ndim:
        size = [first.shape[0] if offsets is None or first.ndim == 3 else len(offsets), *size]
    dtype = out_dtype or first.dtype
    elements = 16 // dtype.itemsize
    padded = -(-size[-1] // elements) * elements
    return torch.empty_strided(size, [size[-2] * padded, padded, 1][-len(size) :], dtype=dtype)


Order = tuple[int, ...]


def _seed_and_offset_on_host(arguments: Mapping[str, Any], torch_version: tuple[int, int]) -> Order:
    """Order of the results of memory-efficient attention, which keeps seed and offset on the host.

    Since pytorch/pytorch pull request 184166, without dropout, they are on the GPU and are created first. The first
    release with this change is unknown and assumed to be 2.14. Source: _efficient_attention_forward in
    aten/src/ATen/native/transformers/cuda/attention.cu, revisions around 2.11 and after 2.15.
    """
    on_host = bool(arguments.get("dropout_p", 0.0)) or torch_version < (2, 14)
    return (0, 1) if on_host else (2, 3, 0, 1)


OWN_ORDER: Mapping[str, Callable[[Mapping[str, Any], tuple[int, int]], Order]] = {
    # dropout_cuda in aten/src/ATen/native/cuda/Dropout.cu, 2.6 to 2.15: first the mask, then the result
    "aten.native_dropout.default": lambda arguments, torch_version: (1, 0),
    # ctc_loss_gpu_template in aten/src/ATen/native/cuda/LossCTC.cu: first log alpha
    "aten._ctc_loss.Tensor": lambda arguments, torch_version: (1, 0),
    # _cudnn_attention_forward in attention.cu and run_cudnn_SDP_fprop in aten/src/ATen/native/cudnn/MHA.cpp, revisions
    # of 2.9 to 2.15: first seed and offset, then the result and the log-sum-exp
    "aten._scaled_dot_product_cudnn_attention.default": lambda arguments, torch_version: (6, 7, 0, 1),
    "aten._scaled_dot_product_efficient_attention.default": _seed_and_offset_on_host,
}
"""Operator → function of its arguments and PyTorch's version that returns the results made on a GPU, in order."""


def _waits() -> Mapping[Any, ResultKernel]:
    """Waiting for a collective returns its own argument. The meta function makes another tensor.

    Source: wait_tensor in torch/csrc/distributed/c10d/Functional.cpp, `_wait_tensor_meta` in
    torch/distributed/_functional_collectives.py (2.13).
    """
    if not torch.distributed.is_available():
        return {}
    return {torch.ops._c10d_functional.wait_tensor.default: lambda tensor: tensor}


_ANYWHERE: Mapping[Any, ResultKernel] = {
    **{
        operator: _keeps_size_of_input(operator)
        for operator in (
            aten.mse_loss.default,
            aten.smooth_l1_loss.default,
            aten.binary_cross_entropy.default,
            aten.soft_margin_loss.default,
        )
    },
    **_waits(),
    aten.native_layer_norm_backward.default: _layer_norm_gradients,
    aten._log_softmax_backward_data.default: _log_softmax_gradient,
    aten._ctc_loss_backward.Tensor: lambda grad, log_probs, *_, **named: log_probs.new_empty(log_probs.size()),
    **({aten._grouped_mm.default: _grouped_product} if hasattr(aten, "_grouped_mm") else {}),
    aten._sparse_coo_tensor_with_dims_and_tensors.default: _sparse,
    aten.mkldnn_rnn_layer.default: _lstm,
}
_ON_CPU: Mapping[Any, ResultKernel] = {aten.native_layer_norm.default: _layer_norm_on_cpu}

_ON_GPU: Mapping[Any, ResultKernel] = {
    operator: _statistics_in_float32(operator)
    for operator in (aten.native_layer_norm.default, aten.native_batch_norm.default)
} | {aten.histc.default: _histogram}

"""CUDA's autocast policy, on tensors that stand for CUDA tensors.

A simulation traces CPU tensors, and autocast on the CPU casts other operators than on CUDA: on CUDA, softmax, pow,
rsqrt, norms, sums and losses run in float32; on the CPU, most of them do not. During a simulation, the operators that
differ get CUDA's policy, registered under the `AutocastCPU` key. Operators with the same policy on both keep PyTorch's
own kernel and its cache of cast weights.

The lists below are those of `AT_FORALL_LOWER_PRECISION_FP`, `AT_FORALL_FP32`, `AT_FORALL_FP32_SET_OPT_DTYPE`,
`AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE` and `AT_FORALL_PROMOTE` in aten/src/ATen/autocast_mode.h, and of the
`Autocast` block in aten/src/ATen/autocast_mode.cpp (PyTorch 2.13). A test compares them with the kernels registered in
the installed PyTorch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["cuda_autocast_policy", "policies"]

_SAME_ON_CPU = """_convolution.deprecated addbmm addmm baddbmm bmm conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input linalg_matrix_sqrth linalg_vecdot linear matmul mm prelu
    scaled_dot_product_attention
    binary_cross_entropy_with_logits cdist cosine_embedding_loss hinge_embedding_loss huber_loss kl_div l1_loss
    margin_ranking_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d poisson_nll_loss
    smooth_l1_loss soft_margin_loss triplet_margin_loss"""
_LOWER_PRECISION = """_convolution _cudnn_rnn _scaled_dot_product_flash_attention _thnn_fused_gru_cell
    _thnn_fused_lstm_cell addmv addr chain_matmul convolution cudnn_convolution cudnn_convolution_transpose einsum
    gru_cell linalg_multi_dot lstm_cell mv rnn_relu_cell rnn_tanh_cell"""
_FLOAT32 = """_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d acos asin cosh cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm
    layer_norm log log10 log1p log2 logsumexp native_layer_norm nuclear_norm nuclear_norm.dim pdist pow.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm rms_norm rsqrt sinh softplus tan upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    upsample_trilinear3d"""
_FLOAT32_OUTPUT = """cumprod cumprod.dimname cumsum cumsum.dimname linalg_matrix_norm linalg_matrix_norm.str_ord
    linalg_vector_norm log_softmax.Dimname log_softmax.int prod prod.dim_Dimname prod.dim_int softmax.Dimname
    softmax.int sum sum.dim_DimnameList sum.dim_IntList"""
_FLOAT32_APPENDED = {
    "norm.Scalar": "norm.ScalarOpt_dtype",
    "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype",
    "norm.names_ScalarOpt_dim": "norm.names_ScalarOpt_dim_dtype",
}
_WIDEST = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot"
_BANNED = "binary_cross_entropy"

AutocastKernel = Callable[..., Any]


def policies() -> dict[str, str]:
    """Return the policy of each operator that CUDA's autocast handles.

    A policy is one of `same`, `lower`, `float32`, `output`, `append`, `widest`, `banned`.
    """
    lists = {
        "same": _SAME_ON_CPU,
        "lower": _LOWER_PRECISION,
        "float32": _FLOAT32,
        "output": _FLOAT32_OUTPUT,
        "append": " ".join(_FLOAT32_APPENDED),
        "widest": _WIDEST,
        "banned": _BANNED,
    }
    return {name: policy for policy, names in lists.items() for name in names.split()}


def registered(key: str) -> set[str]:
    """Return the names of the aten operators that have a kernel for a dispatch key in the installed PyTorch."""
    names: list[str] = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name[6:] for name in names if name.startswith("aten::")}


@contextlib.contextmanager
def cuda_autocast_policy() -> Iterator[None]:
    """Make autocast on the CPU follow CUDA's policy, and `torch.autocast("cuda")` enable it, inside the context."""
    weights = _CastWeights()
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # these kernels override others on purpose
            for name, kernel in _kernels(weights):
                library.impl(name, kernel, "AutocastCPU")
        with _autocast_cuda_means_cpu(), weights.cleared_with_autocast():
            yield
    finally:
        library._destroy()


def _kernels(weights: _CastWeights) -> Iterator[tuple[str, AutocastKernel]]:
    on_cuda, on_cpu = registered("AutocastCUDA"), registered("AutocastCPU")
    for name, policy in policies().items():
        if name in on_cuda and policy != "same":
            yield name, _kernel(_overload(name), policy, weights)
    for name in on_cpu - on_cuda:
        yield name, torch.library.fallthrough_kernel


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _kernel(op: Any, policy: str, weights: _CastWeights) -> AutocastKernel:
    if policy == "append":
        target = _overload(_FLOAT32_APPENDED[op._schema.name[6:] + "." + op._schema.overload_name])
        return lambda *args, **kwargs: _below_autocast(target, (*args, *_float32_of(args[0])), kwargs)
    if policy == "output":
        return lambda *args, **kwargs: _below_autocast(op, args, _with_float32_output(op, args, kwargs))
    if policy == "banned":
        return _banned
    if policy == "widest":
        return lambda *args, **kwargs: _below_autocast(
            op, *_cast((args, kwargs), lambda t: t.to(_widest((args, kwargs))))
        )
    if policy == "float32":
        return lambda *args, **kwargs: _below_autocast(op, *_cast((args, kwargs), lambda t: t.to(torch.float32)))
    return lambda *args, **kwargs: _below_autocast(op, *_cast((args, kwargs), weights.lower))


def _below_autocast(op: Any, args: Any, kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return op(*args, **kwargs)


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def _cast(arguments: Any, to: Callable[[Tensor], Tensor]) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)):
        return pytree.tree_map_only(Tensor, lambda t: to(t) if _eligible(t) else t, arguments)


def _widest(arguments: Any) -> torch.dtype:
    wide = any(_eligible(leaf) and leaf.dtype is torch.float32 for leaf in pytree.tree_leaves(arguments))
    return torch.float32 if wide else torch.get_autocast_dtype("cpu")


def _float32_of(first: Tensor) -> tuple[torch.dtype]:
    return (torch.float32 if _eligible(first) else first.dtype,)


def _with_float32_output(op: Any, args: Any, kwargs: Any) -> Any:
    position = next(i for i, argument in enumerate(op._schema.arguments) if argument.name == "dtype")
    given = args[position] if len(args) > position else kwargs.get("dtype")
    return (
        {**kwargs, "dtype": torch.float32} if given is None and _eligible(args[0]) and len(args) <= position else kwargs
    )


def _banned(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "binary_cross_entropy and BCELoss are unsafe under CUDA autocast, and PyTorch refuses them: "
        "use binary_cross_entropy_with_logits"
    )


class _CastWeights:
    """Casts of float32 weights, kept until autocast ends, as in PyTorch's own cache.

    Source: `cached_cast` in aten/src/ATen/autocast_mode.cpp. In inference mode, 2.6 keeps the casts, 2.11 and 2.13 do
    not (observed on a CPU, and with 2.11 on a GPU). Releases between 2.6 and 2.11 were not tried and are treated as
    2.6.
    """

    def __init__(self) -> None:
        self._casts: Any = WeakTensorKeyDictionary()

    def lower(self, tensor: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu")
        if tensor.dtype is dtype:
            return tensor
        keep = tensor.dtype is torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
        if torch.__version__ >= (2, 11):  # type: ignore[operator]
            keep = keep and not torch.is_inference_mode_enabled()
        if not (keep and torch.is_autocast_cache_enabled()):
            return tensor.to(dtype)
        if tensor not in self._casts:
            self._casts[tensor] = tensor.to(dtype)
        return self._casts[tensor]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def cleared_with_autocast(self) -> Iterator[None]:
        clear = torch.clear_autocast_cache

        def clear_both() -> None:
            self._casts.clear()
            clear()

        torch.clear_autocast_cache = clear_both
        try:
            yield
        finally:
            torch.clear_autocast_cache = clear


@contextlib.contextmanager
def _autocast_cuda_means_cpu() -> Iterator[None]:
    """Make `torch.autocast("cuda")` act on the stand-ins, and queries of its state and dtype report it."""
    initialize, is_enabled, dtype_of = torch.autocast.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype

    def on_standin(self: Any, device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or dtype_of("cuda")
        initialize(self, device_type, dtype, *args, **kwargs)

    def enabled(device_type: str = "cuda") -> bool:
        return is_enabled("cpu" if device_type == "cuda" else device_type)

    def autocast_dtype(device_type: str = "cuda") -> torch.dtype:
        return dtype_of("cpu" if device_type == "cuda" and is_enabled("cpu") else device_type)

    replacements: dict[tuple[Any, str], Callable[..., Any]] = {
        (torch.autocast, "__init__"): on_standin,
        (torch, "is_autocast_enabled"): enabled,
        (torch, "get_autocast_dtype"): autocast_dtype,
        (torch, "get_autocast_gpu_dtype"): autocast_dtype,
    }
    before = {(owner, name): vars(owner)[name] for owner, name in replacements}
    try:
        for (owner, name), function in replacements.items():
            setattr(owner, name, function)
        yield
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)

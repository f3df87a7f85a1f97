"""PyTorch's behavior on CUDA that differs from the CPU, applied to tensors that stand for CUDA tensors.

A simulation runs fake CPU tensors: fake CUDA tensors abort a CPU build, and their backward pass needs a GPU even in a
CUDA build. Inside `cuda_semantics`, PyTorch treats those tensors as it treats CUDA tensors; each difference has its
source here. PyTorch is restored when the context is left, also by an exception.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as torch_optimizer
from torch.utils import _foreach_utils

from memscope.simulation.cuda.attention import AttentionCall, Platform, scaled_dot_product_attention
from memscope.simulation.cuda.autocast import cuda_autocast_policy
from memscope.simulation.facade.stand_in import replaced
from memscope.simulation.refusal import NotSimulated

__all__ = ["cuda_semantics", "fake_tensors_use_foreach"]

aten = torch.ops.aten


@contextlib.contextmanager
def cuda_semantics(capability: tuple[int, int]) -> Iterator[None]:
    """Treat CPU tensors as CUDA tensors of a GPU with the compute capability `(major, minor)`."""
    with cuda_autocast_policy(), _gpu_kernels(Platform.at_hand(capability)), _optimizers_of_a_gpu():
        yield


@contextlib.contextmanager
def fake_tensors_use_foreach() -> Iterator[None]:
    """Let fake tensors use foreach kernels, which PyTorch allows only for exact `Tensor` and `Parameter`.

    Source: `_foreach_supported_types` in torch/utils/_foreach_utils.py and torch/optim/optimizer.py (2.6 to 2.13).
    """
    lists: list[list[Any]] = [_foreach_utils._foreach_supported_types, torch_optimizer._foreach_supported_types]
    for supported in lists:
        supported.append(FakeTensor)
    try:
        yield
    finally:
        for supported in lists:
            supported.remove(FakeTensor)


@contextlib.contextmanager
def _optimizers_of_a_gpu() -> Iterator[None]:
    """Let optimizers default to their foreach implementation, and be capturable.

    The foreach implementation makes temporaries as large as the tensors it updates. A capturable optimizer keeps its
    step counters on the device. Source: the queries for supported devices in `_default_to_fused_or_foreach` of
    torch/optim/optimizer.py (2.6 to 2.13) and in each optimizer's module (2.13). Every module has its own name for the
    functions, so they are replaced in each.
    """
    with contextlib.ExitStack() as scopes:
        for name in ("_get_foreach_kernels_supported_devices", "_get_capturable_supported_devices"):
            asked = [m for key, m in sys.modules.items() if key.startswith("torch.optim.") and hasattr(m, name)]
            for module in asked:
                scopes.enter_context(replaced(module, name, _and_cpu(getattr(module, name))))
        yield


def _and_cpu(supported: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [*supported(*args, **kwargs), "cpu"]


@contextlib.contextmanager
def _gpu_kernels(platform: Platform) -> Iterator[None]:
    kernels: dict[str, Callable[..., Any]] = {"dropout": _dropout, "scaled_dot_product_attention": _attention(platform)}
    kernels |= {
        f"{rnn}.{batches}": _refused_rnn
        for rnn in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for batches in ("input", "data")
    }
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # these kernels override others on purpose
            for name, kernel in kernels.items():
                for key in ("AutogradCPU", "CPU"):
                    library.impl(name, kernel, key)
            for name, kernel in _fused_rms_norm().items():
                library.impl(name, kernel, "CPU")
        yield
    finally:
        library._destroy()


def _attention(platform: Platform) -> Callable[..., Tensor]:
    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return scaled_dot_product_attention(platform, call)

    return kernel


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Dropout as one kernel, which keeps a mask of one byte per element.

    Source: `is_fused_kernel_acceptable`, aten/src/ATen/native/Dropout.cpp (2.0 to 2.13).
    """
    if train and 0 < p < 1 and tensor.numel() > 0:
        return aten.native_dropout(tensor, p, train)[0]  # type: ignore[no-any-return]
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    return tensor * tensor.new_zeros(())  # p == 1


def _fused_rms_norm() -> dict[str, Callable[..., Any]]:
    """RMS norm as one kernel, which keeps its input, its weight and each row's inverse root mean square, in float32.

    Where the device has a kernel, autograd differentiates the operator by a formula of its own; where it has none, as
    on a CPU, PyTorch decomposes the operator. Source: `rms_norm_symint` in aten/src/ATen/native/layer_norm.cpp and
    `_fused_rms_norm_cuda` in cuda/layer_norm_kernel.cu, revisions after 2.9 and 2.15; PyTorch before 2.9 has no such
    kernel.
    """
    names = ("_fused_rms_norm", "_fused_rms_norm_backward")
    if not all(hasattr(aten, name) for name in names):
        return {}
    return {name: decomposition_table[getattr(aten, name).default] for name in names}


def _refused_rnn(*args: Any) -> Any:
    raise NotSimulated(
        "cuDNN runs nn.LSTM, nn.GRU and nn.RNN on a GPU, and only cuDNN knows the size of the reserve space it keeps "
        "for the backward pass. Record a real run with --device cuda, or use nn.LSTMCell or nn.GRUCell"
    )

"""What PyTorch does differently on CUDA, on tensors that stand for CUDA tensors.

A simulation runs fake CPU tensors (fake CUDA tensors abort a CPU build, and their backward needs a GPU even in a CUDA
build). Inside `cuda_semantics` those tensors are treated as PyTorch treats CUDA tensors; each difference has its source
here. On leaving, also by an exception, everything is as it was.
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
    """CPU tensors are treated as CUDA tensors of a GPU with the compute capability `(major, minor)`."""
    with cuda_autocast_policy(), _gpu_kernels(Platform.at_hand(capability)), _optimizers_of_a_gpu():
        yield


@contextlib.contextmanager
def fake_tensors_use_foreach() -> Iterator[None]:
    """PyTorch lets only exact `Tensor` and `Parameter` use foreach kernels; a fake one stands for such.

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
    """Optimizers take their foreach implementation by default, and may be capturable.

    Foreach has temporaries as large as what it updates; a capturable optimizer keeps its step counters on the device.
    Source: what `_default_to_fused_or_foreach` in torch/optim/optimizer.py (2.6 to 2.13) and each optimizer's module
    (2.13) ask about the device; each looks the function up among its own names.
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
            warnings.simplefilter("ignore", UserWarning)  # that these kernels override others is the purpose
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
    """One kernel that keeps a one-byte mask.

    Source: `is_fused_kernel_acceptable`, aten/src/ATen/native/Dropout.cpp (2.0 to 2.13).
    """
    if train and 0 < p < 1 and tensor.numel() > 0:
        return aten.native_dropout(tensor, p, train)[0]  # type: ignore[no-any-return]
    if p == 0 or not train or tensor.numel() == 0:
        return tensor
    return tensor * tensor.new_zeros(())  # p == 1


def _fused_rms_norm() -> dict[str, Callable[..., Any]]:
    """One kernel, which keeps its input, its weight and the inverse root mean square of each row, in float32.

    With a kernel for their device autograd takes the operators whole, by its own formula; without one, as on a CPU, it
    takes them apart. Source: `rms_norm_symint` in aten/src/ATen/native/layer_norm.cpp and `_fused_rms_norm_cuda` in
    cuda/layer_norm_kernel.cu, revisions after 2.9 and 2.15; PyTorch before 2.9 has no such kernel.
    """
    names = ("_fused_rms_norm", "_fused_rms_norm_backward")
    if not all(hasattr(aten, name) for name in names):
        return {}
    return {name: decomposition_table[getattr(aten, name).default] for name in names}


def _refused_rnn(*args: Any) -> Any:
    raise NotSimulated(
        "nn.LSTM, nn.GRU and nn.RNN are run by cuDNN on a GPU, and what cuDNN keeps for the backward pass "
        "(its reserve space) only cuDNN can say. Record a real run: --device cuda, or simulate --device cpu"
    )

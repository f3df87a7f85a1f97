"""The attention kernel that CUDA chooses, by GPU, by version of PyTorch and of cuDNN, and by arguments.

Expected: the conditions in sdp_utils.cpp of the versions named in `memscope/simulation/attention.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from memscope import Workload, simulate
from memscope.simulation.cuda.attention import AttentionCall, Platform, scaled_dot_product_attention
from memscope.trace import PHASES

H100 = Platform((9, 0), (2, 13), 92000)
A100 = H100._replace(capability=(8, 0))


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append((func.__name__.partition(".")[0], out))
        return out


def run(platform, *, heads=4, kv_heads=None, queries=32, keys=None, size=64, dtype=torch.bfloat16, mask=None, **how):
    """Names of the operators that one attention runs, and the last results of each."""
    with FakeTensorMode(), Calls() as calls:
        query = torch.ones(2, heads, queries, size, dtype=dtype, requires_grad=how.pop("grad", True))
        key = torch.ones(2, kv_heads or heads, keys or queries, size, dtype=dtype)
        scaled_dot_product_attention(platform, AttentionCall(query, key, key, mask() if mask else None, **how))
    return dict(calls.seen)


def kernel(platform, **how):
    names = run(platform, **how)
    fused = [name.removeprefix("_scaled_dot_product_").removesuffix("_attention") for name in names if "scaled" in name]
    return fused[0] if fused else "math"


@pytest.mark.parametrize(
    ("capability", "version", "cudnn", "expected"),
    [
        ((9, 0), (2, 8), 91002, "flash"),  # present, but last in the order
        ((9, 0), (2, 9), 91002, "cudnn"),
        ((9, 0), (2, 10), 91002, "flash"),  # 2.10 requires more than 9.15.0
        ((9, 0), (2, 11), 91900, "cudnn"),
        ((9, 0), (2, 11), 91002, "flash"),  # 2.11 built for CUDA 12 comes with an older cuDNN
        ((9, 0), (2, 13), 92000, "cudnn"),
        ((10, 0), (2, 13), 92000, "cudnn"),
        ((10, 3), (2, 13), 92000, "cudnn"),
        ((12, 0), (2, 13), 92000, "flash"),
        ((8, 0), (2, 13), 92000, "flash"),
        ((8, 9), (2, 13), 92000, "flash"),
    ],
)
def test_cudnn_is_preferred_on_data_center_gpus_from_hopper_on_if_it_is_new_enough(
    capability, version, cudnn, expected
):
    assert kernel(Platform(capability, version, cudnn)) == expected


def test_a_pytorch_without_cudnn_is_assumed_to_have_the_version_in_its_cuda_packages():
    if torch.backends.cudnn.version() is not None:
        pytest.skip("this PyTorch has a cuDNN of its own")
    # `pip install torch==2.11.0` and 2.13.0 install nvidia-cudnn-cu13 9.19.0 and 9.20.0
    expected = {(2, 11): 91900, (2, 12): 92000, (2, 13): 92000}
    platform = Platform.at_hand((9, 0))
    assert platform.cudnn == expected.get(platform.torch, platform.cudnn)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"dtype": torch.float32}, "efficient"),
        ({"size": 60}, "flash"),  # heads are not multiples of 8: flash pads them
        ({"size": 256}, "cudnn"),
        ({"size": 136, "keys": 1}, "flash"),
        ({"mask": lambda: torch.zeros(32, 32, dtype=torch.bfloat16)}, "cudnn"),
        ({"mask": lambda: torch.ones(2, 1, 1, 32, dtype=torch.bool)}, "cudnn"),
        ({"mask": lambda: torch.zeros(32, 32, dtype=torch.bfloat16, requires_grad=True)}, "efficient"),
        ({"mask": lambda: torch.zeros(4, 32, 32, dtype=torch.bfloat16)}, "efficient"),  # neither 2-D nor 4-D
        ({"dropout_p": 0.125}, "cudnn"),
        ({"dropout_p": 0.1}, "flash"),  # cuDNN supports only multiples of 1/16
        ({"queries": 1, "keys": 32, "dropout_p": 0.125}, "flash"),
        ({"kv_heads": 2, "gqa": True}, "cudnn"),
        ({"kv_heads": 2, "gqa": True, "dtype": torch.float32}, "math"),
    ],
)
def test_cudnn_takes_the_shapes_it_supports(how, expected):
    assert kernel(H100, **how) == expected


def test_pytorch_2_11_uses_cudnn_with_any_dropout():
    assert kernel(Platform((9, 0), (2, 11), 91900), dropout_p=0.1) == "cudnn"


def test_blackwell_does_not_use_cudnn_for_heads_of_256():
    assert kernel(H100._replace(capability=(10, 0)), size=256) == "flash"


def test_deterministic_algorithms_exclude_cudnn():
    torch.use_deterministic_algorithms(True)
    try:
        assert kernel(H100) == "flash"
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert kernel(H100) == "cudnn"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("backends", "in_order", "expected"),
    [
        ([SDPBackend.FLASH_ATTENTION], False, "flash"),
        ([SDPBackend.MATH], False, "math"),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], True, "efficient"),
        ([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], False, "flash"),
    ],
)
def test_the_users_choice_of_kernels_is_followed(backends, in_order, expected):
    with sdpa_kernel(backends, set_priority=in_order):
        assert kernel(A100) == expected
        assert kernel(H100) == expected


def test_no_available_kernel_is_an_error_as_on_cuda():
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        kernel(A100, dtype=torch.float32)


def test_grouped_heads_reach_the_memory_efficient_kernel_from_2_15_on():
    for version, expected in (((2, 13), "math"), ((2, 15), "efficient")):
        platform = A100._replace(torch=version)
        assert kernel(platform, dtype=torch.float32, kv_heads=2, gqa=True) == expected


@pytest.mark.parametrize(
    ("capability", "size", "dropout_p", "expected"),
    [
        ((8, 6), 208, 0.0, "efficient"), ((8, 9), 208, 0.0, "efficient"), ((12, 0), 208, 0.0, "efficient"),
        ((8, 9), 256, 0.0, "flash"), ((8, 9), 256, 0.1, "efficient"), ((8, 0), 208, 0.0, "flash"),
    ],
)  # fmt: skip
def test_small_gpus_have_no_flash_backward_for_some_large_heads(capability, size, dropout_p, expected):
    platform = H100._replace(capability=capability)
    assert kernel(platform, size=size, dropout_p=dropout_p) == expected
    assert kernel(platform, size=size, dropout_p=dropout_p, grad=False) == "flash"


def test_cudnn_keeps_one_float_a_row_and_its_seed_and_offset():
    output, log_sum_exp, *_, seed, offset, _ = run(H100)["_scaled_dot_product_cudnn_attention"]
    assert (output.shape, output.dtype) == ((2, 4, 32, 64), torch.bfloat16)
    assert (log_sum_exp.nbytes, seed.nbytes, offset.nbytes) == (2 * 4 * 32 * 4, 8, 8)


def test_inference_keeps_no_log_sum_exp_with_the_memory_efficient_kernel():
    kept = run(A100, dtype=torch.float32)["_scaled_dot_product_efficient_attention"][1]
    unused = run(A100, dtype=torch.float32, grad=False)["_scaled_dot_product_efficient_attention"][1]
    assert (kept.nbytes, unused.nbytes) == (2 * 4 * 32 * 4, 0)


def test_the_plain_kernel_computes_what_pytorch_computes():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.rand(6, 6) > 0.3
    for how in ({"gqa": True}, {"gqa": True, "mask": mask}, {"gqa": True, "is_causal": True, "scale": -0.5}):
        with sdpa_kernel(SDPBackend.MATH):
            ours = scaled_dot_product_attention(A100, AttentionCall(query, key, value, **how))
            theirs = torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=how.get("mask"),
                is_causal=how.get("is_causal", False),
                scale=how.get("scale"),
                enable_gqa=True,
            )
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 1), (torch.float32, 0)])
def test_the_plain_kernel_holds_its_weights_in_the_dtype_of_its_inputs_until_it_returns(dtype, copies):
    # `_scaled_dot_product_attention_math` computes in float32 and returns the result and the weights, both as half.
    heads, length, size = 2, 128, 16

    def loss(model, x):
        query, key, value = (model(x).to(dtype).view(1, length, heads, size).transpose(1, 2) for _ in range(3))
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value).sum()

    trace = simulate(
        Workload(
            model=nn.Linear(heads * size, heads * size),
            batches=[torch.ones(length, heads * size)],
            loss=loss,
            optimizer_factory=torch.optim.SGD,
        ),
        steps=1,
    )
    ops = [trace.ops[op].removeprefix("aten.").partition(".")[0] for op in trace.op]
    weights_bytes = heads * length * length * dtype.itemsize
    beside = [row for row, op in enumerate(ops) if op == "_to_copy" and trace.requested[row] == weights_bytes]
    products = [row for row, op in enumerate(ops) if op == "bmm" and trace.phase[row] == PHASES.index("loss")]
    assert len(beside) == copies
    for row in beside:
        assert trace.born[row] < trace.born[products[-1]] < trace.freed[row]


def test_the_plain_kernel_adds_its_mask_in_place():
    names = run(A100._replace(capability=(7, 0)), mask=lambda: torch.zeros(32, 32))
    assert "add_" in names
    assert "add" not in names

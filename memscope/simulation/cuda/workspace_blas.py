"""Workspaces of matrix products: those of cuBLAS handles, one per thread and stream, and those of cuBLASLt."""

from __future__ import annotations

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta
from memscope.simulation.refusal import NotSimulated

__all__ = ["gemm", "scaled_gemm"]

_POOL = "aten/src/ATen/cuda/CublasHandlePool.cpp"
_BLAS = "aten/src/ATen/native/cuda/Blas.cpp"
_FLOAT8_CAPABILITY = (8, 9)
_OPERANDS = {
    "aten.mm": ("self", "mat2"),
    "aten.addmm": ("mat1", "mat2"),
    "aten._addmm_activation": ("mat1", "mat2"),
    "aten.bmm": ("self", "mat2"),
    "aten.baddbmm": ("batch1", "batch2"),
    "aten.mv": ("self", "vec"),
    "aten.addmv": ("mat", "vec"),
    "aten.dot": ("self", "tensor"),
    "aten.vdot": ("self", "other"),
}


def gemm(call: OperatorCall) -> list[Workspace]:
    """A matrix or vector product: copies of operands whose strides cuBLAS cannot read, then the library's workspace.

    Empty products call no library.

    Source: prepare_matrix_for_cublas and prepare_batch_matrix_for_cublas in Blas.cpp, 2.6.0.
    """
    operands = {name: call.tensor(name) for name in _OPERANDS[call.op]}
    if any(tensor.numel == 0 for tensor in operands.values()):
        return []
    copies = [
        Workspace(f"contiguous copy of {name}", tensor.size_bytes, "op", _BLAS)
        for name, tensor in operands.items()
        if not _readable(tensor)
    ]
    fused = _bias_in_epilogue(call) if call.op in ("aten.addmm", "aten._addmm_activation") else False
    return [*copies, *(_cublaslt(call) if fused else [_cublas(call)])]


def scaled_gemm(call: OperatorCall) -> list[Workspace]:
    """A product of 8-bit floating-point matrices: the workspace of cuBLASLt.

    With a scale for each row, some versions of CUDA take a kernel of CUTLASS, whose workspace was not read: an
    estimate.

    Source: _scaled_mm_out_cuda and scaled_gemm in Blas.cpp and aten/src/ATen/cuda/CUDABlas.cpp, revisions after 2.6 and
        2.8.

    Raises:
        NotSimulated: the GPU has no such kernel, or the kernel refuses the sizes.
    """
    left, right = call.tensor("self"), call.tensor("mat2")
    if call.device.capability < _FLOAT8_CAPABILITY:
        major, minor = call.device.capability
        raise NotSimulated(
            f"products of 8-bit floating-point matrices (torch._scaled_mm) need compute capability 8.9 or higher, and "
            f"{call.device.name} has {major}.{minor}: choose another --device, such as l4 or h100-80gb"
        )
    if left.numel == 0 or right.numel == 0:
        return []
    if left.shape[1] % 16 or right.shape[1] % 16:
        raise NotSimulated(
            f"torch._scaled_mm multiplies matrices whose sizes are multiples of 16 on a GPU, not {[*left.shape]} by "
            f"{[*right.shape]}: choose a number of tokens in a micro-batch that is a multiple of 16, or pad (fp8:pad)"
        )
    taken = _cublaslt(call)
    return taken if call.tensor("scale_a").numel == 1 else [workspace.uncertain() for workspace in taken]


def _readable(tensor: TensorMeta) -> bool:
    """Whether, in the last two dimensions, rows or columns are contiguous and do not overlap."""
    if tensor.strides is None or len(tensor.shape) < 2:
        return True
    (rows, columns), (down, right) = tensor.shape[-2:], tensor.strides[-2:]
    down, right = down if rows > 1 else max(columns, right), right if columns > 1 else max(rows, down)
    return (down == 1 and right >= rows) or (right == 1 and down >= columns) or rows == columns == 1


def _bias_in_epilogue(call: OperatorCall) -> bool:
    """Whether `addmm` goes through cuBLASLt, which adds the bias itself.

    Source: useLtInterface in Blas.cpp, 2.6.0; isInputCompliesAddmmCudaLt in a revision after 2.9, which also requires
        more than one row and column of `mat1`. The versions between were not read; the later rule is assumed from 2.10
        on.
    """
    bias, left, right = call.tensor("self"), call.tensor("mat1"), call.tensor("mat2")
    return (
        call.settings.addmm_lt
        and call.get("beta", 1) == 1
        and bias.shape == (right.shape[1],)
        and bias.is_contiguous
        and right.is_floating
        and min(right.shape) > 1
        and (min(left.shape) > 1 or call.torch < (2, 10))
    )


def _cublas_bytes(call: OperatorCall) -> int:
    """Bytes of a handle's workspace: 2 × 4096 KiB + 8 × 16 KiB, or 32 MiB on newer architectures.

    Source: parseChosenWorkspaceSize in CublasHandlePool.cpp, 2.6.0 and later revisions. Checked in 2.6.0, 2.9.1 and
        2.11.0 (32 MiB for 9.0 only), 2.12.1 and 2.13.0 (9.x, 10.x, 12.x), 2.14.1 and 2.15.0 (9.x to 12.x).
    """
    if call.settings.cublas_bytes is not None:
        return call.settings.cublas_bytes
    capability = call.device.capability
    if call.torch < (2, 12):
        large = capability == (9, 0)
    elif call.torch < (2, 14):
        large = capability[0] in (9, 10, 12)
    else:
        large = 9 <= capability[0] <= 12
    return 32 * 2**20 if large else (2 * 4096 + 8 * 16) * 1024


def _cublas(call: OperatorCall) -> Workspace:
    """The workspace of cuBLAS.

    - up to 2.14: kept, one per thread and stream
    - from 2.15: allocated and freed by each product, unless TORCH_CUBLAS_WORKSPACE_CACHE=1

    Source: setWorkspaceForHandle and getCurrentCUDABlasHandleWithWorkspace in CublasHandlePool.cpp; the library of
        2.15.0 has the latter, those up to 2.14.1 do not.
    """
    if call.torch >= (2, 15) and not call.settings.cached:
        return Workspace("cuBLAS workspace", _cublas_bytes(call), "op", _POOL)
    return Workspace("cuBLAS workspace", _cublas_bytes(call), "handle", _POOL, key="cublas")


def _cublaslt(call: OperatorCall) -> list[Workspace]:
    """The workspace of cuBLASLt: 1 MiB, or a part of the cuBLAS handle's.

    - up to 2.8: allocated and freed by each product, in addition to the handle's, which the call also sets up
    - 2.9 to 2.11: kept, in addition to the handle's; TORCH_CUBLASLT_UNIFIED_WORKSPACE=1 makes it a part of the handle's
    - 2.12 to 2.14: a part of the handle's unless TORCH_CUBLASLT_UNIFIED_WORKSPACE=0
    - from 2.15: allocated and freed by each product, alone; with TORCH_CUBLAS_WORKSPACE_CACHE=1, as in 2.14

    Source: gemm_and_bias in aten/src/ATen/cuda/CUDABlas.cpp, 2.6.0; getCUDABlasLtWorkspace in CublasHandlePool.cpp,
        later revisions. The releases with each rule were read from the libraries of 2.6.0, 2.7.1, 2.8.0, 2.9.1, 2.10.0,
        2.11.0, 2.12.1, 2.13.0, 2.14.1 and 2.15.0.
    """
    settings, version = call.settings, call.torch
    size_bytes = 2**20 if settings.cublaslt_bytes is None else settings.cublaslt_bytes
    single = Workspace("cuBLASLt workspace", size_bytes, "op", _POOL)
    kept = Workspace("cuBLASLt workspace", size_bytes, "handle", _POOL, key="cublaslt")
    if version >= (2, 15) and not settings.cached:
        return [single]
    unified = settings.unified if settings.unified is not None else version >= (2, 12)
    if unified and version >= (2, 8):
        return [_cublas(call)]
    if version >= (2, 12):
        return [kept]
    return [_cublas(call), kept] if version >= (2, 9) else [single, _cublas(call)]

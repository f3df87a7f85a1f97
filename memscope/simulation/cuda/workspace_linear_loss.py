"""Workspaces of `torch.nn.functional.linear_cross_entropy` in parts: an operator written in Python.

A dispatch mode sees its results only: the loss, and the gradients of input, weight and bias.
"""

from __future__ import annotations

from memscope.hooks.kernels import Workspace
from memscope.simulation.cuda.workspace_call import OperatorCall, TensorMeta

__all__ = ["linear_cross_entropy"]

_SOURCE = "torch/nn/modules/linear_cross_entropy.py"


def linear_cross_entropy(call: OperatorCall) -> list[Workspace]:
    """The logits of a part, with copies of it and of its input in another precision; as on CUDA.

    All of them count as held at once, and the results as made before; numbers per token, a few KiB, are left out.

    Source: `_ChunkContext.build` and `_linear_cross_entropy_batch_chunked_accumulator` in
    torch/nn/modules/linear_cross_entropy.py of 2.13.
    """
    rows, weight = call.tensor("input"), call.tensor("linear_weight")
    (tokens, width), classes = rows.shape, weight.shape[0]
    part, policy = min(call.get("batch_chunk_size"), tokens), call.get("acc_policy")
    own, summed = rows.dtype, call.get("acc_dtype")
    is_lean, is_mixed = policy in ("balanced", "compact"), own != summed
    logits = own if is_mixed and own == "float16" and is_lean else summed
    of_input = own if is_lean else summed
    for_input, for_weight = call.get("compute_input_grad"), call.get("compute_linear_weight_grad")
    lowered = (for_input and logits != of_input) or (for_weight and policy == "compact" and logits != own)
    wanted = {
        "logits of a part": ((part, classes), logits, True),
        "weight in the dtype of the logits": ((classes, width), logits, for_input and of_input == logits != own),
        "gradient of the weight from a part": ((classes, width), summed, for_weight and policy != "compact"),
        "gradient of the input": ((tokens, width), of_input, for_input and of_input != own),
        "input of a part": ((part, width), summed, is_mixed and for_weight),
        "rows of the weight": ((part, width), logits if of_input == logits else own, for_input),
        "gradient of the logits of a part": ((part, classes), own, lowered),
        # A variable of the loop holds that of the part before until this one is made.
        "gradient of the logits of the part before": ((part, classes), own, lowered and for_input and part < tokens),
    }
    return [
        Workspace(name, TensorMeta(shape, dtype).size_bytes, "op", _SOURCE)
        for name, (shape, dtype, is_taken) in wanted.items()
        if is_taken
    ]

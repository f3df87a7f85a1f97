"""8-bit products: what is cast, what a GPU refuses, and what is needed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from torch import nn

from memscope.errors import TargetError
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan
from memscope.strategies.fp8 import FP8
from memscope.testing import toy_workload
from memscope.trace import Trace

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
TOKENS, DIM = 8 * 11, 16  # of the toy: 8 samples, padded to the longest


def casts(trace: Trace, module: str) -> list[int]:
    """Bytes of the results of casts in a module in the second step, but for scales."""
    chosen = (trace.step == 1) & (trace.module == trace.modules.index(module))
    chosen &= trace.op == trace.ops.index("aten._to_copy.default")
    return sorted(int(size) for size in trace.requested[chosen & (trace.requested > 8)])


@needs_torchao
def test_each_operand_of_a_product_is_cast_to_a_byte_an_element() -> None:
    trace = simulate(toy_workload, device="cpu", strategies="fp8")
    weight, given, gradient = DIM * DIM, TOKENS * DIM, TOKENS * DIM
    # Forward: input and weight. Backward: the gradient twice and the weight, the input again.
    assert casts(trace, "blocks.0.wo") == sorted([given, weight, gradient, weight, gradient, given])
    assert casts(trace, "head") == []


@needs_torchao
def test_layers_of_other_sizes_stay_as_they_are() -> None:
    workload = toy_workload()
    block = workload.model.get_submodule("blocks.0")
    block.up, block.down = nn.Linear(DIM, 24), nn.Linear(24, DIM)
    Plan.parse("fp8").apply(workload)
    kinds = {name: type(module).__name__ for name, module in workload.model.named_modules()}
    assert (kinds["blocks.0.up"], kinds["blocks.0.wq"], kinds["head"]) == ("Linear", "Float8Linear", "Linear")


@needs_torchao
def test_a_gpu_without_such_products_is_refused() -> None:
    with pytest.raises(TargetError, match=r"need compute capability 8\.9 or higher, and a100-40gb has 8\.0: choose"):
        simulate(toy_workload, device="a100-40gb", strategies="fp8")


@needs_torchao
def test_tokens_that_are_no_multiple_of_16_are_refused_or_padded() -> None:
    # The gradient of a weight is a product over the tokens.
    with pytest.raises(TargetError, match=r"not \[16, 88\] by \[88, \d+\]: .* multiple of 16, or pad \(fp8:pad\)"):
        simulate(toy_workload, device="h100-80gb", strategies="fp8")
    trace = simulate(toy_workload, device="h100-80gb", strategies="fp8:pad")
    padded = trace.op == trace.ops.index("aten.constant_pad_nd.default")
    assert np.isin(96 * DIM, trace.requested[padded])


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = FP8().check(toy_workload())
    assert str(problem) == (
        "the layers are those of torchao.float8, and torchao is not installed: "
        'run pip install "torch-memscope[torchao]"'
    )

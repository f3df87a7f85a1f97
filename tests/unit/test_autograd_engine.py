"""Autograd on simulated tensors takes as much memory as on plain tensors, not as much as on tensor subclasses."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from memscope import Workload, record, simulate
from memscope.trace import PHASES

SIZE = 1000  # floats of every tensor


def backward_of(body, device="gpu"):
    """How often each operator makes a tensor as large as the weight in the backward pass of the second step."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SIZE))

        def forward(self, batch):
            return body(self.weight * 1, batch)

    def loss(model, batch):
        return model(batch).sum()

    trace = simulate(
        lambda: Workload(Model(), [torch.zeros(SIZE, dtype=torch.long)], loss, lambda p: torch.optim.SGD(p, lr=0.1)),
        device=device,
    )
    made = (trace.step == 1) & (trace.phase == PHASES.index("backward")) & (trace.requested == 4 * SIZE)
    return Counter(trace.ops[op].removeprefix("aten.") for op in trace.op[made])


def test_gradients_that_meet_are_added_into_the_first():
    # exp and sin each make a gradient; both end up in the first. GPUs do the same: all 120 places where
    # gradients meet in Wedsonlin/assignment2-systems, medium_128_training (PyTorch 2.11), take no memory.
    assert backward_of(lambda x, batch: x.exp() + x.sin())["add.Tensor"] == 0


def test_gradients_that_meet_under_only_a_dispatch_mode_are_added_into_a_third():
    # PyTorch's own behavior with subclasses and modes; `cpu` stands for a run recorded there.
    assert backward_of(lambda x, batch: x.exp() + x.sin(), device="cpu")["add.Tensor"] == 1


def test_a_gradient_without_memory_of_its_own_is_not_added_into():
    # The gradient of the sum is one number, expanded: the second gradient cannot be added into it.
    assert backward_of(lambda x, batch: x + x.exp())["add.Tensor"] == 1


@pytest.mark.parametrize(("stride", "added_out_of_place"), [(1, 0), (2, 1)], ids=["dense", "with gaps"])
def test_a_gradient_is_added_into_if_it_has_no_gaps(stride, added_out_of_place):
    # Source: `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp requires is_non_overlapping_and_dense().
    class Spaced(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return torch.empty_strided((SIZE,), (stride,)).copy_(gradient)

    # The gradient of the last operator arrives first.
    assert backward_of(lambda x, batch: x.exp() + Spaced.apply(x))["add.Tensor"] == added_out_of_place


def test_a_transposed_gradient_without_gaps_is_added_into():
    class Transposed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return torch.empty_strided((10, 100), (1, 10)).copy_(gradient)

    def body(x, batch):
        table = x.view(10, 100) * 1
        return table.exp() + Transposed.apply(table)

    assert backward_of(body)["add.Tensor"] == 0


def test_a_gradient_with_another_holder_is_not_added_into():
    # The sum gives the same gradient to x twice: the first one is still held for the second use.
    assert backward_of(lambda x, batch: (x + x) * 1)["add.Tensor"] == 1


@pytest.mark.parametrize(
    ("body", "operator", "zeros"),
    [
        (lambda x, batch: x[batch] * 1, "index_put.default", "new_zeros.default"),
        (lambda x, batch: x.gather(0, batch) * 1, "scatter_add.default", "new_zeros.default"),
        (lambda x, batch: x.index_select(0, batch) * 1, "index_add.default", "new_zeros.default"),
    ],
)
def test_a_gradient_is_put_into_the_zeros_made_for_it(body, operator, zeros):
    made = backward_of(body)
    assert (made[operator], made[zeros]) == (0, 1)
    assert backward_of(body, device="cpu")[operator] == 1


def test_the_place_of_a_maximum_gets_its_gradient_without_a_copy():
    def rows(x, batch):
        return x.view(10, 100).max(dim=0).values * 1

    assert backward_of(rows)["scatter.src"] == 0
    assert backward_of(rows, device="cpu")["scatter.src"] == 1


def test_additions_in_a_python_backward_are_not_changed():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1 + gradient * 1

    assert backward_of(lambda x, batch: Twice.apply(x) * 1)["add.Tensor"] == 1


@pytest.mark.skipif(torch.__version__ < (2, 11), reason="earlier releases keep the casts in inference mode, too")
def test_weights_cast_in_inference_mode_are_not_kept():
    # Wedsonlin/assignment2-systems, medium_512_inference (2.11, autocast): each cast is freed before the next one.
    def loss(model, batch):
        with torch.inference_mode():
            model(batch.unbind(0)[0])  # the view of a tensor from outside is unchanged
        return model[0].weight.sum()

    trace = simulate(
        lambda: Workload(
            nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(3)]),
            [torch.zeros(2, 10, 100)],
            loss,
            lambda p: torch.optim.SGD(p, lr=0.1),
        ),
        strategies="amp:dtype=bf16",
    )
    casts = np.flatnonzero((trace.step == 1) & (trace.requested == 2 * 100 * 100))
    assert len(casts) == 3
    assert (trace.freed[casts[:-1]] < trace.born[casts[1:]]).all()


@pytest.mark.parametrize(
    "body",
    [
        # The gradient of a transposed view that was written into is placed into zeros as large as its base.
        lambda x, batch: x.view(10, 100).T.relu_().exp(),
        lambda x, batch: x.view(10, 100).T.mul_(2)[3:].exp(),
        # A part of the base: the backward pass of `slice` makes a tensor as large as well.
        lambda x, batch: x.mul(2)[:-1].mul_(2),
    ],
    ids=["whole", "whole, used in part", "part"],
)
def test_the_gradient_of_a_view_that_was_written_into_takes_what_it_takes_on_plain_tensors(body):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(SIZE))

        def forward(self, batch):
            return body(self.weight * 1, batch)

    workload = Workload(
        Model(), [torch.zeros(2)], lambda model, batch: model(batch).sum(), lambda p: torch.optim.SGD(p, lr=0.1)
    )
    simulated, real = simulate(workload, device="cpu"), record(workload)
    assert simulated.requested.tolist() == real.requested.tolist()

"""Options of single layers: the mathematics stays bit for bit, and each keeps the bytes that its definition says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memscope import Trace, simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.testing import toy_workload
from memscope.trace import CATEGORIES, PHASES
from memscope.workload.description import Workload

# Options for the two blocks of the toy: LayerNorm, four linear layers of attention, an MLP with GELU and dropout.
OPTIONS = {
    "none": ("none", "none"),
    "full": ("full", "full"),
    "full, none": ("full", "none"),
    "children": ("recompute:norm+up+down", "recompute:dropout"),
    "save products": ("save:up/aten.addmm+wk/aten.mm+./aten.bmm", "save:down/aten.addmm"),
    "save adapted": ("save:wq/aten.mm+wv/aten.mm", "save:wv/aten.mm+./aten.add+./aten._softmax"),
    "save noise": ("save:dropout/aten.empty_like", "save:dropout/aten.mul"),
    "offload": ("offload", "none"),
    "segment": ("full:2", "within:blocks.0"),
}


def planned(layers: dict[str, str], others: str = "") -> Plan:
    return Plan.of(*Plan.parse(others).strategies, Checkpoint.of(LayerPlan(layers)))


def toy(options: tuple[str, str], others: str = "", dropout: float = 0.5) -> Workload:
    torch.manual_seed(0)
    workload = toy_workload(dropout=dropout)
    planned({"blocks.0": options[0], "blocks.1": options[1]}, others).apply(workload)
    for name, parameter in workload.model.named_parameters():
        if name.endswith("lora_b"):  # at zero, it would hide whether an update is added once or twice
            nn.init.normal_(parameter)
    return workload


def loss_and_gradients(workload: Workload, seed: int = 1) -> dict[str, Tensor]:
    (batch,) = workload.split(workload.batches[0], 1)
    torch.manual_seed(seed)
    dtype = workload.plan.autocast
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = workload.loss(workload.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in workload.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "random state": torch.get_rng_state(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("others", ["", "amp:dtype=bf16", "lora:dropout=0.5", "lora:dropout=0.5,amp:dtype=bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_gradients_and_random_state_are_the_same_bit_for_bit_with_dropout_active(
    options: tuple[str, str], others: str
) -> None:
    assert_same(loss_and_gradients(toy(options, others)), loss_and_gradients(toy(("none", "none"), others)))


class Noisy(nn.Module):
    """Draws random numbers three times: in place, in a fused operator, and plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.linear(x), 0.5)
        x = torch.native_dropout(x, 0.5, True)[0]
        return x * torch.rand_like(x)


@pytest.mark.parametrize("option", ["none", "full", "save:./aten.empty_like", "save:./aten.native_dropout"])
def test_a_kept_call_that_draws_random_numbers_does_not_shift_those_of_the_next(option: str) -> None:
    found = []
    for chosen in ("none", option):
        torch.manual_seed(0)
        model = nn.Sequential(Noisy(), Noisy())
        Checkpoint.of(LayerPlan({"0": chosen, "1": chosen})).apply(
            Workload(model, [], lambda model, x: model(x).sum(), torch.optim.SGD)
        )
        model(torch.ones(4, 8)).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_same(*found)


def in_place_after_reading(x: Tensor) -> Tensor:
    y = torch.exp(x)
    return y * 2 + y.add_(1)


def in_place_through_another_argument(x: Tensor) -> Tensor:
    y = torch.exp(x)
    torch.add(x.detach(), 1, out=y.detach())
    return x * 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            in_place_after_reading,
            "0: a result that its option save:… keeps is used, and then changed in place by ./aten.add_: its earlier "
            "value is lost. Leave the call that makes it out of the option",
        ),
        (
            in_place_through_another_argument,
            "0: a result that its option save:… keeps may be changed in place by ./aten.add: its earlier "
            "value is lost. Leave the call that makes it out of the option",
        ),
    ],
)
def test_a_kept_result_that_cannot_be_had_again_is_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    model = selective(function, "save:./aten.exp")
    with pytest.raises(UsageError) as caught:
        model(torch.ones(3, requires_grad=True))
    assert str(caught.value) == message


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self.function(*args, **kwargs)


def selective(function: Callable[..., Tensor], option: str) -> nn.Module:
    model = nn.Sequential(Lambda(function), Lambda(torch.sin))
    workload = Workload(model, [], lambda model, x: model(x).sum(), torch.optim.SGD)
    Checkpoint.of(LayerPlan({"0": option, "1": "none"})).apply(workload)
    return model


def test_a_kept_result_that_is_changed_after_the_layer_is_refused() -> None:
    model = selective(torch.exp, "save:./aten.exp")
    first = model[0](torch.ones(3, requires_grad=True))
    y = first.sum()
    first.detach().add_(1)
    with pytest.raises(UsageError, match=r"^0: the result of ./aten.exp, which its option save:… keeps, was changed"):
        y.backward()


def test_kept_results_serve_one_backward_pass() -> None:
    y = selective(torch.exp, "save:./aten.exp")(torch.ones(3, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(UsageError, match=r"^0: its option save:… does not support a second backward pass"):
        y.backward()


def test_a_forward_that_is_another_one_when_computed_again_is_refused() -> None:
    times = iter([1, 2])

    def exponentials(x: Tensor) -> Tensor:
        for _ in range(next(times)):
            x = torch.exp(x)
        return torch.sin(x) * x

    y = selective(exponentials, "save:./aten.exp")(torch.ones(3, requires_grad=True)).sum()
    with pytest.raises(UsageError, match=r"^0: computed again, its forward calls ./aten.exp more often than before"):
        y.backward()


def test_a_call_that_is_never_made_is_refused() -> None:
    model = selective(torch.exp, "save:./aten.exp+./aten.mm")
    with pytest.raises(UsageError, match=r"^0: the option save:./aten.mm keeps nothing: no such call was made"):
        model(torch.ones(3, requires_grad=True))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_modules_parameters_and_state_dict_are_unchanged(options: tuple[str, str]) -> None:
    plain, wrapped = toy(("none", "none")).model, toy(options).model
    assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(wrapped.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_copy_of_the_model_has_the_options_and_its_own_weights(
    options: tuple[str, str], clone: Callable[[nn.Module], nn.Module]
) -> None:
    original = toy(options)
    expected = loss_and_gradients(original)
    copied = toy(options)
    copied.model = clone(copied.model)
    assert_same(loss_and_gradients(copied), expected)
    with torch.no_grad():
        for parameter in copied.model.get_submodule("blocks").parameters():
            parameter.zero_()
    tokens = torch.tensor([[1, 2, 3]])
    embedded = copied.model.get_submodule("embed")(tokens)
    assert torch.equal(copied.model(tokens), copied.model.get_submodule("head")(embedded))  # the blocks add nothing


def test_without_gradients_every_option_gives_what_the_model_gives() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = toy(("none", "none")).model.eval()(tokens)
        for options in OPTIONS.values():
            assert torch.equal(toy(options).model.eval()(tokens), expected), options


# Bytes, for layers x + down(relu(up(x))) with up: d to 4d, down: 4d to d, no bias; the batch is no activation.


class Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


DIM, ROWS = 64, 32
U = ROWS * DIM * 4
"""Bytes of a layer's input or output, in float32."""
LOSS = 4


def layers_workload() -> Workload:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(DIM), Layer(DIM))
    return Workload(model, [torch.randn(ROWS, DIM)], lambda model, x: model(x).square().mean(), torch.optim.SGD)


def traced(options: tuple[str, str], device: str) -> Trace:
    return simulate(layers_workload, device=device, strategies=planned({"0": options[0], "1": options[1]}))


def activations_kept(trace: Trace) -> list[int]:
    """Sizes of the activations alive when the backward pass of the last step begins, but for the loss."""
    phases = [PHASES[phase] for phase in trace.mark_phase]
    passes = [i for i, phase in enumerate(phases) if phase in ("backward", "recompute") and trace.mark_step[i] == 1]
    turn = trace.mark_event[passes[0]]
    alive = (trace.born < turn) & ((trace.freed < 0) | (trace.freed >= turn))
    kept = sorted(trace.requested[alive & (trace.category == CATEGORIES.index("activation"))].tolist())
    assert kept.pop(0) == LOSS
    return kept


# The last layer's output, 1 U, is always there: the loss, mean(y²), saves it. A first layer's input is the batch.
KEPT = {
    # Each layer saves its input (up), and once for both relu, which saves its result, and down: 4 U.
    ("none", "none"): [U, U, 4 * U, 4 * U],
    # Inputs alone: the second layer's is the first one's output.
    ("full", "full"): [U, U],
    ("none", "full"): [U, U, 4 * U],
    # Checkpointed, up keeps its input and down its own, which are what they save anyway.
    ("recompute:up+down", "recompute:up+down"): [U, U, 4 * U, 4 * U],
    # A full layer that also keeps what up gives, 4 U.
    ("save:up/aten.mm", "full"): [U, U, 4 * U],
    ("save:up/aten.mm+down/aten.mm", "full"): [U, U, U, 4 * U],
    # More than none: not only what is saved for backward.
    ("save:up/aten.mm+./aten.relu", "full"): [U, U, 4 * U, 4 * U],
    # The result that a layer ends with is the next one's input: kept once.
    ("save:./aten.add", "full"): [U, U],
    # One checkpoint: the batch and the output.
    ("full:2", "within:0"): [U],
}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("options", KEPT, ids="/".join)
def test_an_option_keeps_the_bytes_that_its_definition_says(options: tuple[str, str], device: str) -> None:
    assert activations_kept(traced(options, device)) == KEPT[options]


def test_offload_leaves_nothing_of_a_layer_on_a_gpu_but_its_output() -> None:
    # The second layer's input goes to the host, so the first one's output is free when the forward pass has left it.
    assert activations_kept(traced(("offload", "offload"), "gpu")) == [U]
    assert activations_kept(traced(("offload", "none"), "gpu")) == [U, U, 4 * U]


def test_offload_on_the_cpu_changes_no_byte() -> None:
    assert activations_kept(traced(("offload", "offload"), "cpu")) == activations_kept(traced(("none", "none"), "cpu"))


def device_copies(trace: Trace, phase: str) -> list[int]:
    """Sizes of what copies made on the device in the last step."""
    made = (
        (trace.step == 1)
        & (trace.phase == PHASES.index(phase))
        & (trace.op == trace.ops.index("aten._to_copy.default"))
    )
    return sorted(trace.requested[made].tolist())


def test_offload_takes_the_memory_back_in_the_backward_pass_and_brings_no_weight() -> None:
    trace = traced(("none", "offload"), "gpu")
    # Of the second layer: its input, and what relu gave, which down and relu both saved.
    assert device_copies(trace, "backward") == [U, 4 * U]
    assert device_copies(trace, "forward") == []
    copies = (trace.step == 1) & (trace.op == trace.ops.index("aten._to_copy.default"))
    (of_relu,), (of_input,) = (np.flatnonzero(copies & (trace.requested == size)) for size in (4 * U, U))
    assert 0 < trace.freed[of_relu] < trace.born[of_input] < trace.freed[of_input]


def test_offload_copies_memory_once_however_many_tensors_show_it_and_restores_views() -> None:
    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(DIM, 3 * DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.all(x).chunk(3, -1)
            return q * k * v + v.T.contiguous().T

    def build() -> Workload:
        torch.manual_seed(0)
        model = nn.Sequential(Slices(), Slices())
        return Workload(model, [torch.randn(ROWS, DIM)], lambda model, x: model(x).square().mean(), torch.optim.SGD)

    trace = simulate(build, device="gpu", strategies=planned({"0": "none", "1": "offload"}))
    # One storage of 3 U holds q, k and v. (q·k) is saved by the last product, 1 U, next to v; q and k by the first.
    # The layer's input is saved by its linear layer.
    assert device_copies(trace, "backward") == [U, U, 3 * U]


def test_offload_leaves_what_layers_share_on_the_device() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(DIM, DIM, bias=False)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.up(x) * mask

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Masked() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones_like(x)
            for layer in self.layers:
                x = layer(x, mask)
            return x

    def build() -> Workload:
        return Workload(Model(), [torch.randn(ROWS, DIM)], lambda model, x: model(x).square().mean(), torch.optim.SGD)

    layers = {"layers.0": "offload", "layers.1": "offload"}
    # The mask, once; and the output, which the loss saves.
    assert activations_kept(simulate(build, device="gpu", strategies=planned(layers))) == [U, U]

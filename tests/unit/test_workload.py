"""One training step: its phases, contexts and weights, and the splitting of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope import simulate
from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.trace import PHASES
from memscope.workload.description import StepPlan, Workload
from memscope.workload.micro_batches import MicroBatch, micro_batches
from memscope.workload.split import split_batch
from memscope.workload.step import Training, run_step

Events = list[tuple[Any, ...]]


class Diary:
    """A `StepObserver` that records its calls."""

    def __init__(self) -> None:
        self.events: Events = []

    def phase(self, name: str, micro_batch: int) -> None:
        self.events.append((name, micro_batch))

    def inputs(self, data: Any) -> None:
        self.events.append(("inputs", data.tolist()))


def scalar_workload(plan: StepPlan | None = None, **changes: Any) -> Workload:
    """The loss is the mean of w·x, w = (1, 1), so the gradient is the mean of the samples. SGD, learning rate 1."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    workload: dict[str, Any] = {
        "model": model,
        "batches": [torch.tensor([[3.0, 4.0], [3.0, 4.0]])],
        "loss": lambda m, x: m(x).mean(),
        "optimizer_factory": lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        "plan": plan or StepPlan(),
    }
    return Workload(**workload | changes)


def run(workload: Workload, diary: Diary | None = None) -> Tensor:
    training = Training.start(workload, "cpu", lambda data: data)
    return run_step(training, micro_batches(workload, workload.batches[0]), diary)


def weight(workload: Workload) -> list[float]:
    assert isinstance(workload.model, nn.Linear)
    return workload.model.weight[0].tolist()


def test_the_phases_of_a_step_come_in_this_order() -> None:
    diary = Diary()
    workload = scalar_workload(StepPlan(micro_batches=3), batches=[torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])])
    run(workload, diary)
    assert diary.events == [
        ("forward", 0), ("inputs", [[1.0, 2.0]]), ("backward", 0),
        ("forward", 1), ("inputs", [[3.0, 4.0]]), ("backward", 1),
        ("forward", 2), ("inputs", [[5.0, 6.0]]), ("backward", 2),
        ("optimizer", 2), ("zero_grad", 2),
    ]  # fmt: skip


def test_the_step_moves_the_weights_by_the_gradient_of_the_whole_batch_and_leaves_no_gradient() -> None:
    workload = scalar_workload(StepPlan(micro_batches=2), batches=[torch.tensor([[1.0, 0.0], [3.0, 1.0]])])
    loss = run(workload)
    assert loss.item() == 2.5  # the mean of 1 and 4
    assert weight(workload) == [1 - 2.0, 1 - 0.5]
    assert all(parameter.grad is None for parameter in workload.model.parameters())


def test_micro_batches_are_moved_to_the_device_one_at_a_time_and_let_go() -> None:
    moved: Events = []

    def to_device(data: Tensor) -> Tensor:
        moved.append((data.shape[0], len(pieces)))
        return data

    workload = scalar_workload(StepPlan(micro_batches=2))
    pieces = micro_batches(workload, workload.batches[0])
    run_step(Training.start(workload, "cpu", to_device), pieces)
    assert moved == [(1, 1), (1, 0)]  # one sample each; while one is used, the list holds only later ones
    assert pieces == []


def test_contexts_are_entered_in_order_around_forward_loss_and_backward_of_each_micro_batch() -> None:
    diary = Diary()

    def scope(name: str) -> Any:
        @contextlib.contextmanager
        def noted() -> Iterator[None]:
            diary.events.append(("enter", name))
            yield
            diary.events.append(("leave", name))

        return noted

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        diary.events.append(("loss",))
        result = model(x).mean()
        result.register_hook(lambda gradient: diary.events.append(("engine",)))
        return result  # type: ignore[no-any-return]

    run(scalar_workload(StepPlan(micro_batches=2, contexts=(scope("outer"), scope("inner"))), loss=loss), diary)
    assert [event for event in diary.events if event[0] != "inputs"] == [
        *(
            event
            for i in (0, 1)
            for event in [
                ("forward", i), ("enter", "outer"), ("enter", "inner"), ("loss",),
                ("backward", i), ("engine",), ("leave", "inner"), ("leave", "outer"),
            ]
        ),
        ("optimizer", 1), ("zero_grad", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("limit", "change"), [(None, (3.0, 4.0)), (10.0, (3.0, 4.0)), (1.0, (0.6, 0.8))])
def test_clipping_bounds_the_norm_of_the_unscaled_gradient(
    scaled: bool, limit: float | None, change: tuple[float, float]
) -> None:
    # The gradient is (3, 4), its norm 5; torch.nn.utils.clip_grad_norm_ divides by the norm plus 1e-6.
    workload = scalar_workload(StepPlan(clip_grad_norm=limit, grad_scaler=scaled))
    run(workload)
    assert weight(workload) == pytest.approx([1 - change[0], 1 - change[1]], abs=1e-5)


def test_the_scaler_is_updated_in_every_step() -> None:
    workload = scalar_workload(StepPlan(grad_scaler=True))
    training = Training.start(workload, "cpu", lambda data: data)
    assert training.scaler is not None
    for _ in range(3):
        run_step(training, micro_batches(workload, workload.batches[0]))
    assert training.scaler.state_dict()["_growth_tracker"] == 3  # steps in a row without an overflow


def test_only_trainable_parameters_go_to_the_optimizer_and_the_model_is_put_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
    model[0].requires_grad_(False)
    training = Training.start(scalar_workload(model=model), "cpu", lambda data: data)
    assert [id(p) for group in training.optimizer.param_groups for p in group["params"]] == [
        id(model[1].weight),
        id(model[1].bias),
    ]
    assert model[0].training


def test_a_factory_with_a_parameter_named_model_is_given_the_model() -> None:
    """Its groups can follow names: here no weight decay for biases. Strategies that rebuild the optimizer keep them."""

    def grouped(parameters: Iterable[nn.Parameter], model: nn.Module) -> torch.optim.Optimizer:
        given = {id(parameter) for parameter in parameters}
        named = [(name, p) for name, p in model.named_parameters() if id(p) in given]
        groups = [
            {"params": [p for name, p in named if name.endswith("bias") is biases], "weight_decay": decay}
            for biases, decay in ((False, 0.1), (True, 0.0))
        ]
        return torch.optim.AdamW(groups)

    for plan in ("", "optim:foreach=false", "lora:targets=0,optim:fused"):
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        workload = scalar_workload(model=model, optimizer_factory=grouped)
        Plan.parse(plan).apply(workload)
        groups = Training.start(workload, "cpu", lambda data: data).optimizer.param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        biases = [] if "lora" in plan else [model[0].bias, model[1].bias]
        assert [id(p) for p in groups[1]["params"]] == [id(bias) for bias in biases]


def test_gradients_filled_with_zeros_stay() -> None:
    workload = scalar_workload(StepPlan(set_to_none=False))
    run(workload)
    assert isinstance(workload.model, nn.Linear)
    assert workload.model.weight.grad is not None
    assert workload.model.weight.grad.tolist() == [[0.0, 0.0]]


def alive_in_the_optimizer(plan: StepPlan, loss: Any) -> dict[str, int]:
    """Bytes of the batch, 4·64 float32, and of outputs, 4·128 float32, alive when the second step's optimizer begins.

    All else has one element, or 64·128: no other allocation has one of these sizes.
    """
    model = nn.Linear(64, 128, bias=False)
    trace = simulate(Workload(model, [torch.ones(4, 64)], loss, torch.optim.AdamW, plan=plan), device="cpu")
    here = (trace.mark_step == 1) & (trace.mark_phase == PHASES.index("optimizer"))
    event = int(trace.mark_event[here][0])
    alive = (trace.born < event) & ((trace.freed < 0) | (trace.freed >= event))
    return {name: int(trace.size[alive & (trace.size == 16 * width)].sum()) for name, width in SIZES.items()}


SIZES = {"batch": 64, "outputs": 128}


def test_a_step_keeps_what_a_training_loop_keeps_in_its_variables() -> None:
    def plain(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mean()  # type: ignore[no-any-return]

    def keeping(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model(x)
        return outputs.mean(), outputs

    assert alive_in_the_optimizer(StepPlan(), plain) == {"batch": 0, "outputs": 0}
    assert alive_in_the_optimizer(StepPlan(keep_batch=True), plain) == {"batch": 4 * 64 * 4, "outputs": 0}
    assert alive_in_the_optimizer(StepPlan(), keeping) == {"batch": 0, "outputs": 4 * 128 * 4}


def test_a_model_with_nothing_to_train_is_refused() -> None:
    workload = scalar_workload(name="mine")
    workload.model.requires_grad_(False)
    with pytest.raises(UsageError) as caught:
        Training.start(workload, "cpu", lambda data: data)
    assert str(caught.value) == '"mine" has no trainable parameter: nothing can be optimized'


def test_a_tied_parameter_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].weight = model[1].weight
    model[2].requires_grad_(False)
    assert scalar_workload(model=model).parameter_counts() == (9 + 3 + 9 + 3, 9 + 3)


def same(one: Any, other: Any) -> bool:
    """Equality, including the values of tensors."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


X, Y, T = torch.arange(8).view(4, 2), torch.arange(4), torch.tensor(7)


@pytest.mark.parametrize(
    ("batch", "pieces"),
    [
        (X, [X[:2], X[2:]]),
        ((X, Y), [(X[:2], Y[:2]), (X[2:], Y[2:])]),
        ([X, Y], [[X[:2], Y[:2]], [X[2:], Y[2:]]]),
        ({"a": {"b": X}, "y": (Y,)}, [{"a": {"b": X[:2]}, "y": (Y[:2],)}, {"a": {"b": X[2:]}, "y": (Y[2:],)}]),
        (["p", "q", "r", "s"], [["p", "q"], ["r", "s"]]),
        ([(X[0], 1), (X[1], 2)], [[(X[0], 1)], [(X[1], 2)]]),
        ({"x": X, "id": ["p", "q", "r", "s"]}, [{"x": X[:2], "id": ["p", "q"]}, {"x": X[2:], "id": ["r", "s"]}]),
        ({"x": X, "t": T, "n": None}, [{"x": X[:2], "t": T, "n": None}, {"x": X[2:], "t": T, "n": None}]),
    ],
    ids=["tensor", "tuple", "columns", "nested", "samples", "samples of tensors", "list in a dict", "no samples in it"],
)  # fmt: skip
def test_a_batch_is_split_along_its_samples_whatever_its_nesting(batch: Any, pieces: list[Any]) -> None:
    found = split_batch(batch, 2)
    assert same(found, pieces), found


def test_one_piece_is_the_batch_itself() -> None:
    batch = {"x": X}
    assert split_batch(batch, 1)[0] is batch


@pytest.mark.parametrize(
    ("batch", "parts", "message"),
    [
        (X, 3, "of 4 samples cannot be split into 3 equal micro-batches: "
               "choose a number of micro-batches that divides 4"),
        (["p", "q"], 4, "of 2 samples cannot be split into 4 equal micro-batches: "
                        "choose a number of micro-batches that divides 2"),
        ([], 2, "is empty and cannot be split into 2 micro-batches: check the data"),
        ((X, torch.ones(2)), 2, "of type tuple cannot be split into 2 micro-batches: expected the "
            "same number of samples in all tensors and lists, found 2 and 4; set the workload's own `split`"),
        (iter([X]), 2, "of type list_iterator cannot be split into 2 micro-batches: expected the "
            "same number of samples in all tensors and lists, found none; set the workload's own `split`"),
    ],
    ids=["indivisible", "indivisible list", "empty", "two numbers of samples", "no samples"],
)  # fmt: skip
def test_a_batch_that_cannot_be_split_is_refused(batch: Any, parts: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        split_batch(batch, parts)
    assert str(caught.value) == f"a step's batch {message}"


def shares(workload: Workload) -> list[float]:
    return [piece.share for piece in micro_batches(workload, workload.batches[0])]


def test_a_micro_batch_is_weighted_by_its_samples_by_default() -> None:
    workload = scalar_workload(StepPlan(micro_batches=2), batches=[torch.ones(4, 2)])
    assert shares(workload) == [0.5, 0.5]
    workload.split = lambda batch, parts: [batch[:1], batch[1:]]
    assert shares(workload) == [0.25, 0.75]
    workload.weight = lambda piece: 3.0 if len(piece) == 1 else 1.0
    assert shares(workload) == [0.75, 0.25]


def test_a_micro_batch_that_weighs_nothing_is_left_out() -> None:
    workload = scalar_workload(StepPlan(micro_batches=4), batches=[torch.tensor([[0.0], [1.0], [0.0], [3.0]])])
    workload.weight = lambda piece: float(piece.sum())
    pieces: list[MicroBatch] = micro_batches(workload, workload.batches[0])
    assert [(piece.data.item(), piece.share) for piece in pieces] == [(1.0, 0.25), (3.0, 0.75)]


@pytest.mark.parametrize("batch", [torch.zeros(2, 2), torch.zeros(0, 2)], ids=["every target masked", "no sample"])
def test_a_batch_with_nothing_to_learn_from_is_refused(batch: Tensor) -> None:
    workload = scalar_workload(weight=lambda piece: float(piece.sum()))
    with pytest.raises(UsageError) as caught:
        micro_batches(workload, batch)
    assert str(caught.value) == (
        "the batch of this step has no target token, so there is nothing to learn: "
        "every label is masked; check the labels, or remove such samples"
    )

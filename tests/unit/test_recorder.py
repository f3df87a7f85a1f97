"""The owner of each byte over time: categories, modules, phases and steps, in the user's own loop."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint

from memscope import Recorder, StepPlan, Workload, record
from memscope.analysis.notes import notes_of
from memscope.errors import TargetError, UsageError
from memscope.trace import CATEGORIES, PHASES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, recompute=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.register_buffer("scale", torch.ones(3))
        self.recompute = recompute

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def loop(model, optimizer, steps=2, accumulate=1):
    losses = []
    for _ in range(steps):
        for _ in range(accumulate):
            loss = model(torch.ones(16, 8)).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def recorded(model=None, **how):
    torch.manual_seed(0)
    model = model or Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(model, optimizer) as recorder:
        loop(model, optimizer, **how)
    return recorder.trace()


PARAMETER_BYTES = 2 * (8 * 32 + 32 * 8) * 4


def test_an_object_other_than_a_model_is_refused():
    with pytest.raises(UsageError, match=r"Recorder expects an nn\.Module but got a int: pass the model"):
        Recorder(3)


def test_parameters_gradients_and_optimizer_state_have_the_sizes_of_their_shapes():
    largest = recorded().max_by_category(step=1)
    assert largest["parameter"] == PARAMETER_BYTES
    assert largest["gradient"] == PARAMETER_BYTES
    assert (
        largest["optimizer_state"] == 2 * PARAMETER_BYTES + 4 * 4
    )  # two moments, and a 4-byte step counter for each of 4 weights
    assert largest["buffer"] == 3 * 4


def test_activations_are_the_tensors_that_the_backward_pass_needs():
    trace = recorded()
    first_backward = int(trace.mark_event[(trace.mark_phase == PHASES.index("backward")) & (trace.mark_step == 1)][0])
    by_module = {
        m: size for (c, m), size in trace.by("category", "module", at=first_backward - 1).items() if c == "activation"
    }
    # relu keeps its own result [16, 32], which `down` keeps as its input: one storage.
    # The layer's result [16, 8] is the input of the next layer; the last one is kept by square().
    assert by_module["blocks.0"] == (16 * 32 + 16 * 8) * 4
    assert by_module["blocks.1"] == (16 * 32 + 16 * 8) * 4


def test_categories_sum_to_allocated_at_every_event():
    trace = recorded()
    assert (sum(trace.timeline(c) for c in CATEGORIES) == trace.allocated).all()


def test_every_byte_has_an_owner():
    assert recorded().by_category()["other"] == 0


def test_phases_and_steps_are_recognized_in_a_plain_loop():
    trace = recorded(steps=2)
    seen = [(int(s), PHASES[p]) for s, p in zip(trace.mark_step, trace.mark_phase, strict=True)]
    order = [
        name
        for i, name in enumerate(p for s, p in seen if s == 1)
        if i == 0 or name != [p for s, p in seen if s == 1][i - 1]
    ]
    assert order == ["forward", "loss", "backward", "optimizer", "outside"]
    assert trace.steps == (0, 1)


def test_micro_batches_are_counted_within_a_step():
    trace = recorded(accumulate=3)
    assert set(trace.micro_batch[(trace.step == 1) & (trace.phase == PHASES.index("forward"))]) == {0, 1, 2}


def test_backward_work_belongs_to_the_module_whose_forward_it_differentiates():
    trace = recorded()
    backward = trace.phase == PHASES.index("backward")
    owners = {trace.modules[m] for m in trace.module[backward]}
    assert {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"} <= owners


def test_a_gradient_belongs_to_the_module_of_its_parameter():
    trace = recorded()
    gradient = (trace.category == CATEGORIES.index("gradient")) & (trace.step == 0)
    owners = sorted(trace.modules[m] for m in trace.module[gradient])
    assert owners == ["blocks.0.down", "blocks.0.up", "blocks.1.down", "blocks.1.up"]


def test_recomputation_in_the_backward_pass_is_a_phase_of_its_own_with_its_modules():
    trace = recorded(Net(recompute=True))
    recompute = trace.phase == PHASES.index("recompute")
    assert {trace.modules[m] for m in trace.module[recompute]} == {
        "blocks.0",
        "blocks.0.up",
        "blocks.1",
        "blocks.1.up",
    } or {trace.modules[m] for m in trace.module[recompute]} >= {"blocks.0.up", "blocks.1.up"}
    activation = trace.category == CATEGORIES.index("activation")
    assert (recompute & activation).any()


def test_recomputed_activations_are_those_that_were_dropped():
    plain, recomputed = recorded(Net()), recorded(Net(recompute=True))
    assert recomputed.max_by_category(1)["activation"] < plain.max_by_category(1)["activation"]


def test_a_cast_of_a_weight_made_by_autocast_is_a_weight_copy():
    model = Net()
    with Recorder(model) as recorder, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(16, 8)).float().square().mean().backward()
    # bfloat16 halves the four weights
    assert recorder.trace().max_by_category()["weight_copy"] == PARAMETER_BYTES // 2


def test_recording_changes_neither_losses_nor_weights():
    torch.manual_seed(0)
    bare = Net()
    watched = copy.deepcopy(bare)
    bare_losses = loop(bare, torch.optim.AdamW(bare.parameters()), steps=3)
    optimizer = torch.optim.AdamW(watched.parameters())
    with Recorder(watched, optimizer):
        watched_losses = loop(watched, optimizer, steps=3)
    assert bare_losses == watched_losses
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), watched.parameters(), strict=True))


def hook_counts(model):
    return (
        len(torch_module._global_forward_hooks),
        len(torch_module._global_forward_pre_hooks),
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
        [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    )


@pytest.mark.parametrize("fails", [False, True])
def test_every_hook_is_removed_afterwards(fails):
    model = Net()
    before = hook_counts(model)
    optimizer = torch.optim.SGD(model.parameters())
    try:
        with Recorder(model, optimizer):
            loop(model, optimizer)
            if fails:
                model(torch.ones(16, 5))
    except RuntimeError:
        assert fails
    assert hook_counts(model) == before


def test_a_failing_forward_is_shown_as_the_targets_own_error_with_its_line():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            raise ValueError("no such thing as a seventh head")

    workload = Workload(Fails(), [torch.ones(2, 3)], lambda m, x: m(x).sum(), torch.optim.SGD, StepPlan(), name="mine")
    before = hook_counts(workload.model)
    with pytest.raises(
        TargetError, match=r'"mine" failed: ValueError: no such thing as a seventh head \(at .*test_recorder.py'
    ) as caught:
        record(workload)
    assert isinstance(caught.value.__cause__, ValueError)
    assert hook_counts(workload.model) == before


def test_state_and_gradients_from_before_the_recording_are_included():
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    loop(model, optimizer, steps=1)
    model(torch.ones(16, 8)).sum().backward()
    with Recorder(model, optimizer) as recorder:
        torch.ones(1)
    at_start = recorder.trace().by_category(at=int(recorder.trace().mark_event[1]) - 1)
    assert at_start["gradient"] == PARAMETER_BYTES
    assert at_start["optimizer_state"] == 2 * PARAMETER_BYTES + 16


def test_a_recording_that_sees_record_stream_says_so():
    with Recorder(nn.Linear(4, 4)) as recorder, pytest.raises(NotImplementedError, match="record_stream"):
        torch.ones(2).record_stream(torch.Stream(device="cpu"))  # the operator is seen, although CPUs have none
    assert "record_stream was called" in " ".join(notes_of(recorder.trace()))


def test_a_recorder_is_entered_once_and_no_second_one_beside_it():
    model = Net()
    first, second = Recorder(model), Recorder(model)
    with first:
        with pytest.raises(UsageError, match=r"already been entered: create a new Recorder"), first:
            pass
        with pytest.raises(UsageError, match=r"already recording in this process.*leave it before"), second:
            pass
        model(torch.ones(16, 8))
    with pytest.raises(UsageError, match="already been entered"), first:
        pass
    assert first.trace().max_by_category()["parameter"] == PARAMETER_BYTES
    with second:  # a refused recorder can be entered later
        model(torch.ones(16, 8))
    assert second.trace().max_by_category()["parameter"] == PARAMETER_BYTES

"""Inference from stacks, compared with training steps whose memory is known byte for byte."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from histories import BASE, MIB, block, segment
from recorded_stacks import StackRecorder
from snapshots import FORWARD, dumped, entry, frame, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

from memscope.exchange.torch_reader import import_snapshot
from memscope.trace import CATEGORIES, PHASES

VOCAB, DIM, LAYERS, TOKENS, STEPS = 512, 64, 3, 96, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self, checkpointed=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, tokens):
        x = self.embed(tokens)
        for part in self.blocks:
            x = checkpoint(part, x, use_reentrant=False) if self.checkpointed else part(x)
        return self.head(x)


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens), tokens)


def plain(model, optimizer, tokens):
    optimizer.zero_grad()
    loss_of(model, tokens).backward()
    optimizer.step()


def zero_grad_between(model, optimizer, tokens):
    loss = loss_of(model, tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_grad_last(model, optimizer, tokens):
    loss_of(model, tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def clipped(model, optimizer, tokens):
    loss_of(model, tokens).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model, optimizer, tokens):
    for part in tokens.clone().chunk(2):
        loss_of(model, part).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_closure(model, optimizer, tokens):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        return loss

    optimizer.step(closure)


@cache
def trained(train_step, optimizer=torch.optim.AdamW, checkpointed=False):
    """The trace imported from the snapshot of three steps, and the model and optimizer they left."""
    with StackRecorder() as recorder:
        model = Model(checkpointed)
        updater = optimizer(model.parameters(), lr=0.1)
        for _ in range(STEPS):
            train_step(model, updater, torch.randint(0, VOCAB, (TOKENS,)))
    with tempfile.TemporaryDirectory() as folder:
        return import_snapshot(dumped(recorder.snapshot(), Path(folder))), model, updater


def rounded(*tensors):
    """Bytes of the blocks of tensors: multiples of 512. None here is in a segment's last, unsplit block."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


STEPS_OF_ALL_KINDS = [plain, zero_grad_between, zero_grad_last, clipped, accumulated, by_closure]


@pytest.mark.parametrize("train_step", STEPS_OF_ALL_KINDS, ids=lambda step: step.__name__)
def test_parameters_gradients_and_optimizer_state_are_found_to_the_byte(train_step):
    trace, model, optimizer = trained(train_step)
    parameters = list(model.parameters())
    state = [value for values in optimizer.state.values() for value in values.values()]
    most = trace.max_by_category()
    assert most["parameter"] == rounded(*parameters)
    assert most["gradient"] == rounded(*parameters), "every parameter has a gradient of its own size"
    assert most["optimizer_state"] == rounded(*state)


@pytest.mark.parametrize("train_step", STEPS_OF_ALL_KINDS, ids=lambda step: step.__name__)
def test_steps_are_counted_wherever_gradients_are_zeroed(train_step):
    trace, _, _ = trained(train_step)
    assert trace.steps == (0, 1, 2)
    micro_batches = {int(n) for n, step in zip(trace.mark_micro_batch, trace.mark_step, strict=True) if step == 1}
    assert micro_batches == ({0, 1} if train_step is accumulated else {0})


def test_steps_of_an_optimizer_that_allocates_nothing_are_counted_by_zero_grad():
    trace, model, _ = trained(zero_grad_last, torch.optim.SGD)
    assert trace.steps == (0, 1, 2)
    assert trace.max_by_category()["gradient"] == rounded(*model.parameters())


class OwnMomentum(torch.optim.Optimizer):
    """An optimizer that makes its state anew in each step, and a temporary."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"]):
            decayed = self.state[parameter].get("momentum", torch.zeros_like(parameter)) * 0.9
            self.state[parameter]["momentum"] = decayed + parameter.grad


def test_state_of_a_custom_optimizer_is_found_if_the_history_ends_with_its_step():
    trace, model, optimizer = trained(plain, OwnMomentum)
    assert PHASES[trace.mark_phase[-1]] == "optimizer"
    momentum = [state["momentum"] for state in optimizer.state.values()]
    assert len(momentum) == len(list(model.parameters()))
    assert trace.by_category(at=trace.events - 1)["optimizer_state"] == rounded(*momentum)


def test_memory_of_an_optimizer_step_that_ran_out_of_memory_is_not_called_state(tmp_path):
    step = frame("step", "/m/optim.py")
    held = entry("alloc", BASE, 512, step)
    assert [CATEGORIES[code] for code in trace_of(tmp_path, held).category] == ["optimizer_state"]
    ended = trace_of(tmp_path, held, entry("oom", 0, 30 * MIB, step))
    assert [CATEGORIES[code] for code in ended.category] == ["other"]


def test_activations_are_the_memory_left_by_the_forward_pass_when_the_backward_pass_begins():
    known = []

    def watched(model, optimizer, tokens):
        kept = {}

        def pack(tensor):
            kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(tokens)
            loss = F.cross_entropy(logits, tokens)
        for held in (logits, loss):  # by these names
            pack(held)
        for owned in (*model.parameters(), tokens):
            kept.pop(owned.untyped_storage()._cdata, None)
        known.append(sum(-(-size // 512) * 512 for size in kept.values()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    trace, _, _ = trained(watched)
    begins = next(
        int(event)
        for event, phase, step in zip(trace.mark_event, trace.mark_phase, trace.mark_step, strict=True)
        if PHASES[phase] == "backward" and step == 1
    )
    assert trace.timeline("activation")[begins - 1] == known[1]


def test_a_checkpointed_forward_pass_is_recomputed_within_the_backward_pass():
    whole, _, _ = trained(plain)
    trace, _, _ = trained(plain, checkpointed=True)
    phases = [PHASES[phase] for phase, step in zip(trace.mark_phase, trace.mark_step, strict=True) if step == 1]
    assert phases.count("recompute") == LAYERS
    assert phases.index("recompute") > phases.index("backward")
    assert trace.max_by_category()["activation"] < whole.max_by_category()["activation"]


def test_modules_are_named_for_the_calls_that_lead_to_them():
    trace, _, _ = trained(plain)
    here = f"{__name__.rpartition('.')[2]}"
    for module in trace.modules:
        assert module == "(unknown)" or module.split(":")[0].split(".")[0] in (
            here,
            "linear",
            "normalization",
            "sparse",
        )
    assert any(module.endswith(".linear") and module.startswith(here) for module in trace.modules)


# Histories whose stacks are missing.


def trace_of(tmp_path, *history, **more):
    return import_snapshot(dumped(snapshot([segment(block(20 * MIB, "inactive"))], list(history), **more), tmp_path))


def pair(address, *frames, **more):
    return [entry(action, address, 512, *frames, **more) for action in ("alloc", "free_requested", "free_completed")]


def test_a_history_without_stacks_gives_no_categories(tmp_path):
    trace = trace_of(tmp_path, *pair(BASE))
    assert [CATEGORIES[code] for code in trace.category] == ["other"]
    assert "the snapshot has no stacks" in trace.meta["imported"]["notes"][-1]


def test_an_allocation_without_a_stack_after_the_forward_pass_is_of_the_backward_pass(tmp_path):
    held = entry("alloc", BASE + 4096, 512)
    trace = trace_of(tmp_path, entry("alloc", BASE, 512, *FORWARD), held)
    assert [PHASES[phase] for phase in trace.phase] == ["forward", "backward"]
    assert [CATEGORIES[code] for code in trace.category] == ["activation", "gradient"]


def test_an_allocation_without_a_stack_before_any_forward_pass_is_of_the_setup(tmp_path):
    trace = trace_of(tmp_path, entry("alloc", BASE, 512), entry("alloc", BASE + 4096, 512, *FORWARD))
    assert [PHASES[phase] for phase in trace.phase] == ["setup", "forward"]


ANNOTATED = [("## forward ##", 0, 15), ("Optimizer.step#AdamW.step", 25, 35), ("## forward ##", 40, 55)]


def annotations(layout):
    """Blocks of `record_function` as PyTorch 2.5 and later record them, and as earlier versions do.

    Earlier: https://github.com/pytorch/pytorch/pull/124179 shows `{"name": "START", "filename": "## forward ##"}`.
    """
    noted = [
        (name, stage, time) for name, *times in ANNOTATED for stage, time in zip(("START", "END"), times, strict=True)
    ]
    if layout == "external":
        return {"external_annotations": [{"name": n, "stage": s, "device": 0, "time_us": t} for n, s, t in noted]}, []
    return {}, [entry("user_defined", 0, 0, frame(stage, name, 0), time_us=time) for name, stage, time in noted]


@pytest.mark.parametrize("layout", ["external", "user_defined"])
def test_annotations_give_phases_and_steps_if_stacks_do_not(tmp_path, layout):
    more, entries = annotations(layout)
    own_code = frame("main", "/m/train.py")
    history = [*pair(BASE, own_code, time_us=10), *pair(BASE, own_code, time_us=30), *pair(BASE, own_code, time_us=50)]
    data = snapshot([segment(block(20 * MIB, "inactive"))], sorted([*history, *entries], key=lambda e: e["time_us"]))
    if layout == "user_defined":
        del data["external_annotations"]
    trace = import_snapshot(dumped({**data, **more}, tmp_path))
    assert [PHASES[phase] for phase in trace.phase] == ["forward", "optimizer", "forward"]
    assert trace.step.tolist() == [0, 0, 1]


def test_an_optimizer_step_without_any_allocation_still_ends_the_step_where_it_is_annotated(tmp_path):
    more, _ = annotations("external")
    history = [*pair(BASE, *FORWARD, time_us=10), *pair(BASE, *FORWARD, time_us=50)]
    trace = import_snapshot(dumped({**snapshot([segment(block(20 * MIB, "inactive"))], history), **more}, tmp_path))
    assert trace.step.tolist() == [0, 1]


def test_a_history_that_begins_within_a_backward_pass_is_in_step_zero(tmp_path):
    backward = frame("backward", "/m/kernels.py")
    trace = trace_of(tmp_path, *pair(BASE, backward), *pair(BASE, frame("step", "/m/optim.py")), *pair(BASE, *FORWARD))
    assert trace.step.tolist() == [0, 0, 1]


def test_the_phases_of_a_trace_are_those_of_its_allocations():
    trace, _, _ = trained(plain)
    marks = np.array([trace.mark_at(int(event)) for event in trace.born])
    assert np.array_equal(trace.mark_phase[marks], trace.phase)
    assert np.array_equal(trace.mark_step[marks], trace.step)


def test_memory_of_compiled_code_belongs_to_its_region_if_no_module_is_known(tmp_path):
    backward, region = (
        frame("backward", "/x/torch/_functorch/_aot_autograd/runtime_wrappers.py"),
        "Torch-Compiled Region: 0/0",
    )
    history = [*pair(BASE, backward, compile_context=region), *pair(BASE, *FORWARD, compile_context=region)]
    trace = trace_of(tmp_path, *history, *pair(BASE, backward, compile_context="N/A"))
    assert [trace.modules[code] for code in trace.module] == [region, "model", "(unknown)"]

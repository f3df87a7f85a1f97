"""Training loops as people write them: steps, phases and inputs are recognized without hints."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from memscope import Recorder
from memscope.trace import CATEGORIES, PHASES

BATCH_BYTES = 16 * 8 * 4


def category_sizes(trace, category, *, op=None):
    chosen = trace.category == CATEGORIES.index(category)
    if op is not None:
        chosen &= [trace.ops[code].startswith(f"aten.{op}.") for code in trace.op]
    return sorted(int(size) for size in trace.size[chosen])


def steps_of(trace, phase):
    """Steps in which a phase was seen, each with its micro-batches."""
    seen = {}
    for p, step, micro_batch in zip(trace.mark_phase, trace.mark_step, trace.mark_micro_batch, strict=True):
        if PHASES[p] == phase:
            seen.setdefault(int(step), set()).add(int(micro_batch))
    return seen


def net():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))


def test_a_batch_and_its_labels_are_input_wherever_they_were_made():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    before = torch.ones(16, 8)  # exists before the recording
    with Recorder(model, optimizer) as recorder:
        for batch in (before, torch.zeros(16, 8)):
            target = torch.full((16, 8), 0.5)
            F.mse_loss(model(input=batch), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert category_sizes(recorder.trace(), "input") == [BATCH_BYTES] * 4


def test_a_moving_average_of_the_weights_is_not_an_activation():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        average = copy.deepcopy(model)
        for _ in range(3):
            model(torch.ones(16, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(weight, 0.1)
    trace = recorder.trace()
    assert category_sizes(trace, "activation", op="clone") == []
    assert category_sizes(trace, "other", op="clone") == sorted(p.nbytes for p in model.parameters())


def test_code_after_the_backward_pass_is_outside_any_phase_until_the_optimizer_steps():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        model(torch.ones(16, 8)).sum().backward()
        log = torch.ones(5)
        optimizer.step()
    trace = recorder.trace()
    born = trace.phase[trace.size == log.nbytes]
    assert [PHASES[phase] for phase in born] == ["outside"]


def test_optimizers_that_step_inside_the_backward_pass_end_one_step():
    model = net()
    optimizers = {parameter: torch.optim.AdamW([parameter]) for parameter in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with Recorder(model) as recorder:
        for _ in range(2):
            model(torch.ones(16, 8)).sum().backward()
            torch.ones(3)  # after the pass
    trace = recorder.trace()
    assert steps_of(trace, "forward") == steps_of(trace, "optimizer") == {0: {0}, 1: {0}}
    assert trace.max_by_category(1)["gradient"] == (8 * 32 + 32) * 4  # one backward makes those of weight and bias
    assert sum(category_sizes(trace, "optimizer_state")) == sum(2 * p.nbytes + 4 for p in model.parameters())
    assert {PHASES[p] for p in trace.phase[trace.category == CATEGORIES.index("optimizer_state")]} == {"optimizer"}
    assert [PHASES[p] for p in trace.phase[trace.size == 3 * 4]] == ["outside"] * 2


def test_steps_are_recognized_if_only_parts_of_the_model_are_called():
    model = nn.ModuleDict({"generator": net(), "critic": net()})
    optimizers = {name: torch.optim.SGD(part.parameters()) for name, part in model.items()}
    with Recorder(model) as recorder:
        for _ in range(2):
            made = model["generator"](torch.ones(16, 8))
            model["critic"](made.detach()).sum().backward()
            optimizers["critic"].step()
            optimizers["critic"].zero_grad()
            model["critic"](model["generator"](torch.ones(16, 8))).sum().backward()
            optimizers["generator"].step()
            optimizers["generator"].zero_grad()
    trace = recorder.trace()
    # Each optimizer.step() ends a step: two for the critic, two for the generator.
    assert steps_of(trace, "forward") == {0: {0}, 1: {0}, 2: {0}, 3: {0}}
    assert trace.max_by_category(step=3)["activation"] > 0


def test_a_training_step_method_of_the_model_is_a_forward_pass():
    class Lightning(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch):
            hidden = self.net(batch)
            return (hidden.exp() - batch).square().mean()

    model = Lightning()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            for _ in range(2):
                model.training_step(torch.ones(16, 8)).backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = recorder.trace()
    assert steps_of(trace, "forward") == {0: {0, 1}, 1: {0, 1}}
    exponential = trace.op == trace.ops.index("aten.exp.default")
    assert {PHASES[phase] for phase in trace.phase[exponential]} == {"forward"}
    # exp keeps its result for the backward pass.
    assert category_sizes(trace, "activation", op="exp") == [BATCH_BYTES] * 4


def test_a_model_that_is_called_by_a_wrapper_around_it_is_recognized():
    class Wrapper(nn.Module):  # like DistributedDataParallel, torch.compile and models with a loss of their own
        def __init__(self, model):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x).square().mean()

    model = net()
    wrapper = Wrapper(model)
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            wrapper(torch.ones(16, 8)).backward()
            optimizer.step()
    trace = recorder.trace()
    assert steps_of(trace, "forward") == {0: {0}, 1: {0}}
    assert category_sizes(trace, "activation", op="addmm").count(BATCH_BYTES) == 2


def test_a_loop_without_any_module_call_has_steps_and_activations():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            F.linear(torch.ones(16, 8), model.weight, model.bias).exp().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = recorder.trace()
    assert trace.steps == (0, 1)
    assert category_sizes(trace, "activation", op="exp") == [BATCH_BYTES] * 2
    assert category_sizes(trace, "input") == [BATCH_BYTES] * 2


def test_a_second_optimizer_step_begins_a_step_even_without_a_backward_pass():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)  # makes temporary tensors in every step
    with Recorder(model, optimizer) as recorder:
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert steps_of(recorder.trace(), "optimizer") == {0: {0}, 1: {0}, 2: {0}}


def test_two_optimizers_that_step_in_succession_share_a_step():
    model = net()
    optimizers = [torch.optim.SGD(model[0].parameters()), torch.optim.SGD(model[2].parameters())]
    with Recorder(model) as recorder:
        for _ in range(2):
            model(torch.ones(16, 8)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    assert recorder.trace().steps == (0, 1)


def test_after_an_optimizer_calls_the_model_the_phase_is_optimizer_again():
    model = nn.Linear(8, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(16, 8)).square().mean()
        loss.backward()
        return loss

    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            optimizer.step(closure)
    trace = recorder.trace()
    assert set(steps_of(trace, "forward")) == {0, 1}
    assert {0, 1} <= set(steps_of(trace, "optimizer"))


def test_a_validation_pass_is_not_a_step():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            model(torch.ones(16, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    model(torch.ones(16, 8))
            model.train()
    trace = recorder.trace()
    assert trace.steps == (0, 1)
    assert steps_of(trace, "forward") == {0: {0}, 1: {0}}


def test_the_gradient_of_a_weight_unfrozen_during_the_recording_is_a_gradient():
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for step in range(3):
            model[0].requires_grad_(step > 0)
            model(torch.ones(16, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    trace = recorder.trace()
    all_weights = sum(p.nbytes for p in model.parameters())
    assert trace.max_by_category(step=0)["gradient"] == sum(p.nbytes for p in model[2].parameters())
    assert trace.max_by_category(step=2)["gradient"] == all_weights
    assert trace.max_by_category()["other"] == 0


def test_a_module_added_during_the_recording_has_parameters_and_a_name():
    model = net()
    with Recorder(model) as recorder:
        model.append(nn.Linear(8, 64, bias=False))
        model(torch.ones(16, 8)).sum().backward()
    trace = recorder.trace()
    parameters = trace.by("category", "module", at="peak")
    assert parameters["parameter", "3"] == 64 * 8 * 4


def test_a_gradient_penalty_belongs_to_its_micro_batch():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        x = torch.ones(16, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (model(x).mean() + slope.square().mean()).backward()
        optimizer.step()
    assert steps_of(recorder.trace(), "forward") == {0: {0}}


def test_forward_is_forward_in_every_micro_batch_although_nothing_runs_between_backward_and_forward():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    batch = torch.ones(16, 8)
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            for _ in range(3):
                model(batch).backward(torch.ones(16, 8))
            optimizer.step()
            optimizer.zero_grad()
    trace = recorder.trace()
    assert steps_of(trace, "forward") == {0: {0, 1, 2}, 1: {0, 1, 2}}
    linear = [i for i in range(len(trace)) if trace.ops[trace.op[i]] == "aten.addmm.default"]
    assert {PHASES[trace.phase[i]] for i in linear} == {"forward"}
    assert len(linear) == 2 * 2 * 3  # two layers, steps, micro-batches


def phases_of(trace, *, op):
    return [PHASES[trace.phase[i]] for i in range(len(trace)) if trace.ops[trace.op[i]].startswith(f"aten.{op}.")]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_backward_pass_that_creates_a_graph_is_a_backward_pass():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for _ in range(2):
            for _ in range(2):
                model(torch.ones(16, 8)).square().mean().backward(create_graph=True)
            optimizer.step()
            optimizer.zero_grad()
    trace = recorder.trace()
    assert steps_of(trace, "recompute") == {}
    assert steps_of(trace, "forward") == {0: {0, 1}, 1: {0, 1}}
    assert set(phases_of(trace, op="threshold_backward")) == {"backward"}  # the gradient of ReLU


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_in_a_backward_pass_that_creates_a_graph_a_checkpointed_layer_is_recomputed():
    first, relu, second = net()
    model = nn.ModuleList([first, relu, second])
    with Recorder(model) as recorder:
        hidden = checkpoint(nn.Sequential(first, relu), torch.ones(16, 8), use_reentrant=False)
        second(hidden).square().mean().backward(create_graph=True)
    trace = recorder.trace()
    assert phases_of(trace, op="relu") == ["forward", "recompute"]
    assert set(phases_of(trace, op="threshold_backward")) == {"backward"}


def test_what_a_created_graph_keeps_for_the_second_backward_pass_is_an_activation():
    model = nn.Linear(8, 8)
    with Recorder(model) as recorder:
        x = torch.ones(16, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).exp().sum(), x, create_graph=True)
        slope.square().sum().backward()
    # exp keeps its result for the first pass; that pass multiplies it by the incoming gradient of ones, and keeps the
    # product, a new tensor, for the second pass: d(ones * exp) @ weight.
    trace = recorder.trace()
    products = [
        i for i in range(len(trace)) if trace.ops[trace.op[i]] == "aten.mul.Tensor" and trace.size[i] == 16 * 8 * 4
    ]
    assert (PHASES[trace.phase[products[0]]], CATEGORIES[trace.category[products[0]]]) == ("backward", "activation")


def test_what_a_created_graph_does_not_keep_is_temporary():
    model = net()
    with Recorder(model) as recorder:
        x = torch.ones(16, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
    # The gradient of the hidden layer [16, 32] comes from mm; the derivative of ReLU needs its sign pattern alone.
    trace = recorder.trace()
    incoming = next(
        i for i in range(len(trace)) if trace.ops[trace.op[i]] == "aten.mm.default" and trace.size[i] == 16 * 32 * 4
    )
    assert (PHASES[trace.phase[incoming]], CATEGORIES[trace.category[incoming]]) == ("backward", "temporary")


def test_gradients_that_the_loop_sets_itself_are_gradients():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters())
    with Recorder(model, optimizer) as recorder:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert category_sizes(recorder.trace(), "gradient") == [8 * 4, 8 * 8 * 4]

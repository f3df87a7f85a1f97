"""A simulation leaves the user's own tensors as they were, and refuses a step that trains nothing."""

import copy

import pytest
import torch
from torch import nn

from memscope import Workload, record, simulate
from memscope.errors import TargetError


class Counting(nn.Module):
    """Changes a buffer by assignment, one in place and a parameter in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.average = nn.Buffer(torch.zeros(8))
        self.calls = nn.Buffer(torch.zeros(3))

    def forward(self, x):
        y = self.norm(self.linear(x))
        self.average = 0.9 * self.average + y.detach().mean(0)
        self.calls.add_(1)
        with torch.no_grad():
            self.scale.mul_(2)
        return y * self.scale


def workload(model, loss):
    return Workload(
        model=model, batches=[torch.ones(4, 8)], loss=loss, optimizer_factory=torch.optim.AdamW, name="mine"
    )


def assert_unchanged(model, before, gradient):
    assert all(type(tensor) is nn.Parameter for tensor in model.parameters())
    assert all(type(buffer) in (torch.Tensor, nn.Buffer) for buffer in model.buffers())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.linear.weight.grad is gradient
    assert all(p.grad is None for p in model.parameters() if p is not model.linear.weight)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["the trained model", "another model"])
def test_a_loss_that_uses_a_real_model_leaves_it_as_it_was(device, is_trained):
    used = Counting()
    used.linear.weight.grad = gradient = torch.ones(8, 8)
    before = copy.deepcopy(used.state_dict())
    trained = used if is_trained else nn.Linear(8, 8)
    with pytest.raises(TargetError, match="compute the loss with the model that loss"):
        simulate(workload(trained, lambda model, x: used(x).square().mean()), device=device)
    if not is_trained:  # an assignment to another model's attribute cannot be noticed
        used.average = before["average"]
    assert_unchanged(used, before, gradient)


def test_a_loss_that_uses_both_models_is_simulated_and_leaves_both_as_they_were():
    used, trained = Counting(), Counting()
    before = copy.deepcopy(used.state_dict()), copy.deepcopy(trained.state_dict())

    def loss(model, x):
        return (model.linear(x) + used.norm(used.linear(x))).square().mean()

    trace = simulate(workload(trained, loss))
    assert trace.max_by_category()["gradient"] > 0
    for model, state in zip((used, trained), before, strict=True):
        assert_unchanged(model, state, None)


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_a_build_that_returns_a_model_made_elsewhere_leaves_it_as_it_was(device):
    model = Counting()
    model.linear.weight.grad = gradient = torch.ones(8, 8)
    before = copy.deepcopy(model.state_dict())
    trace = simulate(
        lambda: workload(model, lambda model, x: model.norm(model.linear(x)).sum()), device=device, strategies="bf16"
    )
    assert trace.max_by_category()["optimizer_state"] > 0
    assert_unchanged(model, before, gradient)


def test_an_error_in_the_target_leaves_its_model_as_it_was():
    model = Counting()
    before = copy.deepcopy(model.state_dict())

    def loss(given, x):
        model(x).sum().backward()
        raise KeyError("lost")

    with pytest.raises(TargetError, match="KeyError"):
        simulate(workload(model, loss))
    assert_unchanged(model, before, None)


def test_a_real_run_refuses_a_step_that_trains_nothing_too():
    other = nn.Linear(8, 8)
    with pytest.raises(TargetError, match='"mine" gave none of the 2 tensors that the optimizer updates a gradient'):
        record(workload(nn.Linear(8, 8), lambda model, x: other(x).mean()))


@pytest.mark.parametrize("run", [simulate, record])
def test_an_optimizer_in_the_backward_pass_takes_the_gradients_and_is_allowed(run):
    def build():
        model = nn.Linear(8, 8)
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter])

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                parameter.grad = None

            parameter.register_post_accumulate_grad_hook(step)
        return workload(model, lambda model, x: model(x).mean())

    assert len(run(build).steps) == 2

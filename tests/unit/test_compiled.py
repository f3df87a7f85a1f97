"""torch.compile: simulated and recorded as eager code, with a note that says so."""

import warnings

import pytest
import torch
from torch import nn

from memscope import Recorder, Workload, record, simulate
from memscope.hooks.compiled import RAN_EAGERLY


@torch.compile
def squared(x):
    return x.square().mean()


def workload(model, loss=lambda model, x: model(x).square().mean()):
    return Workload(model=model, batches=[torch.ones(4, 8)], loss=loss, optimizer_factory=torch.optim.AdamW)


def layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def compiled_in_place():
    model = layers()
    model.compile()
    return model


BUILDS = {
    "a compiled model": lambda: workload(torch.compile(layers())),
    "a model compiled in place": lambda: workload(compiled_in_place()),
    "a compiled function": lambda: workload(layers(), lambda model, x: squared(model(x))),
    "compiled in the loss": lambda: workload(layers(), lambda model, x: torch.compile(model)(x).square().mean()),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("run", [simulate, record])
def test_a_compiled_program_has_the_allocations_of_the_eager_one_and_a_note(run, build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of the recorder's own hooks
        trace = run(build)
    eager = run(lambda: workload(layers()))
    assert trace.meta["notes"] == [RAN_EAGERLY]
    assert trace.size.tolist() == eager.size.tolist()
    assert [trace.ops[i] for i in trace.op] == [eager.ops[i] for i in eager.op]
    assert "notes" not in eager.meta


def test_a_training_loop_with_a_compiled_model_is_recorded_as_eager_and_compiles_again_afterwards():
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    model = layers()
    compiled = torch.compile(model, backend=backend)
    with Recorder(model) as recorder:
        compiled(torch.ones(4, 8)).mean().backward()
    assert recorder.trace().meta["notes"] == [RAN_EAGERLY]
    assert not calls
    filters = list(warnings.filters)
    with Recorder(model):
        pass
    assert warnings.filters == filters
    compiled(torch.ones(4, 8))
    assert calls

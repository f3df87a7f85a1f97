"""`simulate` on a user's own workload: real models are unchanged, and unsupported code is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memscope import StepPlan, Workload, record, simulate
from memscope.errors import TargetError, UsageError


def workload(model=None, loss=lambda m, x: m(x).square().mean(), **changes):
    settings = {
        "model": model or nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        "batches": [torch.ones(4, 8)],
        "loss": loss,
        "optimizer_factory": torch.optim.AdamW,
        "name": "mine",
    }
    return Workload(**{**settings, **changes})


def test_a_real_model_is_simulated_without_being_changed():
    real = workload()
    before = {name: value.clone() for name, value in real.model.state_dict().items()}
    trace = simulate(real, device="cpu", strategies="lora:r=2,targets=0")
    assert trace.meta["parameters"]["total"] == 2 * (64 + 8) + 2 * (2 * 8)
    assert list(real.model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in real.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in real.model.parameters())


def test_tied_weights_are_one_allocation_in_a_copy_as_well():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert simulate(workload(model), device="cpu").max_by_category(0)["parameter"] == 8 * 8 * 4


def test_a_model_too_large_for_any_machine_takes_no_memory():
    def build():
        return workload(
            nn.Linear(2**20, 2**20, bias=False), batches=[torch.ones(1, 8)], loss=lambda m, x: m.weight.sum()
        )

    assert simulate(build).max_by_category()["parameter"] == 2**42


@pytest.mark.parametrize("move", [lambda m: m.to("cuda"), lambda m: m.cuda(), lambda m: m.to(torch.device("cuda", 0))])
def test_a_target_that_names_the_gpu_is_simulated_on_fake_tensors(move):
    def build():
        def loss(model, x):
            assert x.to("cuda", non_blocking=True) is x, "the tensor is already there"
            return (model(x.cuda()) + torch.arange(8, device="cuda")).sum()

        model = nn.Linear(8, 8)
        return workload(move(model), loss=loss)

    plain = simulate(lambda: workload(nn.Linear(8, 8)))
    assert simulate(build).max_by_category(1)["parameter"] == plain.max_by_category(1)["parameter"]


def test_a_model_can_be_converted_while_it_is_built_and_stays_tied():
    def build():
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        model[1].weight = model[0].weight
        return workload(model.to(torch.bfloat16).half().to(torch.bfloat16), batches=[torch.ones(4, 64).bfloat16()])

    assert simulate(build, device="cpu").max_by_category(0)["parameter"] == 64 * 64 * 2


@pytest.mark.parametrize(
    ("convert", "item_bytes"),
    [
        (lambda m: m.cuda().bfloat16(), 2),
        (lambda m: m.to("cpu").bfloat16(), 2),
        (lambda m: m.bfloat16().float(), 4),
        (lambda m: m.double().half(), 2),
    ],
)
def test_every_conversion_of_a_model_counts(convert, item_bytes):
    def build():
        dtype = {2: torch.bfloat16, 4: torch.float32}[item_bytes]
        model = convert(nn.Linear(64, 64, bias=False))
        return workload(model, batches=[torch.ones(4, 64)], loss=lambda m, x: m.weight.sum().to(dtype))

    assert simulate(build).max_by_category(0)["parameter"] == 64 * 64 * item_bytes


def test_a_model_built_by_copying_layers_is_simulated_as_it_runs():
    # nn.TransformerEncoder deep-copies its layer.
    def build():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        return workload(encoder, batches=[torch.ones(2, 5, 16)], loss=lambda m, x: m(x).sum())

    simulated, run = simulate(build, device="cpu"), record(build)
    assert simulated.max_by_category(1)["parameter"] == run.max_by_category(1)["parameter"]
    assert simulated.max_by_category(1)["optimizer_state"] == run.max_by_category(1)["optimizer_state"]
    assert simulated.peak.allocated_bytes == run.peak.allocated_bytes


def test_progress_counts_the_micro_batches_of_all_steps():
    seen = []
    simulate(
        workload(plan=StepPlan(micro_batches=2)),
        steps=2,
        device="cpu",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_two_simulations_of_one_workload_are_identical():
    one, other = simulate(workload), simulate(workload)
    assert one.size.tolist() == other.size.tolist()
    assert one.freed.tolist() == other.freed.tolist()


def test_reading_a_value_in_a_simulation_is_refused_with_the_users_line():
    def loss(model, x):
        value = model(x).square().mean()
        print(value.item())
        return value

    with pytest.raises(
        TargetError,
        match=r"needs the value of a tensor.*at .*test_simulate.py:\d+, in loss: print\(value.item\(\)\).*--device cpu",
    ):
        simulate(workload(loss=loss), assume="refuse")


def test_a_shape_that_depends_on_data_is_named_with_the_users_line():
    with pytest.raises(TargetError, match=r"nonzero.*in <lambda>"):
        simulate(workload(loss=lambda m, x: m(x)[m(x) > 0].sum()), assume="refuse")


def test_an_operator_without_a_fake_implementation_is_named():
    library = torch.library.Library("memscope_test", "DEF")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", lambda x: x.clone(), "CPU")
    try:
        with pytest.raises(TargetError, match=r"memscope_test.opaque.*no fake implementation.*register_fake"):
            simulate(workload(loss=lambda m, x: torch.ops.memscope_test.opaque(m(x)).sum()))
    finally:
        library._destroy()


def test_an_error_while_building_is_the_targets_own():
    def build():
        raise KeyError("hidden_size")

    with pytest.raises(TargetError, match="KeyError: 'hidden_size'"):
        simulate(build)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "no batch"),
        ({"batches": iter([torch.ones(4, 8)])}, "not a sequence: give a list"),
        ({"plan": StepPlan(micro_batches=3)}, "4 samples cannot be split into 3"),
        ({"model": nn.Identity()}, "no trainable parameter"),
    ],
)
def test_a_workload_that_cannot_be_trained_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        simulate(workload(**changes))


def test_an_optimizer_that_cannot_be_built_is_the_targets_own_error():
    with pytest.raises(TargetError, match="optimizer cannot be built: ValueError: Invalid learning rate: -1"):
        simulate(workload(optimizer_factory=lambda p: torch.optim.AdamW(p, lr=-1)))


def test_an_optimizer_of_other_parameters_is_refused():
    other = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="none of the model's trainable parameters"):
        simulate(workload(optimizer_factory=lambda p: torch.optim.AdamW(other.parameters())))


def test_an_unknown_device_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="a100-40gb"):
        simulate(workload(), device="a100-40g")


def test_float16_training_steps_although_no_gradient_can_be_checked_for_overflow():
    trace = simulate(workload(loss=lambda m, x: F.mse_loss(m(x), x)), strategies="amp:dtype=fp16")
    assert trace.max_by_category(1)["optimizer_state"] > 0


@pytest.mark.parametrize("bound", [3.0, 0.01])  # PyTorch 2.13 samples in two ways, and reads values in both
def test_weights_drawn_from_a_truncated_normal_distribution_are_simulated(bound):
    def build():
        model = nn.Linear(8, 8)
        nn.init.trunc_normal_(model.weight, a=-bound, b=bound)
        return Workload(model, [torch.ones(2, 8)], lambda m, x: m(x).sum(), lambda p: torch.optim.SGD(p, lr=0.1))

    assert simulate(build).peak.allocated_bytes > 0
    assert nn.init.trunc_normal_(torch.zeros(1000), a=-bound, b=bound).abs().max() <= bound  # afterwards as before


def test_a_default_dtype_that_the_target_changes_decides_the_dtype_of_quotients_of_integers():
    found = []

    def loss(model, x):
        count = (x > 0).sum()
        found.append((count / 2).dtype)
        torch.set_default_dtype(torch.float64)
        try:
            found.append((count / 2).dtype)
        finally:
            torch.set_default_dtype(torch.float32)
        return model(x).square().mean()

    simulate(workload(loss=loss), device="cpu", steps=1)
    assert found == [torch.float32, torch.float64]

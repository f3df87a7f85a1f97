"""A plan in a program: each optimizer that is built, and the model that it trains, are changed."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from memscope.errors import UsageError
from memscope.program.applied_plan import AppliedPlan
from memscope.strategies import Plan
from memscope.strategies.ckpt.recompute import Recomputed
from memscope.strategies.lora.adapted import LoRALinear


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.q(self.norm(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def groups_of(model):
    """Weights with decay, as most programs give them, and biases and norms without."""
    matrices = [one for one in model.parameters() if one.dim() > 1]
    vectors = [one for one in model.parameters() if one.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]


def test_adapters_join_the_group_of_the_weights_that_they_update_and_frozen_parameters_leave():
    with AppliedPlan(Plan.parse("lora:targets=q,r=2")) as applied:
        model = Model()
        optimizer = torch.optim.AdamW(groups_of(model), lr=0.25)
        applied.require_use(built=True)
    adapters = [p for layer in model.layers for p in (layer.q.lora_a, layer.q.lora_b)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 0]
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], adapters, strict=True))
    assert [(group["weight_decay"], group["lr"]) for group in optimizer.param_groups] == [(0.5, 0.25), (0.0, 0.25)]
    assert not model.layers[0].q.weight.requires_grad
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4
    assert applied.notes == []


def test_named_parameters_keep_their_names():
    with AppliedPlan(Plan.parse("lora:targets=q,r=2")):
        model = Model()
        optimizer = torch.optim.AdamW(model.named_parameters())
    names = [f"layers.{layer}.q.lora_{side}" for layer in (0, 1) for side in "ab"]
    assert optimizer.param_groups[0]["param_names"] == names


def test_the_implementation_of_the_optimizer_is_that_of_the_plan_and_its_options_stay():
    with AppliedPlan(Plan.parse("optim:foreach=false")):
        model = Model()
        optimizer = torch.optim.AdamW(groups_of(model), lr=0.25, fused=True)
    assert [(g["fused"], g["foreach"], g["lr"]) for g in optimizer.param_groups] == [(False, False, 0.25)] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    # What a gradient scaler asks for: the other implementations fail if it hands them its scale.
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()


def test_an_optimizer_without_the_implementation_is_refused_when_the_program_trains():
    with AppliedPlan(Plan.parse("optim:fused")) as applied:
        model = Model()
        torch.optim.Adadelta(model.parameters())
        with pytest.raises(UsageError, match='optim: the optimizer Adadelta has no "fused" argument'):
            applied.require_use(built=False)


def test_the_programs_object_becomes_the_optimizer_that_the_plan_names():
    with AppliedPlan(Plan.parse("optim:sgd,momentum=0.5")):
        model = Model()
        optimizer = torch.optim.AdamW(groups_of(model), lr=0.25)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert type(optimizer) is torch.optim.SGD
    assert [(g["momentum"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.25, 0.5),
        (0.5, 0.25, 0.0),
    ]
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.125, 0.125]
    assert {key for state in optimizer.state.values() for key in state} == {"momentum_buffer"}


class Later(torch.optim.AdamW):
    """An optimizer of the program's own, defined before the plan is applied."""


def test_every_class_of_optimizer_is_followed_and_left_as_it_was():
    constructors = torch.optim.SGD.__init__, Later.__init__
    with AppliedPlan(Plan.parse("ckpt")):

        class Own(torch.optim.Optimizer):
            def __init__(self, params):
                super().__init__(params, {"lr": 1.0})

        models = [Model(), Model(), Model()]
        Own(models[0].parameters())
        Later(models[1].parameters())
        torch.optim.SGD(models[2].parameters())
    assert all(type(layer.forward) is Recomputed for model in models for layer in model.layers)
    assert (torch.optim.SGD.__init__, Later.__init__) == constructors
    unchanged = Model()
    Own(unchanged.parameters())
    assert "forward" not in vars(unchanged.layers[0])


def test_two_optimizers_of_one_model_change_it_once():
    with AppliedPlan(Plan.parse("ckpt,optim:foreach=false")):
        model = Model()
        optimizers = [torch.optim.AdamW([group]) for group in groups_of(model)]
    assert type(model.layers[0].forward) is Recomputed
    assert type(model.layers[0].forward.forward) is not Recomputed
    assert [one.param_groups[0]["foreach"] for one in optimizers] == [False, False]


def test_an_optimizer_that_is_left_with_nothing_to_train_is_an_error():
    with AppliedPlan(Plan.parse("lora:targets=q")):
        groups = groups_of(model := Model())
        torch.optim.SGD([groups[0]])
        assert isinstance(model.layers[0].q, LoRALinear)
        with pytest.raises(UsageError, match='"lora:targets=q" leaves the optimizer AdamW nothing to train'):
            torch.optim.AdamW([groups[1]])


def test_a_model_that_the_plan_does_not_suit_is_named_if_it_suits_another():
    with AppliedPlan(Plan.parse("ckpt")) as applied:
        model, other = Model(), nn.Linear(8, 8)
        torch.optim.Adam(other.parameters())
        with pytest.raises(
            UsageError, match='"ckpt" cannot be applied to "Linear": ckpt: layers=all: the model has no'
        ):
            applied.require_use(built=False)
        torch.optim.SGD(model.parameters())
        applied.require_use(built=True)
    (note,) = applied.notes
    assert note.startswith('The plan "ckpt" was not applied to the parameters of Adam: ')


def test_a_program_without_an_optimizer_of_torch_is_refused_once_one_must_exist():
    applied = AppliedPlan(Plan.parse("lora"))
    applied.require_use(built=False)
    with pytest.raises(UsageError, match='"lora" was not applied: the program has built no torch'):
        applied.require_use(built=True)


def test_bfloat16_converts_the_model_and_its_inputs():
    with AppliedPlan(Plan.parse("bf16")):
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters())
    assert model(torch.randn(2, 8)).dtype is torch.bfloat16
    assert all(one is other for one, other in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


def test_a_model_that_checkpoints_already_is_noted():
    with AppliedPlan(Plan.parse("ckpt")) as applied:
        model = Model()
        torch.optim.AdamW(model.parameters())
        assert applied.notes == []
        model.layers[0].gradient_checkpointing = True
    (note,) = applied.notes
    assert note.startswith("Model checkpoints activations by itself (gradient_checkpointing)")


def test_bfloat16_weights_are_refused_beside_a_gradient_scaler():
    model = Model()
    with AppliedPlan(Plan.parse("bf16")) as applied:
        torch.optim.AdamW(model.parameters())
        applied.require_use(built=False)
        scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(UsageError, match="bf16: the program scales its loss with a GradScaler"):
            applied.require_use(built=True)
        del scaler


@pytest.mark.parametrize(
    ("plan", "framework", "flag"),
    [
        ("ga:steps=4", "transformers.trainer", "pass gradient_accumulation_steps=4 to TrainingArguments"),
        ("ga", "lightning.pytorch", "pass accumulate_grad_batches=8 to Trainer"),
        ("ga", "accelerate.state", "pass gradient_accumulation_steps=8 to Accelerator"),
        ("ga", None, "call backward() on 8 batches whose size, and whose loss, is divided by 8"),
        ("amp:dtype=bf16", "transformers.trainer", "pass bf16=True to TrainingArguments"),
        ("amp", "pytorch_lightning", 'pass precision="16-mixed" to Trainer'),
        ("amp", "accelerate.state", 'pass mixed_precision="fp16" to Accelerator'),
        ("backward-step", "transformers.trainer", "in the parameter's register_post_accumulate_grad_hook"),
        ("offload", None, "torch.autograd.graph.save_on_cpu(pin_memory=True)"),
        ("offload:optimizer", None, "torchao.optim.CPUOffloadOptimizer"),
        ("amp", None, 'torch.autocast("cuda", dtype=torch.float16), and scale the loss with torch.amp.GradScaler'),
    ],
)
def test_a_strategy_of_the_loop_is_refused_with_the_flag_that_does_it_there(plan, framework, flag, monkeypatch):
    for name in ("transformers.trainer", "lightning.pytorch", "pytorch_lightning", "accelerate.state"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if framework:
        used = SimpleNamespace(AcceleratorState=SimpleNamespace(_shared_state={"device": "cpu"}))
        monkeypatch.setitem(sys.modules, framework, used)
    with AppliedPlan(Plan.parse(plan)), pytest.raises(UsageError, match="changes the training loop") as refused:
        torch.optim.AdamW(Model().parameters())
    assert flag in str(refused.value)


def test_what_could_be_changed_is_told_for_all_models():
    with AppliedPlan(Plan(), asks=("optim", "bf16", "ckpt", "lora", "ga")) as asked:
        model, other, second = Model(), nn.Linear(8, 8), Model()
        groups = groups_of(model)
        optimizers = [torch.optim.AdamW([group], foreach=False) for group in groups]
        one_model = asked.offers
        optimizers.append(torch.optim.AdamW(other.parameters(), foreach=False))
        assert asked.offers.layers == one_model.layers == ("layers.0", "layers.1")
        optimizers.append(torch.optim.SGD(second.parameters()))
    assert [one_model.optimizers, asked.offers.optimizers] == [2, 4]
    assert one_model.model["class"] == "Model"
    exact = {offer.spec for offer in one_model.strategies if offer.is_exact}
    assert exact == {"optim:fused", "ckpt"}
    assert {"bf16", "lora", "optim:adamw-8bit"} <= {offer.spec for offer in one_model.strategies if not offer.is_exact}
    assert (asked.offers.layered, asked.offers.layers) == (("Model", "Model"), ())
    assert type(model.layers[0].forward) is not Recomputed

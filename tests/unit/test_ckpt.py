"""Activation checkpointing: which layers are chosen, and that nothing but memory and work changes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.ckpt.layers import chosen_layers, named_layers
from memscope.testing import toy_workload
from memscope.workload.description import Workload


def toy(plan: str = "", *, dropout: float = 0.0, blocks: int = 2) -> Workload:
    torch.manual_seed(0)
    workload = toy_workload(dropout=dropout)
    layers = workload.model.get_submodule("blocks")
    assert isinstance(layers, nn.ModuleList)
    layers.extend(copy.deepcopy(layers[0]) for _ in range(blocks - 2))
    Plan.parse(plan).apply(workload)
    return workload


def loss_of(workload: Workload, seed: int = 1) -> Tensor:
    """Forward and backward over the whole batch; the gradients are left in the model."""
    (batch,) = workload.split(workload.batches[0], 1)
    torch.manual_seed(seed)
    loss = workload.loss(workload.model, batch)
    loss.backward()
    return loss.detach()


def gradients(workload: Workload) -> dict[str, Tensor]:
    return {name: p.grad for name, p in workload.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every-1", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("every-2", [0, 2, 4, 6]),
        ("every-3", [0, 3, 6]),
        ("every-9", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("7", [7]),
        ("6+1+3", [1, 3, 6]),
        ("2+2-4+4", [2, 3, 4]),
        ("every-4+6-7", [0, 4, 6, 7]),
    ],
)
def test_a_choice_of_layers_means(text: str, expected: list[int]) -> None:
    assert chosen_layers(text, 8) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8", '"8" is outside the model: it has layers 0 to 7'),
        ("3+6-8", '"6-8" is outside the model: it has layers 0 to 7'),
        ("5-3", '"5-3" runs backwards: write 3-5'),
        ("every-0", '"every-0" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'),
        ("-1", '"-1" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'),
        ("1+", '"" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'),
        ("first", '"first" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'),
    ],
)
def test_a_choice_that_cannot_be_read_or_is_not_there_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_layers(text, 8)
    assert str(caught.value) == message
    with pytest.raises(UsageError) as caught:
        toy(f"ckpt:layers={text}", blocks=8)
    assert (
        str(caught.value) == f'the plan "ckpt:layers={text}" cannot be applied to "toy": ckpt: layers={text}: {message}'
    )


class Attention(nn.Sequential):
    """A layer of another class."""


def layer(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def stage(width: int) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(layer(width) for _ in range(2))
    return model


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({"encoder": [layer(), layer()], "decoder": [layer()]}, ["encoder.0", "encoder.1", "decoder.0"]),
        ({"layers": [layer(), Attention(*layer()), layer()]}, ["layers.0", "layers.1", "layers.2"]),
        ({"layers": [layer()]}, ["layers.0"]),
        ({"layers": [layer(), layer()], "heads": [nn.Linear(99, 99)] * 2}, ["layers.0", "layers.1"]),
        ({"mlp": [nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9)], "layers": [layer()]}, ["layers.0"]),
        ({"stack": [nn.Linear(2, 2), nn.Linear(2, 2)], "mlp": [nn.Linear(2, 2), nn.Tanh()]}, ["stack.0", "stack.1"]),
        ({"stages": [stage(2), stage(9)]}, [f"stages.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)]),
        ({"layers": [stage(4), stage(4)]}, ["layers.0", "layers.1"]),  # alike: layers that hold lists
        ({"parts": [stage(4), layer()]}, ["parts.0.blocks.0", "parts.0.blocks.1"]),  # different parts of a model
        ({"nested": [nn.ModuleList([layer(), layer()])]}, ["nested.0.0", "nested.0.1"]),  # a list is never called
    ],
)
def test_the_layers_are_those_of_all_lists_of_repeated_layers(
    lists: dict[str, list[nn.Module]], expected: list[str]
) -> None:
    model = nn.Module()
    for name, modules in lists.items():
        setattr(model, name, nn.ModuleList(modules))
    assert list(named_layers(model)) == expected


def test_a_list_with_two_names_counts_once() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([layer(), layer()])
    model.backbone = nn.ModuleDict({"layers": model.layers})
    assert list(named_layers(model)) == ["layers.0", "layers.1"]


def test_indices_count_through_all_lists_or_through_those_that_are_named() -> None:
    def recomputed(plan: str) -> list[str]:
        model = nn.Module()
        model.encoder, model.decoder = (nn.ModuleList([layer(), layer()]) for _ in range(2))
        Plan.parse(plan).apply(Workload(model, [], lambda m, x: m(x), torch.optim.SGD))
        return [name for name, module in model.named_modules() if "forward" in vars(module)]

    assert recomputed("ckpt:layers=1-2") == ["encoder.1", "decoder.0"]
    assert recomputed("ckpt:layer-list=decoder,layers=0") == ["decoder.0"]
    assert recomputed("ckpt:layer-list=decoder+encoder,layers=0-2") == ["encoder.0", "decoder.0", "decoder.1"]


def test_a_model_without_layers_is_refused_in_words() -> None:
    workload = Workload(nn.Linear(2, 2), [torch.ones(1, 2)], lambda m, x: m(x).sum(), torch.optim.SGD)
    with pytest.raises(
        UsageError, match=r"ckpt: layers=all: the model has no list of repeated layers .* to choose from$"
    ):
        Plan.parse("ckpt").apply(workload)


def count_calls(workload: Workload) -> Counter[int]:
    """Calls of a module inside each layer, in one forward and backward pass."""
    calls: Counter[int] = Counter()
    for index, layer in enumerate(named_layers(workload.model).values()):
        inside = layer.get_submodule("up")
        inside.register_forward_pre_hook(lambda module, args, index=index: calls.update([index]))
    loss_of(workload)
    return calls


@pytest.mark.parametrize(
    ("layers", "recomputed"), [("all", {0, 1, 2, 3, 4}), ("every-2", {0, 2, 4}), ("1-2", {1, 2}), ("3", {3})]
)
def test_the_chosen_layers_and_no_others_run_twice(layers: str, recomputed: set[int]) -> None:
    calls = count_calls(toy(f"ckpt:layers={layers}", blocks=5))
    assert calls == {index: 2 if index in recomputed else 1 for index in range(5)}


def test_a_layer_that_is_used_several_times_is_recomputed_once_for_each_use() -> None:
    workload = toy()
    blocks = workload.model.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    blocks[1] = blocks[0]
    Plan.parse("ckpt").apply(workload)
    # Both uses, forward and recomputed. The hooks are there twice: once for each place in the list.
    assert count_calls(workload) == {0: 4, 1: 4}


@pytest.mark.parametrize("others", ["", "amp:dtype=bf16", "amp:dtype=fp16", "lora:dropout=0.5"])
@pytest.mark.parametrize("layers", ["all", "1"])
def test_loss_and_gradients_are_the_same_bit_for_bit_with_dropout_active(layers: str, others: str) -> None:
    plain, recomputed = toy(others, dropout=0.5), toy(f"ckpt:layers={layers},{others}".rstrip(","), dropout=0.5)
    dtype = plain.plan.autocast
    assert dtype == recomputed.plan.autocast
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        assert torch.equal(loss_of(plain), loss_of(recomputed))
    expected, found = gradients(plain), gradients(recomputed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_dropout_would_show_if_the_random_state_were_not_preserved() -> None:
    one, other = toy("ckpt", dropout=0.5), toy("ckpt", dropout=0.5)
    loss_of(one, seed=1), loss_of(other, seed=2)
    assert not all(torch.equal(gradients(one)[name], gradient) for name, gradient in gradients(other).items())


def test_recomputation_leaves_the_random_state_where_the_forward_pass_left_it() -> None:
    states = []
    for plan in ("", "ckpt"):
        loss_of(toy(plan, dropout=0.5))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_layer_that_fails_leaves_nothing_of_its_checkpoint_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("of the layer's own")

    workload = toy("ckpt")
    workload.model.get_submodule("blocks.0").register_module("dropout", Failing())
    with pytest.raises(ValueError, match="of the layer's own") as kept:
        loss_of(workload)
    x = torch.ones(3, requires_grad=True)
    x.square().sum().backward()  # the layer would be computed again, were its hooks still on
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]
    del kept


def test_modules_and_state_dict_are_unchanged() -> None:
    plain, recomputed = toy(), toy("ckpt")
    assert [name for name, _ in recomputed.model.named_modules()] == [name for name, _ in plain.model.named_modules()]
    assert list(recomputed.model.state_dict()) == list(plain.model.state_dict())
    recomputed.model.load_state_dict(plain.model.state_dict())


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    original = toy("ckpt")
    (batch,) = original.split(original.batches[0], 1)
    copied = copy.deepcopy(original.model)
    with torch.no_grad():
        for parameter in copied.get_submodule("blocks").parameters():
            parameter.zero_()
    embedded = copied.get_submodule("embed")(batch.clamp(min=0))
    assert torch.equal(copied(batch.clamp(min=0)), copied.get_submodule("head")(embedded))  # the blocks add nothing
    assert torch.equal(original.model(batch.clamp(min=0)), toy().model(batch.clamp(min=0)))

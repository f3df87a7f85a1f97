"""One checkpoint over several layers: models of any style, and those where it cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memscope.errors import UsageError
from memscope.strategies.ckpt import Checkpoint, LayerPlan
from memscope.workload.description import Workload

ALONE = {f"layers.{index}": "none" for index in range(4)}
TOGETHER = {"layers.0": "none", "layers.1": "full:3", "layers.2": "within:layers.1", "layers.3": "within:layers.1"}


class Layer(nn.Module):
    """Takes more than a tensor, by keyword, and returns what `wrap` makes of its result."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.dropout, self.wrap = nn.Linear(8, 8), nn.Dropout(0.5), wrap

    def forward(self, hidden: Tensor, *, table: tuple[Tensor, Tensor], scale: float = 1.0, cache: Any = None) -> Any:
        return self.wrap(hidden + self.dropout(torch.tanh(self.linear(hidden))) * table[0] * scale + table[1])


class Model(nn.Module):
    def __init__(self, loop: Callable[[Model, Tensor], Tensor], wrap: Callable[[Tensor], Any] = lambda y: y) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(wrap) for _ in range(4))
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(self, x)


TABLE = (torch.full((8,), 0.5), torch.ones(8))


def plain(model: Model, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x, table=TABLE, scale=0.7)
    return x


def first_of_tuple(model: Model, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x, table=TABLE)[0]
    return x


def by_keyword(model: Model, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(hidden=x, table=(TABLE[0], TABLE[1]), cache=None)
    return x


def with_a_table_of_its_own(model: Model, x: Tensor) -> Tensor:
    for index, layer in enumerate(model.layers):
        x = layer(x, table=(TABLE[0], torch.full((8,), float(index))))
    return x


def with_other_settings(model: Model, x: Tensor) -> Tensor:
    for index, layer in enumerate(model.layers):
        x = layer(x, table=TABLE, scale=0.5 + index)
    return x


def changed_in_between(model: Model, x: Tensor) -> Tensor:
    for layer in model.layers:
        x = layer(x, table=TABLE) * 2
    return x


def left_out(model: Model, x: Tensor) -> Tensor:
    for layer in (model.layers[0], model.layers[1], model.layers[3]):
        x = layer(x, table=TABLE)
    return x


def without_the_first(model: Model, x: Tensor) -> Tensor:
    return model.layers[2](x, table=TABLE)  # type: ignore[no-any-return]


def gradients(loop: Callable[[Model, Tensor], Tensor], options: dict[str, str], **kwargs: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model(loop, **kwargs)
    Checkpoint.of(LayerPlan(options)).apply(Workload(model, [], lambda model, x: model(x), torch.optim.SGD))
    for _ in range(2):  # what one pass leaves behind must not disturb the next
        model(torch.ones(3, 8)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("loop", "wrap"),
    [
        (plain, lambda y: y),
        (by_keyword, lambda y: y),
        (first_of_tuple, lambda y: (y,)),
        (first_of_tuple, lambda y: (y, None, None)),
    ],
)
def test_models_that_call_their_layers_one_after_the_other_keep_their_gradients(
    loop: Callable[[Model, Tensor], Tensor], wrap: Callable[[Tensor], Any]
) -> None:
    expected, found = gradients(loop, ALONE, wrap=wrap), gradients(loop, TOGETHER, wrap=wrap)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


ALONE_IS_FINE = "use the option full for each"


@pytest.mark.parametrize(
    ("loop", "wrap", "message"),
    [
        (
            with_a_table_of_its_own,
            lambda y: y,
            "layers.2 is inside the checkpoint of layers.1, but is given other arguments besides the result of "
            "layers.1: such layers cannot share one; ",
        ),
        (
            with_other_settings,
            lambda y: y,
            "layers.2 is inside the checkpoint of layers.1, but is given other arguments besides the result of "
            "layers.1: such layers cannot share one; ",
        ),
        (
            changed_in_between,
            lambda y: y,
            "layers.2 is inside the checkpoint of layers.1, but is not given what layers.1 returned: the model does "
            "something in between; ",
        ),
        (
            left_out,
            lambda y: y,
            "layers.3 is inside the checkpoint of layers.1, but is not called right after layers.2: such layers cannot "
            "share one; ",
        ),
        (
            without_the_first,
            lambda y: y,
            "layers.2 is inside the checkpoint of layers.1, but is not called right after layers.1: such layers cannot "
            "share one; ",
        ),
        (
            first_of_tuple,
            lambda y: (y, y),
            "layers.1 returns more than one tensor, or none: layers share a checkpoint only if each returns the tensor "
            "that the next one takes, and nothing else; ",
        ),
        (
            lambda model, x: [x := layer(x, table=TABLE)["y"] for layer in model.layers][-1],
            lambda y: {"y": y},
            "layers.1 returns more than one tensor, or none: layers share a checkpoint only if each returns the tensor "
            "that the next one takes, and nothing else; ",
        ),
    ],
)
def test_models_where_layers_cannot_share_a_checkpoint_are_refused_in_words(
    loop: Callable[[Model, Tensor], Tensor], wrap: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        gradients(loop, TOGETHER, wrap=wrap)
    assert str(caught.value) == message + ALONE_IS_FINE


def test_a_layer_with_hooks_cannot_be_inside_the_checkpoint_of_another() -> None:
    model = Model(plain)
    model.layers[2].register_forward_hook(lambda *_: None)
    with pytest.raises(
        UsageError, match=r"^layers.2: within:layers.1: its forward hooks would see what the last layer"
    ):
        Checkpoint.of(LayerPlan(TOGETHER)).apply(Workload(model, [], lambda model, x: model(x), torch.optim.SGD))


def test_only_the_input_of_the_first_layer_is_kept() -> None:
    torch.manual_seed(0)
    model = Model(plain)
    Checkpoint.of(LayerPlan(TOGETHER)).apply(Workload(model, [], lambda model, x: model(x), torch.optim.SGD))
    calls: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.get_submodule("linear").register_forward_hook(lambda *_, index=index: calls.append(index))
    model(torch.ones(3, 8)).sum().backward()
    assert calls == [0, 1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(("layers", "lengths"), [(1, [1]), (2, [1, 1]), (4, [2, 2]), (9, [3] * 3), (11, [2, 3, 3, 3])])
def test_the_layers_of_a_list_are_cut_into_as_many_segments_as_their_root(layers: int, lengths: list[int]) -> None:
    model = Model(plain)
    model.layers = nn.ModuleList(Layer(lambda y: y) for _ in range(layers))
    strategy = Checkpoint(Checkpoint.Config(sqrt=True))
    found = strategy._chosen(model)[1]
    assert [option.length for option in found.values() if option.kind == "full"] == lengths
    heads = [name for name, option in found.items() if option.kind == "full"]
    assert heads == [f"layers.{sum(lengths[:index])}" for index in range(len(lengths))]
    assert strategy.spec == "ckpt:sqrt"


def test_every_list_has_segments_of_its_own() -> None:
    model = nn.Module()
    model.encoder, model.decoder = (nn.ModuleList(Layer(lambda y: y) for _ in range(4)) for _ in range(2))
    found = Checkpoint(Checkpoint.Config(sqrt=True))._chosen(model)[1]
    assert [name for name, option in found.items() if option.kind == "full"] == [
        "encoder.0", "encoder.2", "decoder.0", "decoder.2",
    ]  # fmt: skip


def test_segments_are_a_choice_of_their_own() -> None:
    for other in ({"layers": "0-1"}, {"plan": "plan.json"}, {"auto": True}):
        with pytest.raises(ValueError, match="sqrt chooses the segments: leave layers, plan and auto out"):
            Checkpoint.Config(sqrt=True, **other)  # type: ignore[arg-type]

"""Checkpoint plans: the value, the file, and the errors of plans that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memscope.errors import UsageError
from memscope.strategies import Plan
from memscope.strategies.ckpt import Checkpoint
from memscope.strategies.ckpt.layer_plan import LayerPlan, described
from memscope.strategies.ckpt.layers import named_layers
from memscope.strategies.ckpt.options import Option
from memscope.testing import toy_workload
from memscope.workload.description import Workload

LAYERS = {"blocks.0": "none", "blocks.1": "save:up/aten.addmm+./aten.add"}
MODEL = {"class": "_Toy", "parameters": 5536, "layers": ["_Block", "_Block"]}
HEADER = {"format": "memscope-checkpoint-plan", "schema_version": 1}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# The file.


def test_a_file_reads_back_as_the_plan_that_was_written(tmp_path: Path) -> None:
    plan = LayerPlan(LAYERS, {"target": "toy", "settings": {"seq_len": 8}, "model": MODEL})
    assert LayerPlan.load(plan.save(tmp_path / "plan.json")) == plan
    assert json.loads((tmp_path / "plan.json").read_text()) == HEADER | {
        "layers": LAYERS,
        "made_for": {"target": "toy", "settings": {"seq_len": 8}, "model": MODEL},
    }


def test_the_layers_keep_their_order(tmp_path: Path) -> None:
    layers = {f"h.{index}": "none" for index in (0, 1, 2, 10, 11)}
    assert list(LayerPlan.load(LayerPlan(layers).save(tmp_path / "plan.json")).layers) == list(layers)


def test_a_file_by_hand_needs_no_more_than_layers(tmp_path: Path) -> None:
    assert LayerPlan.load(write(tmp_path / "plan.json", HEADER | {"layers": LAYERS})) == LayerPlan(LAYERS)


def test_a_file_is_not_overwritten_unless_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", "precious")
    with pytest.raises(UsageError, match=r"plan.json exists already: choose another name, or overwrite it with -f"):
        LayerPlan(LAYERS).save(path)
    assert path.read_text() == "precious"
    LayerPlan(LAYERS).save(path, overwrite=True)
    assert LayerPlan.load(path) == LayerPlan(LAYERS)


EXPECTED = "expected a file written by memscope advise"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", f"not a checkpoint plan: no JSON (Expecting value: line 1 column 1 (char 0)); {EXPECTED}"),
        ("[1, 2]", f'not a checkpoint plan: it does not say "format": "memscope-checkpoint-plan"; {EXPECTED}'),
        (
            {"format": "other"},
            f'not a checkpoint plan: it does not say "format": "memscope-checkpoint-plan"; {EXPECTED}',
        ),
        (
            HEADER | {"schema_version": 2, "layers": 3},
            "written with checkpoint plan schema 2, this memscope reads up to 1: upgrade memscope",
        ),
        (HEADER, "a damaged checkpoint plan: the file has no layers"),
        (
            HEADER | {"schema_version": "1", "layers": LAYERS},
            'a damaged checkpoint plan: schema_version is "1": expected a whole number',
        ),
        (HEADER | {"layers": {"h.0": 1}}, "a damaged checkpoint plan: layers[...]: expected a string"),
        (
            HEADER | {"layers": LAYERS, "made_for": {"model": 3}},
            "a damaged checkpoint plan: made_for.model is 3: expected an object",
        ),
        (
            HEADER | {"layers": {"h.0": "full:" + "9" * 5000}},
            f'h.0: option "full:{"9" * 55}…": expected full, or full:N with a whole number N of layers from 2 on',
        ),
        (HEADER | {"layers": {}}, "a checkpoint plan needs layers, and this one has none"),
        (
            HEADER | {"layers": {"h.0": "none", "h.1": "fulll"}},
            'h.1: unknown option "fulll": did you mean "full"? Valid: full, none, offload, recompute, save, within',
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_words(tmp_path: Path, content: Any, message: str) -> None:
    path = write(tmp_path / "plan.json", content)
    with pytest.raises(UsageError) as caught:
        LayerPlan.load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_truncated_file_is_told_from_a_foreign_one(tmp_path: Path) -> None:
    path = LayerPlan(LAYERS).save(tmp_path / "plan.json")
    write(path, path.read_text()[:90])
    with pytest.raises(UsageError, match=r"plan.json: a truncated or damaged checkpoint plan: no JSON \("):
        LayerPlan.load(path)
    (tmp_path / "trace.npz").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(UsageError, match=r"trace.npz: not a checkpoint plan: expected a file written by memscope adv"):
        LayerPlan.load(tmp_path / "trace.npz")
    with pytest.raises(UsageError, match=r"nothing.json: no such file$"):
        LayerPlan.load(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)$"):
        LayerPlan.load(tmp_path)


# Options.


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("none", Option("none")),
        ("full", Option("full")),
        ("full:4", Option("full", length=4)),
        ("within:layers.8", Option("within", head="layers.8")),
        ("recompute:attention+mlp", Option("recompute", children=("attention", "mlp"))),
        ("save:mlp.up/aten.mm", Option("save", calls=(("mlp.up", "aten.mm"),))),
        ("save:./aten.add+/aten.mul", Option("save", calls=((".", "aten.add"), (".", "aten.mul")))),
        ("offload", Option("offload")),
    ],
)
def test_an_option_means(text: str, option: Option) -> None:
    assert Option.parse(text) == option


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'unknown option "": Valid: full, none, offload, recompute, save, within'),
        ("ful:2", 'unknown option "ful:2": did you mean "full"? Valid: full, none, offload, recompute, save, within'),
        ("full:1", 'option "full:1": expected full, or full:N with a whole number N of layers from 2 on'),
        ("full:", 'option "full:": expected full, or full:N with a whole number N of layers from 2 on'),
        ("none:3", 'option "none:3": nothing comes after none'),
        ("recompute", 'option "recompute" is incomplete: expected, for example, recompute:attention+mlp'),
        ("recompute:a+", 'option "recompute:a+" is incomplete: expected, for example, recompute:attention+mlp'),
        ("recompute:a+a", 'option "recompute:a+a" names something twice: name it once'),
        ("save:up", 'option "save:up": expected MODULE/OPERATOR, such as mlp.up/aten.mm, but found "up"'),
        ("within:", 'option "within:" is incomplete: expected, for example, within:layers.8'),
    ],
)
def test_an_option_that_cannot_be_read_is_refused_in_words(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Option.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("full:3", "within:h.0"), "h.0: full:3 covers more layers than follow: 1 do"),
        (("full:2", "none"), 'h.1: the option is "none", expected within:h.0'),
        (("full:2", "within:h.1"), 'h.1: the option is "within:h.1", expected within:h.0'),
        (
            ("none", "within:h.0"),
            'h.1: the option is "within:h.0", expected no within:, since no full:N before covers it',
        ),
    ],
)
def test_checkpoints_over_several_layers_that_do_not_add_up_are_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        LayerPlan({f"h.{index}": option for index, option in enumerate(options)})
    assert str(caught.value) == message


# Against a model.


def problems(plan: LayerPlan, workload: Workload | None = None) -> list[str]:
    return [str(problem) for problem in Checkpoint.of(plan).check(workload or toy_workload())]


def test_a_plan_for_this_model_has_no_problem() -> None:
    assert described(toy_workload().model, LAYERS) == MODEL
    assert problems(LayerPlan(LAYERS, {"model": MODEL})) == []
    assert problems(LayerPlan(LAYERS)) == []


FIX = ": make one for this model with memscope advise"


@pytest.mark.parametrize(
    ("layers", "model", "expected"),
    [
        (("0",), {}, ['also has "blocks.1", for which it has no option']),
        (("0", "1", "2"), {}, ['has no "blocks.2"']),
        (("1", "0"), {}, ["has the same layers in another order"]),
        (("0", "1"), {"class": "Llama"}, ["is a _Toy, not Llama"]),
        (("0", "1"), {"parameters": 7}, ["has parameters in number: 5536, not 7"]),
        (("0", "1"), {"layers": ["A", "B"]}, ["has layers of the classes _Block, not A and B"]),
        (("0",), {"class": "A", "parameters": 7, "layers": ["A"]}, 3),
    ],
)
def test_a_plan_for_another_model_is_refused_with_every_difference(
    layers: tuple[str, ...], model: dict[str, Any], expected: Any
) -> None:
    found = problems(LayerPlan({f"blocks.{key}": "none" for key in layers}, {"model": model}))
    if isinstance(expected, int):
        assert len(found) == expected
    else:
        assert found == [f"the checkpoint plan is for another model: this one {text}{FIX}" for text in expected]


def test_a_plan_for_layers_that_are_elsewhere_is_refused() -> None:
    (problem,) = problems(LayerPlan({"block.0": "none", "block.1": "none"}))
    assert problem == f'the checkpoint plan is for another model: this one has no "block.0", "block.1"{FIX}'


def two_lists() -> Workload:
    model = nn.Module()
    model.encoder, model.decoder = (nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))
    return Workload(model, [], lambda m, x: m(x), torch.optim.SGD)


@pytest.mark.parametrize(
    ("names", "differs"),
    [
        (["encoder.0", "encoder.1", "decoder.0", "decoder.1"], ""),
        (["encoder.0", "decoder.0", "encoder.1", "decoder.1"], ""),  # in the order in which they are called
        (["decoder.0", "decoder.1"], ""),
        (["encoder.0", "encoder.1", "decoder.0"], 'also has "decoder.1", for which it has no option'),
        (["encoder.1", "encoder.0", "decoder.0", "decoder.1"], "has the same layers in another order"),
        (["encoder.0", "encoder.1", "encoder.2"], 'has no "encoder.2"'),
    ],
)
def test_a_plan_names_every_layer_of_each_of_its_lists_in_the_order_of_the_list(names: list[str], differs: str) -> None:
    found = problems(LayerPlan(dict.fromkeys(names, "full")), two_lists())
    expected = f"the checkpoint plan is for another model: this one {differs}: make one for this model"
    assert [text.partition(" with memscope")[0] for text in found] == ([expected] if differs else [])


def test_a_plan_may_name_modules_that_are_in_no_list() -> None:
    workload = toy_workload()
    plan = LayerPlan({"embed": "none", "head": "full"})
    assert problems(plan, workload) == []
    Checkpoint.of(plan).apply(workload)
    assert [name for name, module in workload.model.named_modules() if "forward" in vars(module)] == ["head"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("recompute:upp", 'blocks.0: recompute:upp: the layer has no child "upp": did you mean "up"? Valid: '),
        ("save:upp/aten.mm", 'blocks.0: save:upp/aten.mm: the layer has no module "upp": did you mean "up"? Valid: '),
        ("save:up/aten.mmm", 'blocks.0: save:up/aten.mmm: "aten.mmm" is not an operator of PyTorch '),
        ("save:up/mm", 'blocks.0: save:up/mm: "mm" is not an operator of PyTorch '),
        ("save:up/aten.view", '"aten.view" returns a view: name the operator that makes the viewed tensor'),
        ("save:up/aten.add_", '"aten.add_" changes a tensor in place: name the operator that makes this tensor'),
    ],
)
def test_an_option_that_a_layer_cannot_take_is_refused_before_anything_changes(option: str, message: str) -> None:
    workload = toy_workload()
    with pytest.raises(UsageError) as caught:
        Checkpoint.of(LayerPlan({"blocks.0": option, "blocks.1": "full"})).apply(workload)
    assert message in str(caught.value)
    assert all("forward" not in vars(layer) for layer in named_layers(workload.model).values())


def test_layers_that_are_one_module_take_one_option() -> None:
    layer = nn.Linear(2, 2)
    workload = Workload(nn.Sequential(layer, layer), [], lambda m, x: m(x).sum(), torch.optim.SGD)
    with pytest.raises(UsageError, match=r"^0 and 1 are the same module: give them the same option$"):
        Checkpoint.of(LayerPlan({"0": "none", "1": "full"})).apply(workload)
    with pytest.raises(UsageError, match="0 and 1 are the same module"):
        Checkpoint.of(LayerPlan({"0": "full:2", "1": "within:0"})).apply(workload)
    Checkpoint.of(LayerPlan({"0": "full", "1": "full"})).apply(workload)


# The strategy.


def test_the_plan_of_a_file_is_applied(tmp_path: Path) -> None:
    path = LayerPlan({"blocks.0": "none", "blocks.1": "full"}).save(tmp_path / "plan.json")
    workload = toy_workload()
    plan = Plan.parse(f"lora,ckpt:plan={path}")
    assert str(plan) == f"lora,ckpt:plan={path}"
    plan.apply(workload)
    assert ["forward" in vars(layer) for layer in named_layers(workload.model).values()] == [False, True]


def test_a_plan_file_with_an_error_is_refused_by_the_strategy(tmp_path: Path) -> None:
    path = write(tmp_path / "plan.json", HEADER | {"layers": {"blocks.0": "ful"}})
    with pytest.raises(UsageError, match=rf'ckpt: plan={path}: {path}: blocks.0: unknown option "ful": did you mean'):
        Plan.parse(f"ckpt:plan={path}").apply(toy_workload())


def test_other_settings_than_the_plans_are_told() -> None:
    workload = toy_workload()
    workload.settings = {"seq_len": 16, "dim": 4}
    plan = LayerPlan(LAYERS, {"settings": {"seq_len": 8, "dim": 4, "gone": 1}})
    with pytest.warns(UserWarning, match=r"made for other settings.*: seq_len is 16, not 8$"):
        Checkpoint.of(plan).apply(workload)


def test_the_layers_can_be_pointed_at() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.ModuleList(nn.Linear(9, 9) for _ in range(2))
            self.small = nn.ModuleList([nn.Linear(2, 2), nn.Tanh()])

    workload = Workload(Two(), [], lambda m, x: m(x), torch.optim.SGD)
    Plan.parse("ckpt:layer-list=small,layers=1").apply(workload)
    assert [name for name, module in workload.model.named_modules() if "forward" in vars(module)] == ["small.1"]
    message = r'ckpt: layers=all,layer-list=smal: the model has no .* did you mean "small"\?'
    with pytest.raises(UsageError, match=message):
        Plan.parse("ckpt:layer-list=smal").apply(workload)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ckpt:plan=p.json,layers=3", "plan names layers and their options: leave layers and layer-list out"),
        ("ckpt:plan=p.json,layer-list=h", "plan names layers and their options: leave layers and layer-list out"),
        ("ckpt:auto,plan=p.json", "auto chooses layers and their options: leave layers and plan out"),
        ("ckpt:budget=40GB", "budget goes with auto: write ckpt:auto,budget=40GB"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Plan.parse(text)
    assert str(caught.value) == f'strategy "ckpt" rejects these settings: {message}'


def test_auto_has_to_be_resolved_before_anything_runs() -> None:
    plan = Plan.parse("ckpt:auto,budget=40GB")
    assert str(plan) == "ckpt:auto,budget=40GB"
    message = "auto chooses nothing by itself: memscope advise and memscope profile replace it by the plan for a budget"
    with pytest.raises(UsageError, match=f"ckpt: {message}"):
        plan.apply(toy_workload())
    with pytest.raises(UsageError, match=f"ckpt: {message}"):
        plan.strategies[0].apply(toy_workload())

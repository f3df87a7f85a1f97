"""Activations over the number of layers, as a figure."""

from memscope.dashboards.layer_scaling import activation_by_layers

MIB = 2**20


def test_each_way_to_checkpoint_is_a_curve_over_the_layers_in_one_unit() -> None:
    figure = activation_by_layers({"none": {1: 100 * MIB, 4: 400 * MIB}, "sqrt": {1: 100 * MIB, 4: 200 * MIB}})
    assert [(one.name, one.x, one.y) for one in figure.data] == [
        ("none", (1, 4), (100, 400)), ("sqrt", (1, 4), (100, 200)),
    ]  # fmt: skip
    assert figure.layout.yaxis.title.text == "activations, MiB"

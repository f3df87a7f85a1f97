"""Memory that losses take before they are reduced: expected sizes are derived from the cited sources."""

from __future__ import annotations

from typing import Any

import pytest

from memscope.simulation.cuda.workspace_call import TensorMeta
from memscope.simulation.cuda.workspaces import workspaces_for
from memscope.simulation.devices.catalogue import get_device

A100 = get_device("a100-40gb")
X = TensorMeta((100, 10), "float32")
HALF = TensorMeta((100, 10), "bfloat16")
MEAN, NONE = 1, 0


def taken(op: str, **arguments: Any) -> list[tuple[str, int, bool]]:
    """Name, bytes, and whether the memory is taken before the result."""
    found = workspaces_for(f"aten.{op}.default", {"self": X, "target": X, **arguments}, A100, (2, 13))
    return [(workspace.name, workspace.size_bytes, workspace.before_outputs) for workspace in found]


@pytest.mark.parametrize("op", ["mse_loss", "smooth_l1_loss"])
def test_losses_are_made_beside_a_result_of_their_size(op: str) -> None:
    assert taken(op) == [("losses", 4000, False)]
    assert taken(op, self=HALF, target=HALF) == [("losses", 2000, False)]
    assert taken(op, self=HALF) == [("losses", 4000, False)]  # a bfloat16 and a float32 give float32
    assert taken(op, target=TensorMeta((1, 10), "float32")) == [("losses", 4000, False)]


def test_huber_loss_is_reduced_into_a_result_of_one_number() -> None:
    assert taken("huber_loss") == [("losses", 4000, True)]


@pytest.mark.parametrize("op", ["binary_cross_entropy", "soft_margin_loss"])
def test_the_mean_is_made_beside_the_losses_that_the_result_holds(op: str) -> None:
    assert taken(op) == [("mean", 4, False)]


def test_cross_entropy_of_logits_holds_two_tensors_as_large_as_they_are() -> None:
    assert taken("binary_cross_entropy_with_logits") == [("log sigmoid", 4000, True), ("losses", 4000, True)]


def test_weights_of_positives_are_freed_before_the_losses_are_made() -> None:
    arguments = {"self": X, "target": X, "pos_weight": TensorMeta((10,), "float32")}
    found = workspaces_for("aten.binary_cross_entropy_with_logits.default", arguments, A100, (2, 13))
    assert {workspace.name: workspace.size_bytes for workspace in found} == {
        "log sigmoid": 4000, "weight less 1": 40, "weights": 4000, "losses": 4000,
    }  # fmt: skip
    assert found[-1].frees == ("weight less 1", "weights")


def test_unreduced_losses_take_nothing() -> None:
    for op in ("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss"):
        assert taken(op, reduction=NONE) == []
    assert taken("binary_cross_entropy_with_logits", reduction=NONE) == [("log sigmoid", 4000, True)]


def test_soft_margin_backward_makes_two_tensors_on_the_way_to_the_third() -> None:
    expected = [("negative target", 4000, True), ("product", 4000, True), ("exponential", 4000, True)]
    assert taken("soft_margin_loss_backward", grad_output=TensorMeta((), "float32"), reduction=MEAN) == expected


def test_the_mean_of_many_losses_takes_what_any_mean_takes() -> None:
    large = TensorMeta((405, 4096), "float32")
    mean = workspaces_for("aten.mean.default", {"self": large}, A100, (2, 13))
    assert mean
    assert workspaces_for("aten.mse_loss.default", {"self": large, "target": large}, A100, (2, 13))[1:] == mean

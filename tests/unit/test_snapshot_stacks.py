"""Inference from single stacks, frame by frame; innermost first, as in a snapshot."""

import pytest
from snapshots import FORWARD, MODULE_CALL, frame

from memscope.exchange.stacks import NO_STACK, StackReader

CHECKPOINT = (
    frame("recompute_fn", "/x/torch/utils/checkpoint.py"),
    frame("unpack_hook", "/x/torch/utils/checkpoint.py"),
)
SAID = {
    "forward": (FORWARD, "forward", None),
    "loss of functional": ((frame("cross_entropy", "/x/torch/nn/functional.py"),), "loss", None),
    "loss inside the model": ((frame("cross_entropy", "/x/torch/nn/functional.py"), *FORWARD), "forward", None),
    "backward seen from C++": ((frame("torch::autograd::Engine::evaluate_function(...)", "??", 0),), "backward", None),
    "custom backward": (
        (frame("backward", "/m/kernels.py"), frame("apply", "/x/torch/autograd/function.py")),
        "backward",
        None,
    ),
    "recomputation": ((*FORWARD[:2], *CHECKPOINT), "recompute", None),
    "recomputation of a custom backward": ((*FORWARD[:2], frame("backward", "/m/offload.py")), "recompute", None),
    "forward in the closure of an optimizer": ((*FORWARD, frame("step", "/x/torch/optim/lbfgs.py")), "forward", None),
    "optimizer": ((frame("_multi_tensor_adamw", "/x/torch/optim/adamw.py"),), "optimizer", None),
    "optimizer of another package": ((frame("step", "/x/bitsandbytes/optim/optimizer.py"),), "optimizer", None),
    "state": (
        (frame("_init_group", "/x/torch/optim/adam.py"), frame("step", "/x/torch/optim/adam.py")),
        "optimizer",
        "optimizer_state",
    ),
    "scheduler": ((frame("step", "/x/torch/optim/lr_scheduler.py"),), None, None),
    "zero_grad": ((frame("zero_grad", "/x/torch/optim/optimizer.py"),), "zero_grad", None),
    "model to the GPU": (
        (frame("convert", "/x/torch/nn/modules/module.py"), frame("_apply", "/x/torch/nn/modules/module.py")),
        None,
        "parameter",
    ),
    "weights loaded": ((frame("from_pretrained", "/x/transformers/modeling_utils.py"),), None, "parameter"),
    "batch to the GPU": ((frame("send_to_device", "/x/accelerate/utils/operations.py"),), None, "input"),
    "workspace": (
        (frame("at::cuda::(anonymous namespace)::getNewWorkspace()", "??", 0), *FORWARD),
        "forward",
        "workspace",
    ),
    "gradient": ((frame("torch::autograd::AccumulateGrad::apply(...)", "??", 0),), None, "gradient"),
    "one's own code": ((frame("main", "/m/train.py"),), None, None),
}


@pytest.mark.parametrize("name", SAID)
def test_a_stack_says(name):
    frames, phase, category = SAID[name]
    reader = StackReader()
    place = reader.places[reader.read(list(frames))]
    assert (place.phase, place.category) == (phase, category)


@pytest.mark.parametrize(
    ("frames", "op"),
    [
        (FORWARD, "model.py:12 forward"),
        (
            (
                frame("at::_ops::empty_strided::call(...)", "??", 0),
                frame("at::_ops::addmm::redispatch(...)", "??", 0),
                *FORWARD,
            ),
            "aten.addmm",
        ),
        ((frame("c10::cuda::malloc", "??", 0),), ""),
    ],
)
def test_the_operator_is_that_of_cpp_or_the_innermost_line_of_python(frames, op):
    reader = StackReader()
    assert reader.places[reader.read(list(frames))].op == op


def test_the_chain_of_modules_follows_their_calls():
    frames = [
        frame("forward", "/x/torch/nn/modules/linear.py", 134),
        MODULE_CALL,
        frame("forward", "/m/mlp.py", 9),
        MODULE_CALL,
    ]
    frames += [
        frame("forward", "/x/torch/nn/modules/container.py", 250),
        MODULE_CALL,
        frame("forward", "/m/model.py", 31),
    ]
    reader = StackReader()
    assert reader.places[reader.read(frames)].module == "model:31.mlp:9.linear"


def test_equal_stacks_are_examined_once_and_different_ones_are_never_confused():
    inner = [frame(f"f{n}", "/m/model.py", n) for n in range(40)]
    other = [*inner[:20], frame("forward", "/m/model.py"), *inner[21:]]  # between the frames that tell stacks apart
    reader = StackReader()
    assert reader.read(inner) == reader.read(list(inner)) != reader.read(other)
    assert len(reader.places) == 3
    assert reader.places[0] is NO_STACK

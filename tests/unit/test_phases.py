"""The peak of each phase of a run, and what calls without gradients keep for later ones."""

import torch
from torch import nn
from traces import TraceBuilder

from memscope import Recorder
from memscope.analysis.phases import about_phases, leaves_the_steps, phase_peaks
from memscope.trace import Trace


def evaluated() -> Trace:
    """Two steps around an evaluation of three calls, which keep 40 bytes of keys each."""
    build = TraceBuilder()
    build.phase("outside")
    loaded = build.new("other", 500)
    build.new("parameter", 100, module="model")
    build.free(loaded)
    build.phase("forward", 0)
    kept = build.new("activation", 60, module="model")
    build.phase("backward", 0)
    build.free(kept)
    build.phase("outside", 0)
    caches = []
    for layer in range(3):
        build.phase("inference", 0)
        caches.append(build.new("temporary", 40, module=f"layers.{layer}.attention"))
        build.free(build.new("temporary", 200, module="head"))
        build.phase("outside", 0)
        build.free(build.new("temporary", 8))
    build.free(*caches)
    build.phase("forward", 1)
    build.new("activation", 90, module="model")
    return build.trace()


def test_every_phase_has_its_peak_with_the_memory_it_began_with() -> None:
    peaks = {one.phase: (one.allocated_bytes, one.at) for one in phase_peaks(evaluated())}
    assert peaks == {
        "setup": (600, "before step 0"),  # what was loaded, and the weights
        "forward": (190, "step 1"),
        "backward": (160, "step 0"),  # it only frees: it began with 100 + 60
        "outside": (228, "step 0"),  # weights, three caches, and 8
        "inference": (100 + 3 * 40 + 200, "step 0"),
    }
    assert [one.reserved_bytes for one in phase_peaks(evaluated())] == [None] * 5


def test_what_inference_keeps_from_call_to_call_is_told_by_module() -> None:
    trace = evaluated()
    (inference,) = (one for one in phase_peaks(trace) if one.phase == "inference")
    assert inference.kept == {"layers.*.attention": 80}  # in its third call, those of the first two
    assert leaves_the_steps(trace)
    assert list(about_phases(trace)) == [
        "the peak is outside the phases of training, in before step 0; within them it is 190 B (step 1, forward)",
        "inference keeps up to 80 B from one call of a model to the next, such as a KV cache: layers.*.attention 80 B",
    ]


def test_a_run_of_training_phases_alone_has_nothing_to_tell() -> None:
    build = TraceBuilder()
    build.phase("setup")
    build.new("parameter", 100)
    for step in range(2):
        build.phase("forward", step)
        kept = build.new("activation", 60)
        build.phase("backward", step)
        build.free(kept)
    assert not leaves_the_steps(build.trace())
    assert list(about_phases(build.trace())) == []


def test_models_are_told_by_their_names_and_classes() -> None:
    critic, actor = nn.Bilinear(4, 4, 1), nn.Linear(4, 4)
    with Recorder(critic) as recorder:
        critic(x := torch.ones(2, 4), actor(x)).sum().backward()
    assert recorder.trace().meta["models"] == {"(model)": "Bilinear"}

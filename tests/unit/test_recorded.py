"""The decorator that records a function, and the traces that recordings leave behind."""

import functools
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from memscope import Recorder, Trace, recorded
from memscope.errors import UsageError
from memscope.hooks.out_of_memory import is_out_of_memory


def net():
    return nn.Linear(64, 64, bias=False)


def train(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.ones(8, 64)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps


def test_a_recorded_function_returns_its_value_and_leaves_the_trace_of_a_recorder(tmp_path):
    file = tmp_path / "train.npz"
    assert recorded(file)(train)(net(), steps=3) == 3
    model = net()
    with Recorder(model) as recorder:
        train(model, steps=3)
    trace, expected = Trace.load(file), recorder.trace()
    assert [*trace.size] == [*expected.size]
    assert [*trace.category] == [*expected.category]
    assert trace.steps == (0, 1, 2)
    assert trace.meta["target"] == "train"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt(), SystemExit(3)])
def test_a_function_that_raises_leaves_its_trace_which_says_so(error, tmp_path):
    @recorded(tmp_path / "failed.npz")
    def fails(model):
        train(model, steps=1)
        raise error

    with pytest.raises(type(error)) as raised:
        fails(net())
    assert raised.value is error
    trace = Trace.load(tmp_path / "failed.npz")
    assert trace.steps == (0,)
    (note,) = trace.meta["notes"]
    assert note.startswith(f"The recording ended with {type(error).__name__}")


def test_a_program_that_exits_well_has_no_note(tmp_path):
    @recorded(tmp_path / "done.npz")
    def done(model):
        train(model)
        sys.exit(0)

    with pytest.raises(SystemExit):
        done(net())
    assert "notes" not in Trace.load(tmp_path / "done.npz").meta


def test_a_trace_that_cannot_be_written_does_not_hide_the_error_of_the_function(tmp_path):
    (tmp_path / "gone").mkdir()

    @recorded(tmp_path / "gone/train.npz")
    def fails(model):
        shutil.rmtree(tmp_path / "gone")
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        fails(net())
    assert raised.value.__notes__[0].startswith(f"memscope could not write {tmp_path / 'gone/train.npz'}")


def test_a_file_that_exists_is_refused_before_the_function_is_called(tmp_path):
    file, calls = tmp_path / "train.npz", []
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"exists already: .*overwrite=True"):
        recorded(file)(calls.append)(net())
    assert not calls
    recorded(file, overwrite=True)(train)(net())
    assert Trace.load(file).steps == (0, 1)


class Loop:
    def __init__(self):
        self.model, self.name = net(), "loop"

    def run(self):
        return train(self.model)


def test_the_model_may_be_part_of_an_argument(tmp_path):
    recorded(tmp_path / "loop.npz", model="self.model")(Loop.run)(Loop())
    trace = Trace.load(tmp_path / "loop.npz")
    assert trace.meta["parameters"]["total"] == 64 * 64
    assert trace.meta["target"] == "Loop.run"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, r"Loop\.run was called without an nn\.Module that has parameters"),
        ("slf.model", r'Loop\.run has no argument "slf": did you mean "self"\?'),
        ("self.modle", r'a Loop has no attribute "modle"'),
        ("self.name", r"expected an nn\.Module there, but it is a str"),
    ],
)
def test_a_model_that_is_not_found_is_refused(path, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        recorded(tmp_path / "loop.npz", model=path)(Loop.run)(Loop())


def test_a_loss_function_is_not_taken_for_the_model(tmp_path):
    def fit(model, criterion):
        train(model)

    recorded(tmp_path / "a.npz")(fit)(net(), nn.CrossEntropyLoss())
    assert Trace.load(tmp_path / "a.npz").meta["parameters"]["total"] == 64 * 64


def test_of_several_modules_one_must_be_named(tmp_path):
    def distil(student, teacher):
        train(student)

    with pytest.raises(UsageError, match=re.escape("several modules (student, teacher): name the one to record")):
        recorded(tmp_path / "a.npz")(distil)(net(), net())
    recorded(tmp_path / "a.npz", model="student")(distil)(net(), net())
    model = net()
    recorded(tmp_path / "b.npz")(distil)(model, model)  # the same one twice


async def coroutine(model): ...
def generator(model):
    yield


async def asynchronous_generator(model):
    yield


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (coroutine, "coroutine is a coroutine: its body runs after the call"),
        (generator, "generator is a generator: its body runs after the call"),
        (asynchronous_generator, "is an asynchronous generator: its body runs after the call"),
        (functools.partial(generator, None), "is a generator: its body runs after the call"),
        (Loop, "Loop is a class: decorate its method"),
        (3, "decorates a function, but got a int"),
    ],
)  # fmt: skip
def test_what_does_not_train_before_it_returns_is_refused(function, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        recorded(tmp_path / "a.npz")(function)


def test_without_a_file_the_decorator_says_how_it_is_written():
    with pytest.raises(UsageError, match=re.escape('write @recorded("train.trace.npz")')):
        recorded(train)


def test_a_loop_that_dies_leaves_its_trace_when_python_exits_and_no_framework_is_imported(tmp_path):
    script = """
        import sys
        import torch
        from torch import nn
        import memscope.integrations
        from memscope.integrations.step_recording import StepRecording

        model = nn.Linear(64, 64)
        recording = StepRecording("train.npz", steps=None, overwrite=False)
        recording.begin(model, None)
        model(torch.ones(8, 64)).mean().backward()
        print(*{"transformers", "lightning", "pytorch_lightning", "accelerate"} & sys.modules.keys())
        raise torch.OutOfMemoryError("CUDA out of memory")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "\n"
    assert done.stderr.endswith("CUDA out of memory\n")
    trace = Trace.load(tmp_path / "train.npz")
    assert "OutOfMemoryError" in trace.meta["notes"][0]
    assert trace.by("category")["gradient"] >= 64 * 64 * 4


def test_running_out_of_memory_is_recognized_inside_the_errors_of_frameworks():
    def raised(chain):
        try:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                chain(error)
        except Exception as error:
            return error

    def from_it(error):
        raise RuntimeError("the trainer failed") from error

    def while_handled(error):
        raise KeyError("step")

    def instead(error):
        raise RuntimeError("out of memory: lower the batch size") from None

    assert all(is_out_of_memory(raised(chain)) for chain in (from_it, while_handled, instead))
    assert not is_out_of_memory(KeyError("step"))
    assert not is_out_of_memory(None)

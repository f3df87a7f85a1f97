"""`memscope fit -- COMMAND`: the options that set a program's sizes, and the search over them."""

import json
import sys

import pytest
import torch
from torch import nn

from memscope import Workload, simulate
from memscope.cli.main import main
from memscope.errors import TargetError, UsageError
from memscope.program.command_line import CommandLine
from memscope.program.launch import ProgramEnd
from memscope.program.sizes import size_options


def line(*words):
    return CommandLine(("python", "train.py", *words), "/usr/bin/python", "train.py")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--batch-size", "8"], ["--batch-size", "4"]),
        (["--batch_size=8", "--lr", "1"], ["--batch_size=4", "--lr", "1"]),
        (["--per_device_train_batch_size", "8"], ["--per_device_train_batch_size", "4"]),
        (["train.batch_size=8"], ["train.batch_size=4"]),
        (["--batch_size", "64", "--micro_batch_size", "8"], ["--batch_size", "64", "--micro_batch_size", "4"]),
        (["--batch_size", "2", "--batch_size", "8"], ["--batch_size", "2", "--batch_size", "4"]),
    ],
    ids=["two words", "one word", "transformers", "hydra", "of one device", "the last counts"],
)
def test_the_micro_batch_is_found_by_its_usual_names_and_changed_in_its_place(words, changed):
    found = size_options(line(*words), {})
    assert (found.micro_batch.value, found.length) == (8, None)
    assert found.changed(line(*words), 4, None).words == ("python", "train.py", *changed)


def test_the_length_is_changed_too_and_named_options_count_before_usual_names():
    words = ["-b", "8", "--batch_size", "512", "--block_size=64", "--ctx", "32"]
    found = size_options(line(*words), {}, micro_batch="-b", length="ctx")
    assert found.changed(line(*words), 4, 16).words[2:] == (
        "-b", "4", "--batch_size", "512", "--block_size=64", "--ctx", "16",
    )  # fmt: skip
    usual = size_options(line(*words), {})
    assert (usual.micro_batch.value, usual.length.name) == (512, "--block_size")


def test_a_variable_of_the_environment_is_set_for_the_run():
    found = size_options(line(), {"BATCH_SIZE": "8", "HOME": "/root"})
    program = found.changed(line(), 4, None)
    assert program.words == ("env", "BATCH_SIZE=4", "python", "train.py")
    assert program.path.endswith("env")
    assert size_options(line("--batch_size=2"), {"BATCH_SIZE": "8"}).micro_batch.value == 2


@pytest.mark.parametrize(
    ("words", "named", "message"),
    [
        ([], {}, "for example memscope fit -- python train.py --batch-size 8"),
        (["--batch_size", "auto"], {}, '--batch_size is "auto", and fit needs a number'),
        (["--batch_size", "8"], {"micro_batch": "--bz"}, 'no option "--bz" with a value'),
        (["--batch_size", "8"], {"length": "--ctx"}, 'no option "--ctx" with a value, which --length-option names'),
    ],
    ids=["none", "no number", "a wrong name", "a wrong length"],
)
def test_an_option_that_is_not_found_is_named_with_what_to_write(words, named, message):
    with pytest.raises(UsageError) as refused:
        size_options(line(*words), {}, **named)
    assert message in str(refused.value)


@pytest.fixture
def launches(monkeypatch):
    """Stands in for `launch`: trains on batches of the size that the command line says, at most 1,000."""
    ran = []

    def launch(program, request, **how):
        batch = int(program.words[-1])
        ran.append(batch)
        if batch > 1000:
            return ProgramEnd(1, None, TargetError("train.py failed: the data have 1,000 samples\nIts output …"))

        def build():
            return Workload(
                model=nn.Linear(2**10, 2**10, bias=False),
                batches=[torch.zeros(batch * 2**7, 2**10)],
                loss=lambda model, x: model(x).square().mean(),
                optimizer_factory=torch.optim.SGD,
                name="train.py",
            )

        return ProgramEnd(0, simulate(build, device=request.device, steps=request.steps), None)

    monkeypatch.setattr("memscope.advisor.fit.programs.launch", launch)
    return ran


def test_the_largest_micro_batch_of_a_program_is_simulated_with_the_next_one(launches, capsys):
    words = ["--device", "a100-40gb:2GiB", "--json", "--", sys.executable, "-c", "", "--batch-size", "8"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *words])
    assert not ended.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["fits"]
    largest = document["largest"]["micro_batch"]
    assert {largest, largest + 1, 8} <= {*launches}
    fits = {one["micro_batch"]: one["fits"] for one in document["evidence"]}
    assert (fits[largest], fits[largest + 1]) == (True, False)
    # A sample has 2^7 rows of 2^10 floats, 0.5 MiB. The peak holds the input, the output, its square or gradient, and
    # their temporaries, in blocks that may be cached too: 3 to 8 such tensors in the memory beyond the CUDA context.
    available = 2 * 1024 - 501
    assert available / (8 * 0.5) < largest < available / (3 * 0.5)
    assert {one["name"] for one in document["devices"]} == {"a100-40gb", "a100-80gb"}
    assert any("another --batch-size" in note for note in document["notes"])


def test_sizes_that_the_program_refuses_end_the_search_with_its_reason(launches, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--device", "a100-80gb", "--", sys.executable, "-c", "", "--batch-size", "500"])
    assert not ended.value.code
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "1,001 cannot be simulated: train.py failed: the data have 1,000 samples" in told
    assert "Its output" not in told
    assert "-- " in told.partition("Next: memscope profile --device a100-80gb")[2]


def test_options_of_targets_are_refused_for_programs(capsys):
    for option in (["--preset", "7b"], ["--allow", "lora"]):
        with pytest.raises(SystemExit) as ended:
            main(["fit", *option, "--", sys.executable, "-c", "", "--batch-size", "8"])
        assert ended.value.code == 2
        assert f"{option[0]} is for targets" in capsys.readouterr().err

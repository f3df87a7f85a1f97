"""Learning rates and the number of steps, by hand; the order of the data; a job as text."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from memscope.errors import UsageError
from memscope.targets.llama2.job import Job
from memscope.targets.llama2.target import PRESETS
from memscope.targets.training.data_order import samples_of_step
from memscope.targets.training.recipe import Recipe
from memscope.targets.training.run_folder import RunFolder


def factors(steps: int, **settings: object) -> list[float]:
    recipe = Recipe(**settings)  # type: ignore[arg-type]
    return [recipe.rate_factor(step, steps) for step in range(steps)]


def test_constant_rate_is_full_after_the_warm_up_and_no_step_has_rate_zero() -> None:
    assert factors(8, schedule="constant", warmup=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors(3, schedule="constant", warmup=0.0) == [1.0, 1.0, 1.0]


def test_linear_rate_falls_in_equal_parts_towards_zero_after_the_last_step() -> None:
    assert factors(5, schedule="linear", warmup=0.2) == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_rate_is_half_in_the_middle_and_symmetric_around_it() -> None:
    found = factors(4, schedule="cosine", warmup=0.0)
    assert found == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_a_fraction_of_a_warm_up_step_is_a_whole_step() -> None:
    # 0.03 of 25 steps, 200 samples in steps of 8, is 0.75: one step, at the full rate.
    assert factors(25, schedule="constant", warmup=0.03) == [1.0] * 25
    assert factors(100, schedule="constant", warmup=0.03)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_warm_up_may_last_all_steps() -> None:
    assert factors(4, schedule="cosine", warmup=1.0) == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("epochs", "samples", "steps"), [(1, 200, 25), (3, 200, 75), (1, 9, 2), (0.5, 16, 1), (2, 12, 3)]
)
def test_steps_cover_the_epochs_and_only_the_last_one_goes_beyond(epochs: float, samples: int, steps: int) -> None:
    assert Recipe(epochs=epochs).steps(samples, 8) == steps


def test_every_problem_of_a_recipe_is_reported_at_once() -> None:
    with pytest.raises(
        ValueError, match=r"epochs=0: .*; warmup=2: .*; clip_grad_norm=-1: .*; held_out=-1: .*; keep=0: "
    ):
        Recipe(epochs=0, warmup=2, clip_grad_norm=-1, held_out=-1, keep=0)


# The order of the data


def test_every_epoch_has_each_sample_once_in_an_order_of_its_own() -> None:
    # 3 steps of 4 are 2 epochs of 6: the second step spans both epochs.
    seen = [sample for step in range(3) for sample in samples_of_step("abcdef", step, 4, seed=0)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list("abcdef")
    assert seen[:6] != seen[6:]


def test_the_order_follows_from_seed_and_step_alone() -> None:
    data = range(100)
    assert samples_of_step(data, 5, 8, seed=1) == samples_of_step(data, 5, 8, seed=1)
    assert samples_of_step(data, 5, 8, seed=1) != samples_of_step(data, 5, 8, seed=2)


def test_a_step_larger_than_the_data_takes_samples_again() -> None:
    assert Counter(samples_of_step("abc", 0, 6, seed=0)) == {"a": 2, "b": 2, "c": 2}


# The job


def test_a_job_is_read_back_from_its_text() -> None:
    words = {"strategies": "lora:r=4,amp:dtype=bf16", "rope_scaling": "8.0+1.0+4.0+8192", "clip_grad_norm": "none"}
    job = Job.of(words, PRESETS["debug"])
    assert job.config.rope_scaling == (8.0, 1.0, 4.0, 8192)
    assert job.recipe.clip_grad_norm is None
    assert job.plan == "lora:r=4,amp:dtype=bf16"
    assert Job.of(job.settings) == job


def test_the_job_is_read_back_from_the_folder_of_a_run(tmp_path: Path) -> None:
    job = Job.of({"samples": "3", "epochs": "2"}, PRESETS["debug"])
    folder = RunFolder(tmp_path / "run")
    folder.begin(job.settings)
    assert Job.of(folder.read_settings()) == job


def test_differences_of_jobs_are_split_into_those_a_resumed_run_may_have_and_others() -> None:
    one = Job.of({"samples": "3"}, PRESETS["debug"])
    other = Job.of({"samples": "4", "strategies": "ckpt", "lr": "0.5", "epochs": "2"}, PRESETS["debug"])
    refused, allowed = one.differences(other)
    assert refused == ["samples: 3 in the run, 4 given", "strategies: none in the run, ckpt given"]
    assert allowed == ["lr: 1e-05 in the run, 0.5 given", "epochs: 1.0 in the run, 2.0 given"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"device": "gpu"}, 'unknown device "gpu": .*Valid: cpu, cuda'),
        ({"epochs": "many"}, 'training: setting "epochs" cannot be "many": expected a number'),
        ({"schedule": "cos"}, 'training: setting "schedule" cannot be "cos": did you mean "cosine"'),
        ({"keep": "0"}, "training rejects these settings: keep=0"),
        ({"sample": "3"}, 'target "llama2" has no setting "sample": did you mean "samples"'),
        ({"strategies": "lorra"}, 'unknown strategy "lorra"'),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(words: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Job.of(words)

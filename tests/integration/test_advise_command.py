"""`memscope advise`, and `ckpt:auto` in `memscope profile`, on the target's smallest preset."""

import contextlib
import json
import shlex
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from remembering import Remembering
from skill import lacking

from memscope import Plan, Trace, simulate
from memscope.advisor import resolve
from memscope.advisor.measure.runner import side_by_side
from memscope.cli import advise
from memscope.errors import TraceFileError
from memscope.simulation.devices.catalogue import get_device
from memscope.strategies.ckpt import LayerPlan
from memscope.workload.description import Workload
from memscope.workload.target import find_target

SMALL = ["targets/llama2", "--preset", "debug", "--device", "a100-40gb"]
ROOT = Path(__file__).parents[2]
CONTEXT = get_device("a100-40gb").context_bytes
SETTINGS = ["seq_len=512", "micro_batch=16", "accumulation=1", "attention=sdpa", "n_layers=3"]
ALONE = ["-s", "optim:fused,ga:steps=1"]
"""The only combination of strategies, where a test is not about the search."""


@pytest.fixture(autouse=True)
def targets(tmp_path):
    """The command line runs in an empty folder; the shipped target is found by its name."""
    SMALL[0] = str(ROOT / "targets" / "llama2")


@pytest.fixture(scope="module", autouse=True)
def remembered():
    """The tests ask about few models: each is simulated once."""
    known = {}

    @contextlib.contextmanager
    def remembering(scene):
        with side_by_side(scene) as runner:
            yield Remembering(runner, known.setdefault(repr(scene), {}))

    with pytest.MonkeyPatch.context() as patch:
        for module in (advise, resolve):
            patch.setattr(module, "side_by_side", remembering)
        yield


def build() -> Workload:
    target = find_target("llama2")
    return target.build(target.configure("debug", dict(setting.split("=") for setting in SETTINGS)))


@cache
def plain_bytes() -> int:
    """Bytes the device must hold without checkpointing."""
    return simulate(build, device="a100-40gb").meta["peak_reserved"] + CONTEXT


def test_the_plan_file_is_what_profile_takes_and_holds_the_budget(run):
    budget = plain_bytes() - 100 * 2**20
    code, out, err = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", budget, "--emit", "hf")
    assert code == 0, err
    for words in (
        "checkpointing",
        "step time (estimate)",
        "for allocated bytes: ",
        "Memory against time",
        "# transformers.",
    ):
        assert words in out
    [command] = [line for line in out.splitlines() if line.startswith("Next: memscope profile")]
    assert f"--preset debug --set {' '.join(SETTINGS)} --device a100-40gb:{budget} -s " in command
    plan = str(Plan.parse(shlex.split(command)[-1]))
    assert "ckpt:plan=memscope-plan.json" in plan
    words = shlex.split(command.removeprefix("Next: memscope "))
    code, out, _ = run(*words, "-s", "optim", "--json", "-o", "planned")
    assert code in (0, 4)  # 4: the other plan, which is compared, does not fit
    assert {",".join(one["strategies"]): one["peak"]["device"] for one in json.loads(out)["runs"]}[plan] <= budget


def test_where_nothing_is_checkpointed_the_plan_of_an_earlier_run_goes(run):
    Path("memscope-plan.json").write_text("an earlier one")
    code, out, _ = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", "40GB", "--force", "--json")
    assert code == 0
    assert json.loads(out)["plan"] == {"strategies": json.loads(out)["plan"]["strategies"], "layers": {}, "file": None}
    assert not Path("memscope-plan.json").exists()


def test_a_budget_without_its_unit_is_refused_before_anything_is_simulated(run):
    for command in (["advise", *SMALL], ["check", "run.npz"]):
        code, out, err = run(*command, "--budget", "40")
        assert (code, out) == (2, "")
        assert 'a budget of "40" is 40 B: add a unit, for example 40GB' in err


def test_nothing_fits_is_exit_code_3_with_the_smallest_budget(run):
    code, out, _ = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", CONTEXT + 2**20, "--json")
    document = json.loads(out)
    assert code == 3
    assert not document["feasible"]
    assert document["minimum_budget"] > CONTEXT + 2**20
    assert document["certificate"] is None
    assert not Path("memscope-plan.json").exists()


def test_the_next_command_after_nothing_fits_finds_a_plan(run):
    code, out, _ = run("advise", *SMALL, *SETTINGS, "--budget", CONTEXT + 2**20, *ALONE)
    assert code == 3
    [line] = [line for line in out.splitlines() if line.startswith("Next: ")]
    code, out, err = run(*shlex.split(line.removeprefix("Next: memscope ")))
    assert code == 0, err
    assert "-s optim:fused,ga:steps=1" in line


def test_without_a_target_it_is_the_last_one_profiled(run):
    code, *_ = run("profile", *SMALL, *SETTINGS)
    assert code == 0
    code, out, err = run("advise", "--device", "a100-40gb", *ALONE, "--budget", "30GB", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["target"] == "llama2"
    assert lacking(document, "advise") == []
    [trace] = [Trace.load(path) for path in Path("memscope-runs").glob("*/baseline.npz")]
    assert trace.meta["settings"]["n_layers"] == 3


def test_profile_makes_a_plan_for_a_budget_on_the_way(run):
    budget = plain_bytes() - 100 * 2**20
    plan = f"{ALONE[1]},ckpt:auto,budget={budget}"
    code, out, err = run("profile", *SMALL, *SETTINGS, "-s", plan, *ALONE, "--json", "-o", "auto", "-f")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    planned = next(one for one in runs if "checkpoints.json" in ",".join(one["strategies"]))
    assert planned["peak"]["allocated"] <= budget - CONTEXT
    plan_file = Path("auto") / "checkpoints.json"
    assert LayerPlan.load(plan_file).layers
    # With all of the device's memory, the allocator may reserve more than the budget; with the budget's, it must do.
    small = replace(get_device("a100-40gb"), capacity_bytes=budget)
    trace = simulate(build, device=small, strategies=f"{ALONE[1]},ckpt:plan={plan_file}")
    assert trace.meta["out_of_memory"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "nothing"], "is not a size"),
        (["--budget", "40GB", "--allow", "loro"], 'no strategy "loro"'),
        (["--budget", "40GB", "--layer-list", "layer"], 'no nn.ModuleList or nn.Sequential "layer"'),
        (["--budget", "40GB", "-s", "lora:r=0"], "r=0 is not a rank"),
        (["--budget", "40GB", "-o", "no/such/folder.json"], "there is no folder"),
    ],
)
def test_bad_input_is_told_in_one_message(run, words, said):
    code, out, err = run("advise", *SMALL, *words)
    assert code == 2
    assert not out
    assert said in err
    assert "Traceback" not in err


def test_a_share_needs_a_device(run):
    code, _, err = run("advise", SMALL[0], "--preset", "debug", "--budget", "90%")
    assert code == 2
    assert "share of a device: name one" in err


def test_a_plan_of_an_earlier_run_stays_and_the_next_gets_a_number(run):
    Path("memscope-plan.json").write_text("mine")
    code, out, err = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", plain_bytes() - 100 * 2**20)
    assert code == 0, err
    assert "ckpt:plan=memscope-plan-2.json" in out
    code, _, err = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", "40GB")  # nothing is checkpointed: no file
    assert code == 0, err
    assert Path("memscope-plan.json").read_text() == "mine"
    assert not Path("memscope-plan-3.json").exists()


def test_a_named_file_that_is_there_is_refused_before_anything_is_simulated(run):
    Path("plan.json").write_text("mine")
    code, out, err = run("advise", *SMALL, "--budget", "40GB", "-o", "plan.json")
    assert (code, out) == (2, "")
    assert "plan.json exists already" in err
    assert Path("plan.json").read_text() == "mine"


def test_advice_is_shown_though_its_file_cannot_be_written(run, monkeypatch):
    def fail(self, path, *, overwrite=False):
        raise TraceFileError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(LayerPlan, "save", fail)
    code, out, err = run("advise", *SMALL, *SETTINGS, *ALONE, "--budget", plain_bytes() - 100 * 2**20)
    assert code == TraceFileError.exit_code
    assert "No space left on device" in err
    assert "checkpointing" in out
    assert "Next: " not in out

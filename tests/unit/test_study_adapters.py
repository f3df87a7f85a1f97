"""`memscope study adapters`: QLoRA of several ranks beside full fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from memscope.cli.main import main
from memscope.errors import TargetError
from memscope.runs.plans import Ended, RunSpec
from memscope.simulation.devices.catalogue import get_device
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan
from memscope.studies import adapters
from memscope.studies.adapters import Adapter, AdapterQuestion, compare_adapters
from memscope.trace import PHASES, Trace
from memscope.workload.target import find_target
from tests.traces import TraceBuilder

GIB = 2**30


def question(**changes: Any) -> AdapterQuestion:
    given: dict[str, Any] = dict(
        models=["opt-125m", "opt-30b"], adapters=[Adapter(16, 16), Adapter(64, 64), Adapter(64, 32)],
        devices=["rtx4090", "a100-40gb"], device_file=None, settings={"seq_len": "128"}, strategies="amp:dtype=bf16",
    )  # fmt: skip
    return AdapterQuestion(**(given | changes))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """The simulations that are asked for: those of opt-30b do not fit an RTX 4090."""
    asked: list[RunSpec] = []

    def run(specs: Sequence[RunSpec], report: Any) -> Ended:
        asked.extend(specs)
        return Ended({index: trace_of(spec) for index, spec in enumerate(specs)}, {})

    monkeypatch.setattr(adapters, "run_all", run)
    return asked


def trace_of(spec: RunSpec) -> Trace:
    large = "30b" in spec.target
    builder = TraceBuilder()
    builder.phase("forward", step=0)
    builder.new("activation", (30 if large else 2) * GIB)
    return builder.trace(
        {
            "out_of_memory": {"limit": 1} if large and spec.device == "rtx4090" else None,
            "peak_reserved": (30 if large else 2) * GIB,
            "parameters": {"total": 1000, "trainable": 10 if "qlora" in spec.plan else 1000},
            "device": {"name": spec.device, "simulated": True},
            "cost": {"rows": [[0, 0, PHASES.index("forward"), 0, 0, 1, 0, 0, 0.25]]},
            "notes": ["a stand-in"],
        }
    )


def in_this_process(specs: Sequence[RunSpec], report: Any) -> Ended:
    found: dict[int, Trace | None] = {}
    for index, spec in enumerate(specs):
        target = find_target(spec.target)
        build = partial(target.build, target.configure(None, spec.settings))
        found[index] = simulate(build, strategies=spec.plan, device=get_device(spec.device), steps=spec.steps)
        report(index, 1, 1, None)
    return Ended(found, {})


def study(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["study", "adapters", *words])
    return int(str(end.value.code))


def test_every_model_method_and_device_has_a_cell_and_equal_ranks_share_a_simulation(simulated: list[RunSpec]) -> None:
    found = compare_adapters(question())
    assert [(cell.model, cell.method, cell.device) for cell in found.cells] == [
        (model, method, device)
        for model in ("opt-125m", "opt-30b")
        for method in ("QLoRA 16/16", "QLoRA 64/64", "QLoRA 64/32", "full")
        for device in ("rtx4090", "a100-40gb")
    ]
    assert len(simulated) == 2 * 3 * 2, "two ranks and full fine-tuning"
    plans = [Plan.parse(spec.plan).strategies for spec in simulated]
    assert {tuple(getattr(one.config, "r", one.name) for one in plan) for plan in plans} == {
        (16, "amp"), (64, "amp"), ("amp",),
    }  # fmt: skip
    assert {tuple(spec.settings.items()) for spec in simulated} == {(("seq_len", "128"),)}
    assert found.notes == ("a stand-in.",)


def test_a_cell_has_the_memory_with_the_context_and_a_time_only_where_it_fits(simulated: list[RunSpec]) -> None:
    cells = compare_adapters(question(models=["opt-30b"])).cells
    small, large = cells[0], cells[1]
    assert (small.fits, small.step_seconds) == (False, None)
    assert small.needed_bytes == 30 * GIB + get_device("rtx4090").context_bytes
    assert (large.fits, large.step_seconds, large.trained) == (True, 0.25, 10)


def test_a_simulation_that_failed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "run_all", lambda specs, report: Ended({}, {0: TargetError("it was killed")}))
    with pytest.raises(TargetError, match=r"hf:opt-125m .* on rtx4090: it was killed"):
        compare_adapters(question())


def test_the_study_is_printed_as_a_table_and_as_json(
    simulated: list[RunSpec], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    words = ["--models", "opt-30b", "--adapters", "32/16"]
    assert study(*words) == 0
    printed = capsys.readouterr().out
    assert "× 30." in printed
    assert "QLoRA 32/16" in printed
    assert "memscope profile hf:opt-30b" in printed
    assert study(*words, "--json", "seq_len=64") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["settings"] == {"seq_len": "64", "dtype": "fp32"}
    assert [(row["method"], row["r"], row["alpha"], row["fits"]) for row in document["rows"]] == [
        ("qlora", 32, 16, False), ("qlora", 32, 16, True), ("full", None, None, False), ("full", None, None, True),
    ]  # fmt: skip


def test_exit_code_three_says_that_nothing_fits(simulated: list[RunSpec]) -> None:
    assert study("--models", "opt-30b", "--devices", "rtx4090", "--json") == 3


def test_the_simulations_train_the_updates_or_the_whole_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "run_all", in_this_process)
    model = tmp_path / "config.json"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    words = ["--models", str(tmp_path), "--adapters", "4/4", "--devices", "rtx4090", "--json", "seq_len=16"]
    assert study(*words) == 0
    qlora, full = json.loads(capsys.readouterr().out)["rows"]
    # q_proj and v_proj are adapted, each 32 by 32: rank 4 · (32 + 32)
    assert qlora["trained_parameters"] == 2 * 4 * 64
    # embedding and head, 4 · 32² of attention, 3 matrices of 32 by 64, 3 norms
    assert full["trained_parameters"] == 2 * 64 * 32 + 4 * 32**2 + 3 * 32 * 64 + 3 * 32
    assert 0 < qlora["peak_allocated"] < qlora["needed_bytes"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--all", "--models", "opt-125m"], "--all and --models both name the models"),
        (["--adapters", "16"], '--adapters "16": expected rank and alpha as whole numbers from 1'),
        (["--adapters", "0/16"], '--adapters "0/16"'),
        (["--models", "opt-125m,"], '--models "opt-125m,": expected names joined by commas'),
        (["--devices", "rtx409"], '"rtx409"'),
        (["--models", "opt-126m"], '"opt-126m"'),
        (["-s", "lora"], "qlora"),
        (["sequence=4"], '"sequence"'),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "run_all", in_this_process)
    assert study(*words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error

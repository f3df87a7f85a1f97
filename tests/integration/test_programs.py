"""Programs as their communities write them: simulated, and recorded on the CPU, unchanged."""

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from program_runs import PROGRAMS, run_program
from skill import lacking

from memscope import StepPlan, Workload, simulate
from memscope.cli.main import main
from memscope.trace import CATEGORIES, PHASES, Trace

NEEDS = {
    "mnist": (), "nanogpt": (), "gan": (), "accelerated": ("accelerate",), "hf_trainer": ("transformers", "accelerate"),
    "dpo": ("transformers",), "diffusion": ("diffusers",), "lightning_module": ("lightning",), "trl_sft": ("trl",),
}  # fmt: skip
"""Program → the libraries without which it does not run."""
ARGUMENTS = {"mnist": ("--workers", "0")}
"""On the CPU, a batch that a worker loads lies in shared memory, which no operator of the program allocates."""


@pytest.fixture(params=NEEDS)
def program(request, tmp_path, monkeypatch):
    """The name of a program, in an empty folder."""
    missing = [library for library in NEEDS[request.param] if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    return request.param


@pytest.fixture
def profile(tmp_path, monkeypatch, capfd):
    """`memscope profile --device a100-80gb --json … -- COMMAND`: exit code, document and stderr."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def run(*words):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
            main(["profile", "--device", "a100-80gb", "--json", "-o", "runs", "--", *words])
        return end.value.code or 0, json.loads(out.getvalue()), capfd.readouterr().err

    return run


def test_the_command_simulates_a_program_and_lists_what_it_assumed(profile, tmp_path):
    code, document, err = profile("python", str(PROGRAMS / "mnist.py"), "--save-model", "mnist.pt")
    assert code == 0, err
    assert document["target"] == "mnist.py"
    assert document["device"] == {"name": "a100-80gb", "simulated": True}
    assert document["program"]["exit_code"] == 0
    assert lacking(document, "profile of a program") == []
    (run,) = document["runs"]
    (loss, *_) = [row for row in run["assumptions"] if row["what"] == "a floating-point number that the program reads"]
    assert loss["value"] == "1.0"
    assert "loss.item()" in loss["where"]
    assert any("2 workers" in note for note in run["notes"])
    assert Trace.load(run["trace"]).steps == (0, 1)
    assert not (tmp_path / "mnist.pt").exists()
    assert "Train epoch 1 [16/32] loss: 1.000000" in err
    assert "Traceback" not in err


def test_a_simulated_program_that_would_fail_on_a_gpu_fails(profile, tmp_path):
    source = (PROGRAMS / "mnist.py").read_text().replace("data, target = data.to(device), target.to(device)", "pass")
    (tmp_path / "forgot.py").write_text(source)
    code, document, err = profile("python", "forgot.py")
    assert (code, document["program"]["exit_code"]) == (1, 1)
    assert "RuntimeError: Expected all tensors to be on the same device" in err
    assert "failed before its first optimizer step ended" in document["error"]["message"]


def allocations(trace, steps):
    """Size, operator, module, phase and step of each allocation, in order."""
    columns = (trace.size, trace.op, trace.module, trace.phase, trace.step)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        (size, trace.ops[op], trace.modules[module], phase, step)
        for size, op, module, phase, step in rows
        if steps(step)
    ]


def test_on_the_cpu_a_simulated_program_is_its_recording(program, tmp_path):
    path, words = PROGRAMS / f"{program}.py", ARGUMENTS.get(program, ())
    simulated = run_program(path, *words, device="cpu")
    assert list(tmp_path.rglob("*.pt")) == list(tmp_path.rglob("*.safetensors")) == []
    recorded = run_program(path, *words, device="cpu", simulated=False)
    assert simulated.trace.steps[:2] == recorded.trace.steps[:2] == (0, 1)
    of_steps = [allocations(ran.trace, lambda step: step >= 0) for ran in (simulated, recorded)]
    assert of_steps[0] == of_steps[1]
    before = [Counter(allocations(ran.trace, lambda step: step < 0)) for ran in (simulated, recorded)]
    assert before[0] == before[1]
    assert simulated.trace.meta["parameters"] == recorded.trace.meta["parameters"]


def test_on_a_gpu_that_is_not_there_a_program_trains(program, tmp_path):
    before = set(tmp_path.rglob("*"))
    trace = run_program(PROGRAMS / f"{program}.py").trace
    assert trace.steps[:2] == (0, 1)
    at_peak = trace.by("category", at="peak")
    assert min(at_peak["parameter"], at_peak["optimizer_state"]) > 0
    assert at_peak.get("other", 0) < 0.02 * trace.peak.allocated_bytes
    new = set(tmp_path.rglob("*")) - before
    assert not [path for path in new if path.suffix in {".pt", ".pth", ".bin", ".ckpt", ".safetensors"}]


def classes_of(name):
    """What a program defines before its first line that needs data."""
    defined = {"__name__": name}
    exec(compile((PROGRAMS / f"{name}.py").read_text().partition("\ndata_dir")[0], name, "exec"), defined)
    return defined


def mnist():
    program = classes_of("mnist")

    def loss(model, batch):
        output = model(batch[0])
        return torch.nn.functional.nll_loss(output, batch[1]), output

    return Workload(
        model=program["Net"](),
        batches=[(torch.rand(16, 1, 28, 28), torch.randint(0, 10, (16,)))],
        loss=loss,
        optimizer_factory=lambda parameters: torch.optim.Adadelta(parameters, lr=1.0),
        plan=StepPlan(keep_batch=True),
    )


def nanogpt():
    program = classes_of("nanogpt")
    tokens = torch.randint(0, 256, (8, 65))

    def optimizer(parameters):
        groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
        return torch.optim.AdamW([{"params": group} for group in groups], fused=True)

    return Workload(
        model=program["GPT"](),
        batches=[(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())],
        loss=lambda model, batch: model(*batch)[::-1],  # the logits live until the next call
        optimizer_factory=optimizer,
        plan=StepPlan(micro_batches=2, autocast=torch.float16, grad_scaler=True, clip_grad_norm=1.0),
    )


@pytest.mark.parametrize(
    ("name", "target", "more"),  # nanoGPT has fetched its next batch; run_step adds up the losses of micro-batches
    [("mnist", mnist, 0), ("nanogpt", nanogpt, 2 * 4 * 64 * 8 - 512)],
    ids=["mnist", "nanogpt"],
)
def test_a_program_equals_the_same_workload_as_a_target(name, target, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_target, of_program = simulate(target, device="a100-80gb"), run_program(PROGRAMS / f"{name}.py").trace
    assert sizes(of_program) == sizes(of_target)
    assert of_program.peak.allocated_bytes == of_target.peak.allocated_bytes + more
    assert of_program.peak.phase == of_target.peak.phase


def sizes(trace):
    """Sizes of the allocations of training, in order, without the batches, which a program copies to the GPU earlier.

    Workspaces are left out, which stay from the first call on, here from an evaluation, and so are blocks of up to
    2 KiB: nanoGPT's next batch, and numbers, of which a program makes others than `run_step`.
    """
    left_out = {CATEGORIES.index(category) for category in ("input", "workspace")}
    phases = {PHASES.index(phase) for phase in ("forward", "loss", "backward", "optimizer")}
    rows = zip(trace.size.tolist(), trace.category.tolist(), trace.phase.tolist(), strict=True)
    return [size for size, category, phase in rows if size > 2048 and category not in left_out and phase in phases]

"""The part of `make gpu` that tests advice on the GPU: whether a plan keeps its budget, and its estimated cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_plan import TrainingCell

__all__ = ["CASES", "advice_table", "advise", "measure_plan"]

CASES = (
    (TrainingCell(weights="bf16", amp="none", training="lora", ckpt="none", accumulation=8, attention="sdpa"), 0.97),
    (TrainingCell(weights="bf16", amp="none", training="lora", ckpt="none", accumulation=8, attention="eager"), 0.95),
)
"""Ways to train, and the share of the memory they need without checkpointing that is given as budget."""


def advise(job: dict[str, Any]) -> dict[str, Any]:
    """Ask for advice; the plan file is left in a folder, estimates of nothing and everything checkpointed beside it."""
    import torch
    from gpu_training import prepare

    import memscope
    from memscope.simulation.devices.catalogue import get_device
    from memscope.strategies.ckpt import LayerPlan

    torch.set_num_threads(1)
    cell, device = TrainingCell(**job["cell"]), get_device(job["predicted_for"])
    plain = memscope.simulate(lambda: prepare(cell, job["preset"]), device=device, strategies=cell.plan).meta
    needs = plain["peak_reserved"] + plain["context"]
    given = cell.plan + ",optim:fused"
    advice = memscope.advise(
        lambda: prepare(cell, job["preset"]), budget=int(job["share"] * needs), device=device, strategies=given
    )
    file = LayerPlan(advice.layers, advice.made_for).save(Path(job["plan_file"])) if advice.layers else None
    return {
        "budget": advice.budget_bytes,
        "context": device.context_bytes,
        "feasible": advice.feasible,
        "plan": ",".join([*advice.strategies, *([f"ckpt:plan={file}"] if file else [])]),
        "none": ",".join(advice.strategies),
        "all": ",".join([*advice.strategies, "ckpt"]),
        "allocated": advice.peak.allocated,
        "overhead_vs_none": advice.overhead_vs_none,
        "overhead_vs_all": advice.overhead_vs_all,
    }


def measure_plan(job: dict[str, Any]) -> dict[str, Any]:
    """Five steps of a plan: the peak of the first two, and the median time of the others."""
    import time
    from statistics import median

    import torch
    from gpu_training import materialized, start

    from memscope.workload.step import run_step

    on_gpu = job["device"] == "cuda"
    cell = TrainingCell(**job["cell"])
    training, pieces = start(materialized(cell, job["preset"], job["device"], job["plan"]), job["device"], steps=5)
    seconds = []
    while pieces:
        began = time.perf_counter()
        run_step(training, pieces.pop(0))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    return {"allocated": peak, "seconds": median(seconds[2:])}


def advice_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: each case with budget, peaks, and what checkpointing costs, estimated and measured."""
    lines = [
        "",
        "Advice: a budget below what the step needs, the plan for it, and what checkpointing costs:",
        "",
        "| case | budget MiB | allocated, predicted | measured | holds | slow-down, estimated | measured |",
        "|---|---:|---:|---:|:-:|---:|---:|",
    ]
    for row in rows:
        if "problem" in row:
            lines.append(f"| {row['case']} | {row['problem']} | | | | | |")
            continue
        measured = row["measured"]["planned"]
        slower = measured["seconds"] / row["measured"]["none"]["seconds"] - 1
        size = measured["allocated"]
        holds = "–" if size is None else "yes" if size + row["context"] <= row["budget"] else "no"
        shown = "–" if size is None else f"{size / 2**20:.1f}"
        lines.append(
            f"| {row['case']} | {row['budget'] / 2**20:.1f} | {row['allocated'] / 2**20:.1f} | {shown} | {holds} "
            f"| {row['overhead_vs_none']:+.1%} | {slower:+.1%} |"
        )
    return lines

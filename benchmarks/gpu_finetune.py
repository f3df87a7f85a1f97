"""The part of `make gpu` that fine-tunes the model, and compares memscope's program with transformers and PEFT.

Both programs run in processes of their own, on the same samples in the same order, from the same random weights: each
value depends only on the name of its weight. Before any measurement, the peer's first step must have the same loss and
gradients as ours, in float32 and with the same dropout.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_plan import Budget
from gpu_table2 import Runs

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ATTENTION", "compare_programs", "finetune", "finetune_lines", "finetune_with_peft"]

ATTENTION = ("eager", "sdpa")
"""Kinds of attention to compare: the default of memscope's model, and that of transformers."""
PLAN = "lora,amp"
WARM_UP = 3
"""Number of initial steps that tokens/s excludes."""
SPEED_BOUND = 0.95
"""Fraction of the peer's tokens/s that our program must reach."""
SAME_LOSS, SAME_GRADIENT = 1e-4, 1e-3
"""Accepted relative differences of loss and gradient norm in float32 for the same work."""


def compare_programs(
    attention: str, job: dict[str, Any], runs: Runs, budget: Budget, guess_seconds: float
) -> dict[str, Any]:
    """Run our program, then the peer, if time allows both."""
    row: dict[str, Any] = {"attention": attention}
    if not budget.allows([], guess_seconds):
        return row | {"problem": "skipped: no time left"}
    job = {"attention": attention, **job}
    ours = runs.do_next("finetune", **job)
    if "error" in ours:
        return row | {"problem": f"ours: {ours['error']}"}
    peer = runs.do_next("finetune_with_peft", **job, first_step=ours["first_step"])
    if "error" in peer:
        return row | {"ours": ours, "problem": f"peer: {peer['error']}"}
    return row | {"ours": ours, "peer": peer}


def _described(job: dict[str, Any]) -> Any:
    """The job for `memscope.targets.llama2.finetune`, on the data shipped with memscope."""
    from memscope.targets.llama2.job import Job
    from memscope.targets.llama2.target import read_samples
    from memscope.workload.target import find_target

    base = find_target("llama2").configure(job["preset"])
    epochs = job["steps"] * base.micro_batch * base.accumulation / len(read_samples(base))
    words = {"strategies": PLAN, "device": job["device"], "attention": job["attention"], "held_out": "0"}
    return Job.of({**words, "epochs": repr(epochs)}, base)


def _samples(described: Any, samples: Sequence[Any], step: int) -> list[Any]:
    from memscope.targets.training.data_order import samples_of_step

    config = described.config
    return samples_of_step(samples, step, config.micro_batch * config.accumulation, config.seed)


def finetune(job: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune with memscope's own program, except for its command line."""
    import json

    import torch

    from memscope.targets.llama2.result import save_result
    from memscope.targets.llama2.session import prepare
    from memscope.targets.training.run_folder import RunFolder
    from memscope.targets.training.train import train
    from memscope.targets.training.watch import watched
    from memscope.workload.micro_batches import micro_batches

    described, folder = _described(job), RunFolder(Path(job["folder"]))
    with torch.device(job["device"]):  # the host is slow at drawing 7B weights
        session = prepare(described)
    training, workload = session.training, session.training.workload
    _fill(dict(workload.model.named_parameters()))
    pieces = micro_batches(workload, _samples(described, session.samples, 0))
    first_step = _first_step(
        pieces, lambda data: workload.loss(workload.model, training.to_device(data)), workload.model
    )
    _forget(job["device"])
    folder.begin(described.settings)
    with watched(session, folder) as watch:
        finished = train(session, folder, watch)
    peaks = _peaks(job["device"])
    saved = save_result(session, folder)
    steps = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {
        "first_step": first_step,
        "finished": finished and saved.is_dir(),
        "rows": len(session.samples),
        "samples": session.done * described.config.micro_batch * described.config.accumulation,
        **_measured(steps, peaks),
    }


def finetune_with_peft(job: dict[str, Any]) -> dict[str, Any]:
    """Run the same steps as a program written with transformers and PEFT."""
    import peft
    import torch
    import transformers

    from memscope.strategies import Plan
    from memscope.targets.llama2.target import build_on, read_samples
    from memscope.workload.micro_batches import micro_batches

    described, device = _described(job), job["device"]
    samples = read_samples(described.config)
    with torch.device("meta"):
        ours = build_on(samples, described.config)
        Plan.parse(described.plan).apply(ours)
    with torch.device(device):
        base = transformers.LlamaForCausalLM(_hf_config(described.config))
    settings = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings).train()
    _fill_peer(model, ours.model)

    def loss(data: Mapping[str, Tensor]) -> Tensor:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in data.items()}
        return model(input_ids=moved["tokens"], labels=moved["labels"]).loss  # type: ignore[no-any-return]

    pieces = micro_batches(ours, _samples(described, samples, 0))
    _require_same_work(_first_step(pieces, loss, model), job["first_step"])
    _forget(device)
    steps = _steps_of_peer(described, ours, samples, model, loss)
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    return {**_measured(steps, _peaks(device)), "versions": versions}


def _steps_of_peer(
    described: Any, ours: Any, samples: Sequence[Any], model: nn.Module, loss: Callable[[Any], Tensor]
) -> list[dict[str, Any]]:
    """Run the peer's steps; `ours` provides only the settings and the division into micro-batches."""
    import torch

    from memscope.workload.micro_batches import micro_batches

    config, recipe, device = described.config, described.recipe, described.device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(device, enabled=ours.plan.grad_scaler)
    total = recipe.steps(len(samples), config.micro_batch * config.accumulation)
    steps: list[dict[str, Any]] = []
    for step in range(total):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * recipe.rate_factor(step, total)
        chosen, losses = _samples(described, samples, step), []
        for piece in micro_batches(ours, chosen):
            with torch.autocast(device, dtype=ours.plan.autocast):
                value = loss(piece.data) * piece.share
            scaler.scale(value).backward()
            losses.append(value.detach())
            del value
        scale = scaler.get_scale()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        mean = torch.stack(losses).sum().item()
        seconds, tokens = time.perf_counter() - began, sum(len(sample.tokens) for sample in chosen)
        steps.append({"loss": mean, "seconds": seconds, "tokens": tokens, "skipped": scaler.get_scale() < scale})
    return steps


def _hf_config(config: Any) -> Any:
    from transformers import LlamaConfig

    arch = config.architecture
    settings: dict[str, Any] = {
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.dim,
        "intermediate_size": arch.hidden_dim,
        "num_hidden_layers": arch.n_layers,
        "num_attention_heads": arch.n_heads,
        "num_key_value_heads": arch.kv_heads,
        "max_position_embeddings": arch.max_seq_len,
        "rms_norm_eps": arch.norm_eps,
        "use_cache": False,
        "attn_implementation": config.attention,
    }
    return LlamaConfig(**settings)


def _fill(weights: Mapping[str, Tensor]) -> None:
    """Give each weight values that depend only on its name in our model, for both programs."""
    import torch
    from torch import nn

    with torch.no_grad():
        for name, weight in weights.items():
            if weight.ndim == 1:
                nn.init.ones_(weight)
            elif name.endswith(".lora_b"):
                nn.init.zeros_(weight)
            else:
                generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
                weight.normal_(std=0.02, generator=generator)


def _fill_peer(model: Any, ours: Any) -> None:
    """Give transformers' model, with PEFT's adapters, the weights of our model; q and k have another order."""
    import torch

    from memscope.targets.llama2.hf_format import hf_module, rotary_order

    theirs = dict(model.get_base_model().named_parameters())
    weights: dict[str, Tensor] = {}
    for name, _ in ours.named_parameters():
        module, _, part = name.rpartition(".")
        there = hf_module(module)
        adapted = f"{there}.base_layer.weight"
        places = {"weight": adapted if adapted in theirs else f"{there}.weight"}
        places |= {"lora_a": f"{there}.lora_A.default.weight", "lora_b": f"{there}.lora_B.default.weight"}
        weights[name] = theirs.pop(places[part])
    if theirs:
        raise ValueError(f"not the same work: transformers' model has weights that ours lacks: {', '.join(theirs)}")
    _fill(weights)
    with torch.no_grad():
        for name, weight in weights.items():
            module, _, part = name.rpartition(".")
            if part == "weight":
                weight.copy_(rotary_order(weight, module, ours.arch, to_hf=True))


def _first_step(pieces: Sequence[Any], loss: Callable[[Any], Tensor], model: nn.Module) -> dict[str, float]:
    """Loss and gradient norm of the first step in float32, without changing a weight."""
    import torch

    torch.manual_seed(0)  # both programs draw their dropout in the same order
    total = 0.0
    for piece in pieces:
        value = loss(piece.data) * piece.share
        value.backward()
        total += value.item()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(trained, float("inf")).item()
    model.zero_grad(set_to_none=True)
    counts = {"parameters": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in trained)}
    return {"loss": total, "gradient_norm": norm, **counts}


def _require_same_work(peers: Mapping[str, float], ours: Mapping[str, float]) -> None:
    allowed = {"loss": SAME_LOSS, "gradient_norm": SAME_GRADIENT, "parameters": 0.0, "trained": 0.0}
    for name, most in allowed.items():
        if not abs(peers[name] - ours[name]) <= most * abs(ours[name]):
            raise ValueError(f"not the same work: {name} of the first step {peers[name]!r}, ours {ours[name]!r}")


def _forget(device: str) -> None:
    """Release memory from before the measurement, so that only weights stay in the allocator."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peaks(device: str) -> dict[str, int | None]:
    import torch

    if device != "cuda":
        return {"allocated": None, "reserved": None}
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def _measured(steps: Sequence[Mapping[str, Any]], peaks: Mapping[str, int | None]) -> dict[str, Any]:
    timed = steps[WARM_UP:] or steps
    seconds = sum(step["seconds"] for step in timed)
    return {
        "steps": len(steps),
        "not_timed": len(steps) - len(timed),
        "tokens_per_second": sum(step["tokens"] for step in timed) / seconds,
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "seconds": [step["seconds"] for step in steps],
        "skipped": sum(bool(step.get("skipped")) for step in steps),
        **peaks,
    }


def finetune_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return lines of Markdown: both programs, and whether the bounds hold."""
    if not rows:
        return []
    lines = [
        "",
        f"Fine-tuning with {PLAN} from random weights:",
        "",
        "| attention | program | tokens/s | allocated MiB | reserved MiB | first loss | last loss | skipped |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for side in ("ours", "peer"):
            if side in row:
                lines.append(_line(row["attention"], _name(side, row[side]), row[side]))
        if "problem" in row:
            lines.append(f"| {row['attention']} | {row['problem'].replace('|', '/')} | | | | | | |")
    return [*lines, "", *(_verdict(row) for row in rows if "ours" in row)]


def _name(side: str, found: Mapping[str, Any]) -> str:
    if side == "ours":
        return "memscope.targets.llama2.finetune"
    return " + ".join(f"{name} {version}" for name, version in found["versions"].items())


def _line(attention: str, program: str, found: Mapping[str, Any]) -> str:
    sizes = [found[name] for name in ("allocated", "reserved")]
    shown = ["–" if size is None else f"{size / 2**20:.2f}" for size in sizes]
    losses = [f"{found[name]:.4f}" for name in ("first_loss", "last_loss")]
    words = [attention, program, f"{found['tokens_per_second']:.1f}", *shown, *losses, str(found["skipped"])]
    return f"| {' | '.join(words)} |"


def _verdict(row: Mapping[str, Any]) -> str:
    ours = row["ours"]
    words = (
        f"{row['attention']}: {ours['samples']} samples, from {ours['rows']} shipped rows, in {ours['steps']} steps, "
        f"{ours['not_timed']} of them not timed: {'completed' if ours['finished'] else 'not completed'}"
    )
    if "peer" in row:
        peer = row["peer"]
        ratio = ours["tokens_per_second"] / peer["tokens_per_second"]
        words += f"; {ratio:.3f} of the peer's tokens/s, bound {SPEED_BOUND}: {_held(ratio >= SPEED_BOUND)}"
        for name in ("allocated", "reserved"):
            if ours[name] is not None:
                more = ours[name] - peer[name]
                words += f"; {name} {more / 2**20:+.2f} MiB, bound 0: {_held(more <= 0)}"
    return f"{words}."


def _held(is_held: bool) -> str:
    return "held" if is_held else "not held"

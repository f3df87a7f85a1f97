"""Training runs that others measured on an A100: figures from the scoreboard, and the lengths of their samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from scoreboard_cases import PublishedCase, load_groups

__all__ = ["LLAMA_RUNS", "SAMPLE_LENGTHS", "TRAINER_RUNS", "LlamaRun", "TrainerRun"]

# Tokens of each of the first 200 Alpaca samples, in the order of the file: the prompt template of Stanford Alpaca, BOS
# and EOS included, with LLaMA2's tokenizer. The file is alpaca_data_200_samples.json of leigao97/minimal-llama.
SAMPLE_LENGTHS = (
    98, 55, 117, 136, 208, 71, 118, 302, 63, 87, 102, 50, 127, 157, 95, 158, 144, 143, 140, 62, 56, 370, 107, 405,
    149, 226, 163, 256, 134, 148, 221, 78, 117, 219, 180, 86, 143, 88, 165, 110, 165, 81, 212, 134, 117, 197, 158,
    137, 204, 140, 99, 217, 85, 89, 68, 74, 58, 93, 54, 60, 62, 85, 63, 89, 73, 161, 72, 155, 82, 206, 71, 82, 118,
    93, 81, 82, 69, 325, 89, 133, 144, 88, 211, 329, 216, 142, 327, 220, 183, 77, 318, 89, 160, 104, 131, 69, 116,
    67, 49, 76, 109, 126, 113, 52, 124, 62, 140, 94, 56, 104, 91, 92, 94, 79, 74, 143, 94, 75, 78, 77, 75, 228, 74,
    83, 80, 79, 83, 79, 79, 92, 93, 88, 84, 103, 55, 94, 69, 80, 73, 80, 131, 77, 79, 70, 95, 116, 80, 62, 92, 135,
    102, 99, 135, 143, 90, 101, 139, 107, 138, 173, 334, 76, 147, 170, 136, 168, 168, 78, 61, 103, 128, 165, 117,
    81, 82, 193, 78, 154, 124, 78, 89, 84, 85, 145, 223, 84, 94, 136, 87, 80, 97, 86, 80, 87, 95, 79, 103, 162, 79,
    169,
)  # fmt: skip

_CASES = {group.id: group.cases for group in load_groups()}


@dataclass(frozen=True)
class LlamaRun:
    """LLaMA2-7B in Meta's code, fine-tuned on these samples one by one: AdamW, fp32 weights."""

    name: str
    strategies: str
    """LoRA r=16 and, in some runs, float16 autocast of the forward pass."""
    bias: tuple[str, ...] | None
    """The layers that also have a bias, frozen and zero."""
    allocated_bytes: tuple[int, ...]
    """torch.cuda.max_memory_allocated() of a program with one micro-batch a step and, if published, of one with 8."""


def _llama_runs(cases: tuple[PublishedCase, ...]) -> tuple[LlamaRun, ...]:
    """The runs of the same strategies are one: they differ in accumulation."""
    runs = []
    for strategies in dict.fromkeys(case.strategies for case in cases):
        same = sorted(
            (case for case in cases if case.strategies == strategies),
            key=lambda case: case.attempts["read"].settings.get("accumulation", 1),
        )
        bias = same[0].attempts["read"].settings["bias"]
        runs.append(
            LlamaRun(
                name=strategies.removeprefix("lora:targets="),
                strategies=strategies,
                bias=None if bias == "none" else tuple(bias.split("+")),
                allocated_bytes=tuple(case.published["allocated"] for case in same),
            )
        )
    return tuple(runs)


LLAMA_RUNS = _llama_runs(_CASES["ee599"])


@dataclass(frozen=True)
class TrainerRun:
    """A run of Hugging Face's Trainer: bf16 weights, packed samples, gradient checkpointing, FlashAttention 2.7.3."""

    name: str
    model: str
    lora: bool
    """LoRA r=16 on the four projections of attention, or training of all weights."""
    samples: int
    seq_len: int
    allocated_bytes: int
    """torch.cuda.max_memory_allocated()."""
    nvidia_smi_mib: int
    """Largest reading of nvidia-smi, once a second."""


def _trainer_run(case: PublishedCase) -> TrainerRun:
    read = case.attempts["read"]
    model, lora = ("mistral" if "mistral" in read.target else "santacoder"), "adapter" in read.settings
    return TrainerRun(
        name=f"{model}-lora-{read.settings['micro_batch']}" if lora else f"{model}-{read.settings['micro_batch']}",
        model=model,
        lora=lora,
        samples=read.settings["micro_batch"],
        seq_len=read.settings["seq_len"],
        allocated_bytes=case.published["allocated"],
        nvidia_smi_mib=case.published["device"] // 2**20,
    )


TRAINER_RUNS = tuple(_trainer_run(case) for case in _CASES["fms"])

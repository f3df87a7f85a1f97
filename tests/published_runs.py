"""Memory of training runs that others measured on an A100 and published, and the lengths of their samples."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class LlamaRun:
    """LLaMA2-7B in Meta's code, fine-tuned on these samples one by one: LoRA r=16, AdamW, fp32 weights."""

    name: str
    targets: str
    """The layers that LoRA adapts, joined by +."""
    bias: bool
    """Whether these layers also have a bias, frozen and zero."""
    amp: bool
    """Whether the forward pass runs under float16 autocast."""
    allocated_bytes: tuple[int, ...]
    """torch.cuda.max_memory_allocated() of a program with one micro-batch a step and, if published, of one with 8."""


# Otto-Octavius/ProjectEfficient, FineTuning.pdf, Table 2, in MiB with two decimals (the first also in
# ShyamSundR/LLAMA, Analysis.pdf); the last two: ngcxy/Llama-Fine-tuning, tables.docx, in kB with three digits.
LLAMA_RUNS = (
    LlamaRun("qkv", "wq+wk+wv", bias=True, amp=False, allocated_bytes=(31_616_244_121, 31_666_575_769)),
    LlamaRun("qkv-amp", "wq+wk+wv", bias=True, amp=True, allocated_bytes=(43_610_946_928, 43_661_278_576)),
    LlamaRun("qv", "wq+wv", bias=False, amp=False, allocated_bytes=(31_300_000_000,)),
    LlamaRun("qv-amp", "wq+wv", bias=False, amp=True, allocated_bytes=(43_400_000_000,)),
)


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


# foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv, rows 33, 35, 9, 11 and 1 of the data
# (PyTorch 2.4.1, transformers 4.48.1, trl 0.13.0, peft 0.13.2, accelerate 1.0.1).
TRAINER_RUNS = (
    TrainerRun("mistral-lora-4", "mistral", True, 4, 4096, 26_704_571_904, 29_576),
    TrainerRun("mistral-lora-8", "mistral", True, 8, 4096, 38_742_912_512, 43_232),
    TrainerRun("mistral-4", "mistral", False, 4, 4096, 72_434_837_504, 77_256),
    TrainerRun("mistral-8", "mistral", False, 8, 4096, 72_435_230_720, 72_988),
    TrainerRun("santacoder-4", "santacoder", False, 4, 2048, 11_267_745_280, 15_116),
)

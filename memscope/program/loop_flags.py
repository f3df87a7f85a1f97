"""What makes a program's own training loop do what a strategy of the stage STEP does, by the framework of the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from memscope.strategies import Strategy

__all__ = ["flag_for"]

_PRECISION = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
_DTYPES = {"fp16": "float16", "bf16": "bfloat16"}

_ADAPTED = "build the model as peft.get_peft_model(model, config) in the program, before its optimizer"

_FLAGS: dict[tuple[str, str], Callable[[Any], str]] = {
    ("ga", "transformers"): lambda c: (
        f"pass gradient_accumulation_steps={c.steps} to TrainingArguments, and divide per_device_train_batch_size by "
        f"{c.steps}"
    ),
    ("ga", "lightning"): lambda c: (
        f"pass accumulate_grad_batches={c.steps} to Trainer, and divide the batch size of the DataLoader by {c.steps}"
    ),
    ("ga", "accelerate"): lambda c: (
        f"pass gradient_accumulation_steps={c.steps} to Accelerator, and divide the batch size of the DataLoader by "
        f"{c.steps}"
    ),
    ("ga", ""): lambda c: (
        f"before each optimizer.step(), call backward() on {c.steps} batches whose size, and whose loss, is divided by "
        f"{c.steps}"
    ),
    ("backward-step", ""): lambda c: (
        "build one optimizer for each parameter, step it in the parameter's register_post_accumulate_grad_hook, and "
        "leave optimizer.step() out of the loop"
    ),
    ("offload", ""): lambda c: (
        "build torchao.optim.CPUOffloadOptimizer in place of the optimizer"
        if c.optimizer
        else "move the frozen weights of each layer in hooks before and after its forward"
        if c.parameters
        else "run forward and loss within torch.autograd.graph.save_on_cpu(pin_memory=True)"
    ),
    ("peft", "transformers"): lambda c: _ADAPTED,
    ("peft", "lightning"): lambda c: _ADAPTED,
    ("peft", "accelerate"): lambda c: _ADAPTED,
    ("peft", ""): lambda c: _ADAPTED,
    ("pack", "transformers"): lambda c: (
        "pass packing=True to SFTConfig of TRL, or DataCollatorWithFlattening as data_collator to Trainer"
    ),
    ("amp", "transformers"): lambda c: f"pass {c.dtype}=True to TrainingArguments",
    ("amp", "lightning"): lambda c: f'pass precision="{_PRECISION[c.dtype]}" to Trainer',
    ("amp", "accelerate"): lambda c: f'pass mixed_precision="{c.dtype}" to Accelerator',
    ("amp", ""): lambda c: (
        f'run forward and loss within torch.autocast("cuda", dtype=torch.{_DTYPES[c.dtype]})'
        + (", and scale the loss with torch.amp.GradScaler" if c.dtype == "fp16" else "")
    ),
}
"""By strategy and framework.

Sources: training_args.py of transformers 5.23, pytorch/trainer/trainer.py of lightning 2.6.6, accelerator.py of
accelerate 1.15."""


def flag_for(strategy: Strategy) -> str:
    """What to change in the running program for the effect of a strategy that changes the training loop."""
    flag = _FLAGS.get((strategy.name, _framework()), _FLAGS.get((strategy.name, "")))
    return flag(strategy.config) if flag else "change the program's loop, or write the step as a target"


def _framework() -> str:
    """The framework whose training loop the program uses, as far as its imports tell; empty: a loop of its own."""
    if "transformers.trainer" in sys.modules:
        return "transformers"
    if "lightning.pytorch" in sys.modules or "pytorch_lightning" in sys.modules:
        return "lightning"
    # transformers imports accelerate for other ends: an Accelerator has filled this dictionary.
    state: Any = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    return "accelerate" if getattr(state, "_shared_state", None) else ""

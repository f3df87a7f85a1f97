"""The evaluations of a fine-tuning run, and its result."""

from __future__ import annotations

from pathlib import Path

from memscope.strategies.lora import LoRALinear
from memscope.targets.llama2.adapters import save_adapter
from memscope.targets.llama2.evaluation import perplexity
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import SHIPPED_TOKENIZER
from memscope.targets.llama2.weights import save_weights
from memscope.targets.training.metrics import Evaluated
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session, room_to_train
from memscope.targets.training.train import Watch, told_how_to_go_on

__all__ = ["evaluate", "save_result"]


def evaluate(session: Session, watch: Watch) -> None:
    """Measure the perplexity of the held-out samples, if there are any.

    Raises:
        MemscopeError: the loss of the samples is not finite.
        OutOfDeviceMemory: the samples do not fit on the device.
    """
    if session.held_out:
        with room_to_train(session.job):
            watch.metric(Evaluated(session.done, perplexity(session.training, session.held_out)))


def save_result(session: Session, folder: RunFolder) -> Path:
    """Save the LoRA updates in PEFT's format, or without any, the tokenizer and all weights in the recipe's format.

    Raises:
        MemscopeError: the disk is full or cannot be written; the message says how to resume.
    """
    model = session.training.workload.model
    assert isinstance(model, Llama), "build_on makes a Llama"
    adapter, weights = folder.results
    with told_how_to_go_on(folder):
        if any(isinstance(module, LoRALinear) for module in model.modules()):
            save_adapter(model, adapter)
            return adapter
        tokenizer = Path(session.job.config.tokenizer or SHIPPED_TOKENIZER)
        save_weights(model, weights, session.job.recipe.format, tokenizer=tokenizer)
        return weights

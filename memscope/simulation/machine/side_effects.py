"""What a simulated program does not do: save checkpoints, and upload models and logs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from memscope.simulation.machine.libraries import Changes

__all__ = ["without_side_effects"]

_SAVING = {
    "transformers.modeling_utils": ("PreTrainedModel.save_pretrained",),
    "transformers.trainer": ("Trainer.save_model", "Trainer._save_checkpoint"),
    "peft.peft_model": ("PeftModel.save_pretrained",),
    "diffusers.models.modeling_utils": ("ModelMixin.save_pretrained",),
    "diffusers.pipelines.pipeline_utils": ("DiffusionPipeline.save_pretrained",),
    "accelerate.accelerator": ("Accelerator.save_state", "Accelerator.save_model", "Accelerator.save"),
    "lightning.pytorch.trainer.trainer": ("Trainer.save_checkpoint",),
    "lightning.fabric.fabric": ("Fabric.save",),
    "safetensors.torch": ("save_file", "save_model", "save"),
}
_UPLOADING = {
    "transformers.utils.hub": ("PushToHubMixin.push_to_hub",),
    "transformers.trainer": ("Trainer.init_hf_repo", "Trainer.push_to_hub", "Trainer._push_from_checkpoint"),
    "huggingface_hub.hf_api": (
        "HfApi.create_repo", "HfApi.create_commit", "HfApi.upload_file", "HfApi.upload_folder",
        "HfApi.upload_large_folder",
    ),
    "wandb": ("init", "log"),
    "mlflow": ("start_run", "log_metric", "log_metrics", "log_params", "log_artifact"),
    "comet_ml": ("Experiment", "start"),
    "neptune": ("init_run",),
}  # fmt: skip
"""Module → functions and methods that do nothing in a simulation."""


def without_side_effects(note: Callable[[str], None]) -> Changes:
    """The changes that make these functions do nothing; `note` is told of each that is called."""
    changes: Changes = {}
    for table, text in (
        (_SAVING, "nothing was saved: {} wrote no file"),
        (_UPLOADING, "nothing was uploaded: {} did nothing"),
    ):
        for module, paths in table.items():
            for path in paths:
                told = text.format(f"{module.partition('.')[0]}'s {path}")
                changes.setdefault(module, {})[path] = partial(_skipped, partial(note, told))
    return changes


def _skipped(tell: Callable[[], None], original: Any) -> Callable[..., None]:
    def skip(*args: Any, **kwargs: Any) -> None:
        tell()

    return skip

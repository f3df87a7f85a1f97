"""The environment of a program: it attaches memscope, and keeps a simulated program from talking to services."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from memscope.program.request import VARIABLE, Request
from memscope.program.scratch import Scratch

__all__ = ["environment_of"]

_SITE = Path(__file__).parent / "_site"

_SERVICES_OFF = {
    "WANDB_MODE": "disabled",  # docs.wandb.ai/guides/track/environment-variables
    "WANDB_SILENT": "true",
    "COMET_MODE": "DISABLED",  # transformers/integrations/integration_utils.py, CometCallback
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "DISABLE_MLFLOW_INTEGRATION": "TRUE",  # transformers/integrations/integration_utils.py, MLflowCallback
    "NEPTUNE_MODE": "debug",  # docs.neptune.ai: nothing is stored or sent
    "CLEARML_OFFLINE_MODE": "1",  # clear.ml/docs/latest/docs/configs/env_vars
    "SWANLAB_MODE": "disabled",  # docs.swanlab.cn: environment variables
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub: environment variables
    "DO_NOT_TRACK": "1",  # consoledonottrack.com
}
"""Variables that switch services off, as their documentation names them."""


def environment_of(request: Request, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a program.

    Args:
        request: what is asked of the program; it is in its scratch folder.
        inherited: the environment variables of the launcher.
    """
    scratch = Scratch(Path(request.folder))
    own = {
        VARIABLE: str(scratch.request),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_SITE), inherited.get("PYTHONPATH", "")])),
    }
    if request.simulated:
        own |= _SERVICES_OFF
        own["MLFLOW_TRACKING_URI"] = f"file://{scratch.folder.resolve() / 'mlruns'}"  # removed with the scratch folder
    elif request.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    elif request.allocator is not None:
        own["PYTORCH_CUDA_ALLOC_CONF"] = request.allocator
    return {**inherited, **own}

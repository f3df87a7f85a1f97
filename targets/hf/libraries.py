"""The optional libraries of this target: transformers, peft, huggingface_hub and PyYAML."""

from __future__ import annotations

import importlib
from typing import Any

from memscope.errors import UsageError

__all__ = ["needed"]

_PACKAGE = {"yaml": "pyyaml"}


def needed(module: str) -> Any:
    """Import a library of the extra `hf`.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name != root:
            raise
        raise UsageError(
            f"the target hf needs {_PACKAGE.get(root, root)}, which is not installed: "
            "pip install transformers peft huggingface_hub pyyaml"
        ) from error

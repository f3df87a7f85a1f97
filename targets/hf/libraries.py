"""The optional libraries of this target: transformers, peft, huggingface_hub, PyYAML and bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

from memscope.errors import UsageError

__all__ = ["needed"]

_PACKAGE = {"yaml": "pyyaml"}
_APART = frozenset({"bitsandbytes"})
"""Libraries that few models need."""


def needed(module: str) -> Any:
    """Import a library of the extra `hf`, or one that few models need.

    Raises:
        UsageError: the library is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name != root:
            raise
        install = root if root in _APART else "transformers peft huggingface_hub pyyaml"
        raise UsageError(
            f"the target hf needs {_PACKAGE.get(root, root)}, which is not installed: pip install {install}"
        ) from error

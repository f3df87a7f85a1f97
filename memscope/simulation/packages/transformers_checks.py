"""What transformers remembers about FlashAttention: whether it is installed, and its functions.

transformers caches these answers, and some of its modules import the functions only if the package is there when they
are imported. Source: utils/import_utils.py and modeling_flash_attention_utils.py of transformers 4.48.1 and 5.23. On
the meta device, `is_flash_attn_2_available()` of 4.48.1 is false with a PyTorch built for the CPU; its models do not
mind.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

__all__ = ["TransformersChecks"]

_CHECKS = "transformers.utils.import_utils"
_FUNCTIONS = "transformers.modeling_flash_attention_utils"
_CACHED = ("flash_attn", "cuda", "_package_distribution_mapping")
_ASKED_AT_IMPORT = ("is_flash_attn_2_available", "is_flash_attn_available")


class TransformersChecks:
    """Lets transformers ask again, and gives its modules what they would have imported; `restore` undoes it."""

    def __init__(self, modules: Mapping[str, ModuleType], *, gpu_is_seen: bool) -> None:
        """Note what the modules of flash_attn have.

        Args:
            modules: these modules, by name.
            gpu_is_seen: whether `torch.cuda` shows a GPU; if not, transformers is told that there is one.
        """
        self._gpu_is_seen = gpu_is_seen
        found = {name: vars(modules[module]).get(name) for module, name in _BOUND_AT_IMPORT}
        self._bound: dict[str, Any] = {**found, "_flash_supports_window_size": True, "flash_241": True}
        self._before: dict[str, dict[str, Any]] = {}

    def ask_again(self) -> None:
        """Forget the cached answers."""
        checks = sys.modules.get(_CHECKS)
        for name, function in list(vars(checks).items()) if checks else []:
            if any(part in name for part in _CACHED) and hasattr(function, "cache_clear"):
                function.cache_clear()

    def bind(self) -> None:
        """Change the modules that are loaded by now."""
        checks, functions = sys.modules.get(_CHECKS), sys.modules.get(_FUNCTIONS)
        if checks and _CHECKS not in self._before and not self._gpu_is_seen:
            self._keep(checks)["is_torch_cuda_available"] = lambda: True
        if functions is None:
            return
        if _FUNCTIONS not in self._before:
            content = self._keep(functions)
            if hasattr(functions, "_lazy_imports"):
                if "_loaded_implementation" in content:
                    content["_loaded_implementation"] = None
            else:
                content.update(self._bound)
        forward = {"_flash_attention_forward": vars(functions).get("_flash_attention_forward")}
        for name in [name for name in sys.modules if name.startswith("transformers.models.")]:
            module = sys.modules[name]
            if name not in self._before and any(asked in vars(module) for asked in _ASKED_AT_IMPORT):
                content = self._keep(module)
                content.update({key: value for key, value in {**self._bound, **forward}.items() if key not in content})

    def restore(self) -> None:
        """Give the modules back what they had."""
        for name, before in self._before.items():
            content = vars(sys.modules[name])
            for key in content.keys() - before.keys():
                del content[key]
            content.update(before)
        self._before.clear()

    def _keep(self, module: ModuleType) -> dict[str, Any]:
        content = vars(module)
        self._before[module.__name__] = dict(content)
        return content


_BOUND_AT_IMPORT = (
    ("flash_attn", "flash_attn_func"),
    ("flash_attn", "flash_attn_varlen_func"),
    ("flash_attn.bert_padding", "index_first_axis"),
    ("flash_attn.bert_padding", "pad_input"),
    ("flash_attn.bert_padding", "unpad_input"),
    ("flash_attn.layers.rotary", "apply_rotary_emb"),
)
"""Module and name of what transformers imports from flash_attn when its own modules are imported."""

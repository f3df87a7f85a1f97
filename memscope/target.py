"""Find a target: a folder (or a file) with `Config`, `PRESETS` and `build`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from memscope.errors import MemscopeError, TargetError, UsageError, nearest
from memscope.settings import fill
from memscope.workload import Workload

__all__ = ["Target", "find_target", "shipped_targets"]


@dataclass(frozen=True)
class Target:
    """A target, found: its settings by preset (the first is the default) and the function that builds its workload."""

    name: str
    presets: Mapping[str, Any]
    build: Callable[[Any], Workload]

    def configure(self, preset: str | None = None, words: Mapping[str, str] | None = None) -> Any:
        """The settings of a preset, with the fields in `words` changed.

        Raises:
            UsageError: for an unknown preset or field, or a value that cannot be used.
        """
        preset = next(iter(self.presets)) if preset is None else preset
        if preset not in self.presets:
            raise UsageError(f'target "{self.name}" has no preset "{preset}": {nearest(preset, self.presets)}')
        return fill(self.presets[preset], words or {}, of=f'target "{self.name}"')


def shipped_targets() -> list[str]:
    """Names of the targets that come with memscope."""
    import memscope.targets as shipped

    folders = [Path(path) for path in shipped.__path__]
    return sorted({entry.parent.name for folder in folders for entry in folder.glob("*/target.py")})


def find_target(text: str) -> Target:
    """The target at a path, or the shipped one of that name (`llama2` and `targets/llama2` are the same).

    Raises:
        UsageError: when there is none.
        TargetError: when its code cannot be loaded, or lacks `Config`, `PRESETS` or `build`.
    """
    path = Path(text)
    file = path / "target.py" if path.is_dir() else path
    shipped = path.name in shipped_targets() and (str(path.parent) in ("", ".", "targets") or not file.is_file())
    if not shipped and not (file.is_file() and file.suffix == ".py"):
        raise UsageError(f'no target "{text}": expected a folder with target.py, a Python file, or one of those shipped. '
                         f"{nearest(path.name, shipped_targets())}")  # fmt: skip
    try:
        module = importlib.import_module(f"memscope.targets.{path.name}.target") if shipped else _load(file)
    except MemscopeError:
        raise
    except Exception as error:
        raise TargetError(f'target "{text}" cannot be loaded: {type(error).__name__}: {error}') from error
    lacks = [name for name in ("Config", "build") if not hasattr(module, name)]
    if lacks:
        raise TargetError(f'target "{text}" lacks {" and ".join(lacks)}: expected a Config dataclass and build(config) -> Workload')
    presets = getattr(module, "PRESETS", None) or {"default": module.Config()}
    return Target(path.stem if path.suffix == ".py" else path.name, presets, module.build)


def _load(file: Path) -> ModuleType:
    name = f"memscope_target_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent.resolve()))
    return module

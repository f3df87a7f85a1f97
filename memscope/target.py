"""Find a target: a folder with target.py, or a file, that has `Config`, `build` and, if it likes, `PRESETS`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from memscope.errors import MemscopeError, TargetError, UsageError, nearest
from memscope.hooks.steps import where
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
    return sorted(_shipped_files())


def _shipped_files() -> dict[str, Path]:
    import memscope.targets as shipped

    return {file.parent.name: file for folder in shipped.__path__ for file in Path(folder).glob("*/target.py")}


def find_target(text: str) -> Target:
    """The target at a path, or else the shipped one of that name (`llama2` and `targets/llama2` are the same).

    Raises:
        UsageError: when there is none.
        TargetError: when its code cannot be loaded, or lacks `Config` or `build`.
    """
    path = Path(text)
    file = path / "target.py" if path.is_dir() else path
    shipped = _shipped_name(path, file)
    if not shipped and not (file.is_file() and file.suffix == ".py"):
        raise UsageError(
            f'no target "{text}": expected a folder with target.py, a Python file, or one of those shipped. '
            f"{nearest(path.name, shipped_targets())}"
        )
    try:
        module = importlib.import_module(f"memscope.targets.{shipped}.target") if shipped else _load(file)
        wrong = _wrong(module)
        if wrong:
            raise TargetError(f'target "{text}" {wrong}: expected a Config dataclass and build(config) -> Workload')
        presets = getattr(module, "PRESETS", None) or {"default": module.Config()}
    except MemscopeError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetError(f'target "{text}" cannot be loaded: {type(error).__name__}: {error}{where(error)}') from error
    return Target(shipped or _own_name(file.resolve()), presets, module.build)


def _shipped_name(path: Path, file: Path) -> str | None:
    """The shipped target a path stands for: by its file, or, where there is no such file, by its name."""
    for name, own in _shipped_files().items():
        if file.samefile(own) if file.is_file() else path in (Path(name), Path("targets", name)):
            return name
    return None


def _wrong(module: ModuleType) -> str:
    """What keeps a module from being a target; empty when nothing does."""
    lacks = [name for name in ("Config", "build") if not hasattr(module, name)]
    if lacks:
        return f"lacks {' and '.join(lacks)}"
    return "" if dataclasses.is_dataclass(module.Config) else "has a Config that is no dataclass"


def _own_name(file: Path) -> str:
    return file.parent.name if file.name == "target.py" else file.stem


def _load(file: Path) -> ModuleType:
    folder = file.resolve().parent
    name = f"memscope_target_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(folder))
    return module

"""Find and load a target: a folder with target.py, or a Python file, that defines `Config` and `build`.

A target may also define `PRESETS`, `read_preset(path)` to read a preset from a file or folder, and `ARGUMENT`, the name
of the setting that the text after a colon fills: `hf:gpt2`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from memscope.errors import MemscopeError, TargetError, UsageError, nearest, where
from memscope.workload.settings import fill, format_value

if TYPE_CHECKING:
    from memscope.workload.description import Workload

__all__ = ["Target", "find_target", "settings_of_shipped", "shipped_targets", "slow_imports"]


@dataclass(frozen=True)
class Target:
    """A loaded target: its settings by preset (the first is the default) and the function that builds its workload."""

    name: str
    presets: Mapping[str, Any]
    build: Callable[[Any], Workload]
    read_preset: Callable[[Path], Any] | None = None
    """Reads settings from a file or folder given in place of a preset's name; None: only names are accepted."""
    argument: str | None = None
    """The setting that the text after a colon fills; None: the target takes no such text."""

    def configure(self, preset: str | None = None, words: Mapping[str, str] | None = None) -> Any:
        """The settings of a preset (a name, or a path that the target can read), with the fields in `words` changed.

        Raises:
            UsageError: the preset or a field is unknown, or a value cannot be used.
        """
        preset = next(iter(self.presets)) if preset is None else preset
        return fill(self._preset(preset), words or {}, of=f'target "{self.name}"')

    def _preset(self, preset: str) -> Any:
        if preset in self.presets:
            return self.presets[preset]
        if self.read_preset and Path(preset).exists():
            return self.read_preset(Path(preset))
        path = ", or a path to read a preset from" if self.read_preset else ""
        raise UsageError(f'target "{self.name}" has no preset "{preset}": {nearest(preset, self.presets)}{path}')


def shipped_targets() -> list[str]:
    """Names of the targets that memscope ships."""
    return sorted(_shipped_files())


def _shipped_files() -> dict[str, Path]:
    import memscope.targets as shipped

    return {file.parent.name: file for folder in shipped.__path__ for file in Path(folder).glob("*/target.py")}


def settings_of_shipped(name: str) -> ModuleType:
    """The module of a shipped target with its `PRESETS`, and `EXAMPLES` if it takes an argument.

    `EXAMPLES` has a line about each argument that the target knows. The module imports no torch: it can be listed fast.
    """
    return importlib.import_module(f"memscope.targets.{name}.config")


def slow_imports(text: str) -> tuple[str, ...]:
    """The libraries that a shipped target imports and that are slow to import; none for a user's own target."""
    name = Path(text.partition(":")[0])
    shipped = _shipped_name(name, name / "target.py" if name.is_dir() else name)
    return getattr(settings_of_shipped(shipped), "SLOW_IMPORTS", ()) if shipped else ()


def find_target(text: str) -> Target:
    """Load the target at a path or, if there is none, the shipped target of that name.

    `llama2` and `targets/llama2` name the same shipped target. `hf:gpt2` is the target `hf` whose argument is `gpt2`.

    Raises:
        UsageError: no target has this path or name.
        TargetError: the target's code cannot be loaded, or its `Config`, `build` or `PRESETS` is missing or wrong.
    """
    path = Path(text)
    name, colon, argument = text.partition(":")
    if colon and len(name) > 1 and not path.exists():  # one letter is a drive of Windows
        return _with_argument(find_target(name), argument)
    file = path / "target.py" if path.is_dir() else path
    shipped = _shipped_name(path, file)
    if not shipped and not (file.is_file() and file.suffix == ".py"):
        raise UsageError(
            f'no target "{text}": expected a folder with target.py, a Python file, or a shipped target. '
            f"{nearest(path.name, shipped_targets())}"
        )
    try:
        module = importlib.import_module(f"memscope.targets.{shipped}.target") if shipped else _load(file)
        wrong = _wrong(module)
        if wrong:
            raise TargetError(f'target "{text}" {wrong}')
        presets = getattr(module, "PRESETS", None) or {"default": module.Config()}
    except (MemscopeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise TargetError(f'target "{text}" cannot be loaded: {type(error).__name__}: {error}{where(error)}') from error
    optional = getattr(module, "read_preset", None), getattr(module, "ARGUMENT", None)
    if shipped:
        return Target(shipped, presets, module.build, *optional)
    file = file.resolve()
    return Target(_own_name(file), presets, _with_neighbours(file.parent, module.build), *optional)


def _with_argument(target: Target, argument: str) -> Target:
    if target.argument is None:
        raise UsageError(
            f'target "{target.name}" takes nothing after a colon, but "{argument}" was given: '
            "choose a preset with --preset, settings with --set KEY=VALUE"
        )
    if not argument:
        raise UsageError(f'"{target.name}:" names no {target.argument}. See: memscope targets')
    words, of = {target.argument: argument}, f'target "{target.name}"'
    presets = {name: fill(preset, words, of=of) for name, preset in target.presets.items()}
    return dataclasses.replace(target, presets=presets)


def _shipped_name(path: Path, file: Path) -> str | None:
    """The shipped target that a path names: by its file or, if that file does not exist, by its name."""
    for name, own in _shipped_files().items():
        if file.samefile(own) if file.is_file() else path in (Path(name), Path("targets", name)):
            return name
    return None


def _wrong(module: ModuleType) -> str:
    """Why a module is not a target; empty if it is one."""
    expected = "expected a Config dataclass and build(config) -> Workload"
    lacks = [name for name in ("Config", "build") if not hasattr(module, name)]
    if lacks:
        return f"lacks {' and '.join(lacks)}: {expected}"
    if not (isinstance(module.Config, type) and dataclasses.is_dataclass(module.Config)):
        return f"has a Config that is not a dataclass: {expected}"
    if not callable(module.build):
        return f"has a build that is not a function: {expected}"
    presets = getattr(module, "PRESETS", None) or {}
    expected = 'expected a dict of settings by name, such as {"small": Config(), "large": Config(...)}'
    if not isinstance(presets, Mapping):
        return f"has PRESETS of type {type(presets).__name__}: {expected}"
    for name, preset in presets.items():
        if not (isinstance(name, str) and isinstance(preset, module.Config)):
            return f"has PRESETS in which {name!r} is {preset!r}: {expected}"
    argument, names = getattr(module, "ARGUMENT", None), [field.name for field in dataclasses.fields(module.Config)]
    if argument is not None and argument not in names:
        return f"has the ARGUMENT {argument!r}, which is not a setting: expected one of {', '.join(names)}"
    return ""


def _own_name(file: Path) -> str:
    return file.parent.name if file.name == "target.py" else file.stem


def _load(file: Path) -> ModuleType:
    folder = file.resolve().parent
    name = f"memscope_target_{abs(hash(file.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(folder)])
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with _importable(folder):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _with_neighbours(folder: Path, build: Callable[[Any], Workload]) -> Callable[[Any], Workload]:
    """Wrap `build`: while it runs, it can import the files beside the target; the workload keeps its settings."""

    def with_neighbours(config: Any) -> Workload:
        from memscope.workload.description import Workload

        with _importable(folder):
            built: object = build(config)
        if isinstance(built, Workload) and not built.settings:
            built.settings = {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        return built  # type: ignore[return-value]  # `usable` checks the type

    return with_neighbours


def _plain(value: Any) -> Any:
    """A setting as a JSON value."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else format_value(value)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the target itself removed it
            sys.path.remove(str(folder))

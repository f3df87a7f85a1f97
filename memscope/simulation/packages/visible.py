"""Packages that code under simulation can import although they are not installed: FlashAttention-2 and 3.

Inside the context, `import flash_attn` finds functions that stand in, and `importlib.metadata` the version whose
source was read. Where the package is installed, its functions are replaced too: they call kernels. A library that is
imported inside sees the machine as it is, for it outlives the simulation. A module of the target gets the functions,
and is forgotten afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

from memscope.simulation.devices.catalogue import Device
from memscope.simulation.packages import flash_attn_2, flash_attn_3
from memscope.simulation.packages.transformers_checks import TransformersChecks
from memscope.simulation.refusal import NotSimulated

__all__ = ["VisiblePackages"]


class _Package(NamedTuple):
    """A package that stands in."""

    distribution: str
    version: str
    modules: Callable[[Device], dict[str, dict[str, Any]]]


_PACKAGES = {
    "flash_attn": _Package("flash_attn", flash_attn_2.VERSION, flash_attn_2.flash_attn_2),
    "flash_attn_interface": _Package("flash_attn_3", flash_attn_3.VERSION, flash_attn_3.flash_attn_3),
}
"""Name to import → package."""
_WITHOUT_STAND_IN = (
    "flash_attn.flash_attn_triton", "flash_attn.layers.patch_embed", "flash_attn.models", "flash_attn.modules",
    "flash_attn.ops.activations", "flash_attn.ops.triton.k_activations", "flash_attn.ops.triton.linear",
    "flash_attn.ops.triton.mlp", "flash_attn.ops.triton.rotary",
)  # fmt: skip
"""Modules that the released packages have. `flash_attn.ops.layer_norm`, `rms_norm` and `fused_dense` need extensions
that are built apart: without these, their import fails, as here."""
_LIBRARIES = {"site-packages", "dist-packages"}
"""Folders whose modules are not the target's."""


class VisiblePackages:
    """Context in which the packages can be imported."""

    def __init__(self, device: Device, tell: Callable[[str], None], *, gpu_is_seen: bool = True) -> None:
        """Build the modules.

        Args:
            device: the simulated GPU.
            tell: called with a note for the trace, whenever a function is used.
            gpu_is_seen: whether `torch.cuda` shows the GPU; if not, transformers is told that there is one.
        """
        self._tell = tell
        self._is_inside = False
        self._modules: dict[str, ModuleType] = {}
        self._real: dict[str, ModuleType] = {}
        """Modules of the installed packages that were loaded before."""
        self._importers: set[str] = set()
        """Names of the target's modules that have the functions."""
        self._metadata = _Metadata()
        for name, package in _PACKAGES.items():
            use = self._use(name, package)
            for path, content in package.modules(device).items():
                self._modules[path] = _module(path, {key: _noted(use, value) for key, value in content.items()})
        for path, module in self._modules.items():
            parent, _, child = path.rpartition(".")
            if parent:
                setattr(self._modules[parent], child, module)
        self._transformers = TransformersChecks(self._modules, gpu_is_seen=gpu_is_seen)

    def __enter__(self) -> VisiblePackages:
        self._notes = {name: _note(name, package) for name, package in _PACKAGES.items()}
        self._is_inside = True
        self._show()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hide()
        self._transformers.restore()
        for importer in self._importers:
            sys.modules.pop(importer, None)
        self._is_inside = False

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Let imports see which packages are installed."""
        if not self._is_inside:
            yield
            return
        self._hide()
        try:
            yield
        finally:
            self._show()

    def given(self, path: str, importer: FrameType) -> ModuleType | None:
        """The module for an import in the target's code; None: the installed one.

        Raises:
            NotSimulated: the package has a module of that name, and nothing stands in for it.
        """
        module = self._modules.get(path)
        missing = any(f"{path}.".startswith(f"{name}.") for name in _WITHOUT_STAND_IN)
        file = importer.f_code.co_filename
        if file.startswith("<frozen importlib") or _LIBRARIES.intersection(Path(file).parts):
            return None
        if missing:
            raise NotSimulated(f"{path} is not simulated: nothing stands in for its functions. Use those of PyTorch")
        if module is not None:
            self._importers.add(importer.f_globals["__name__"])
        return module

    def _show(self) -> None:
        self._real = {path: sys.modules.pop(path) for path in list(sys.modules) if _root(path) in _PACKAGES}
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self._metadata)
        self._transformers.ask_again()
        self._transformers.bind()

    def _hide(self) -> None:
        for path in [path for path in sys.modules if _root(path) in _PACKAGES]:
            del sys.modules[path]
        sys.modules.update(self._real)
        sys.meta_path.remove(self._metadata)
        self._transformers.ask_again()

    def _use(self, name: str, package: _Package) -> Callable[[], None]:
        def use() -> None:
            if not self._is_inside:
                raise NotSimulated(
                    f"{name} was imported in a simulation that has ended: memscope's functions stood in for it. Import "
                    "it again"
                )
            self._tell(self._notes[name])

        return use


def _root(path: str) -> str:
    return path.partition(".")[0]


def _note(name: str, package: _Package) -> str:
    try:
        state = f"{importlib.metadata.version(package.distribution)} does not run in a simulation"
    except importlib.metadata.PackageNotFoundError:
        state = "is not installed"
    return (
        f"{name} {state}: its functions stand in, with the memory of version {package.version}, read from its source "
        "and never measured"
    )


def _noted(use: Callable[[], None], value: Any) -> Any:
    """A function or a module that calls `use` whenever it runs; another value as it is."""
    if isinstance(value, type):

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            use()
            return value.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

        return type(value.__name__, (value,), {"forward": forward, "__doc__": value.__doc__})
    if not callable(value):
        return value

    @functools.wraps(value)
    def function(*args: Any, **kwargs: Any) -> Any:
        use()
        return value(*args, **kwargs)

    return function


def _module(path: str, content: dict[str, Any]) -> ModuleType:
    module = ModuleType(path, f"Functions that stand in for those of {_root(path)} inside a simulation.")
    module.__spec__ = importlib.machinery.ModuleSpec(path, None)
    module.__path__ = []
    vars(module).update(content)
    return module


class _Metadata:
    """Finds the versions of the packages, and nothing to import: their modules are loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """None."""

    def find_distributions(self, context: Any) -> Iterator[importlib.metadata.Distribution]:
        """The packages of that name, or all."""
        asked = None if context.name is None else context.name.replace("-", "_").lower()
        for name, package in _PACKAGES.items():
            if asked in (None, package.distribution):
                yield _Distribution(name, package)


class _Distribution(importlib.metadata.Distribution):
    def __init__(self, name: str, package: _Package) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {package.distribution}\nVersion: {package.version}\n",
            "top_level.txt": f"{name}\n",
        }

    def read_text(self, filename: str) -> str | None:
        """The text of a metadata file; None: there is no such file."""
        return self._texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        """The path itself: there are no files."""
        return Path(path)

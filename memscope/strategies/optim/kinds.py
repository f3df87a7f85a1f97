"""The optimizers that have a name: which library has them, and what they take over from another optimizer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memscope.errors import UsageError
from memscope.strategies.optim.blockwise import STANDS_IN, BlockwiseOptimizer
from memscope.strategies.optim.matrices import embedding_weights, hidden_matrices
from memscope.strategies.optim.muon import MuonAdamW
from memscope.strategies.strategy import Problem

__all__ = ["KINDS", "Kind", "optimizer_named"]

Groups: TypeAlias = list[dict[str, Any]]
Settings: TypeAlias = Mapping[str, Any]
_Build: TypeAlias = Callable[[Groups, Settings, nn.Module], Optimizer]

_RATES = frozenset({"lr", "weight_decay"})
_ADAM = _RATES | {"betas", "eps"}
_FLAGS = {"fused": "fused", "foreach": "foreach"}
_PACKAGES = {"galore_torch": "galore-torch"}
"""Name to import → name to install, where they differ."""
_MODULES = {"": "torch.optim", "bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}
"""Library → the module of its optimizers, where that is another one."""


@dataclass(frozen=True)
class Kind:
    """An optimizer with a name."""

    library: str
    """The module that has it; empty: PyTorch."""
    class_name: str
    build: _Build
    """Builds it for groups, with the settings in `takes` by their names in the library, for a model."""
    carried: frozenset[str] = _RATES
    """Options of a group that mean the same in every optimizer: those that are taken over."""
    takes: Mapping[str, str] = field(default_factory=dict)
    """Setting of the strategy → its name in the library."""
    stands_in: bool = False
    """Whether a simulation can do without the library."""

    @property
    def component(self) -> str | None:
        """The class as a program imports it, for parameters alone; None: it needs groups of its own."""
        if self.build in (_muon, _galore):
            return None
        return f"{_MODULES.get(self.library, self.library)}.{self.class_name}"

    def is_installed(self) -> bool:
        """Whether the library is installed; it is not imported."""
        return not self.library or importlib.util.find_spec(self.library) is not None

    def problem(self, *, is_simulated: bool) -> Problem | None:
        """Why it cannot be built here."""
        if not self.library and not hasattr(torch.optim, self.class_name):
            return Problem(f"PyTorch {torch.__version__} has no torch.optim.{self.class_name}", "use a newer PyTorch")
        if self.is_installed() or (self.stands_in and is_simulated):
            return None
        without = "; only a simulation does without it" if self.stands_in else ""
        name = _PACKAGES.get(self.library, self.library)
        return Problem(f"{name} is not installed, which has {self.class_name}{without}", f"pip install {name}")

    @property
    def told(self) -> tuple[str, ...]:
        """The notes of a trace of this optimizer."""
        return () if self.is_installed() or not self.stands_in else (STANDS_IN,)


def optimizer_named(name: str, groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
    """Build one of `KINDS`.

    Args:
        name: its name.
        groups: parameter groups with their options.
        settings: settings of `optim`, by their names there; None and what it does not take are left out.
        model: the model, of which some need the embeddings or the output layer.

    Raises:
        UsageError: its library is not installed.
    """
    kind = KINDS[name]
    is_simulated = not any(is_real(parameter) for group in groups for parameter in group["params"])
    problem = kind.problem(is_simulated=is_simulated)
    if problem:
        raise UsageError(f"optimizer {name}: {problem}")
    given = {kind.takes[key]: value for key, value in settings.items() if key in kind.takes and value is not None}
    return kind.build([{**group, "params": list(group["params"])} for group in groups], given, model)


def is_real(parameter: Tensor) -> bool:
    """Whether a parameter has values: it is neither of a simulation nor on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensor

    return not (isinstance(parameter, FakeTensor) or parameter.is_meta)


def _of_library(library: str, class_name: str, **arguments: Any) -> _Build:
    def build(groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
        kind: Any = getattr(importlib.import_module(library), class_name)
        optimizer: Optimizer = kind(groups, **arguments, **settings)
        return optimizer

    return build


def _torch(class_name: str, *takes: str, carried: frozenset[str] = _RATES) -> Kind:
    settings = {key: key for key in takes}
    return Kind("", class_name, _of_library("torch.optim", class_name), carried, settings)


def _bitsandbytes(class_name: str, *, states: int, bits: int, is_paged: bool = False) -> Kind:
    def build(groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
        in_32_bits = embedding_weights(model) if settings.get("embeddings") == 32 else set()
        if importlib.util.find_spec("bitsandbytes") is None:
            return BlockwiseOptimizer(groups, states=states, bits=bits, is_paged=is_paged, in_32_bits=in_32_bits)
        library = importlib.import_module("bitsandbytes")
        optimizer: Any = getattr(library.optim, class_name)(groups)
        if in_32_bits:
            # The library's manager serves the whole process, and takes parameters by ids, which may be used again.
            optimizer.mng = object.__new__(type(optimizer.mng))
            optimizer.mng.initialize()
            optimizer.mng.pid2config = {number: {"optim_bits": 32} for number in in_32_bits}
        return optimizer  # type: ignore[no-any-return]

    takes = {"embeddings": "embeddings"} if bits == 8 else {}
    return Kind("bitsandbytes", class_name, build, _ADAM if states == 2 else _RATES, takes, stands_in=True)


def _muon(groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
    hidden = hidden_matrices(model)
    parted: Groups = []
    for group in groups:
        for is_muon, params in _parted(group["params"], hidden):
            kept = {key: value for key, value in group.items() if not (is_muon and key in {"betas", "eps"})}
            parted.append({**kept, "params": params, "use_muon": is_muon})
    return MuonAdamW(parted, **settings)


def _galore(groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
    hidden = hidden_matrices(model)
    parted = [
        {**group, "params": params, **({**settings, "proj_type": "std"} if is_projected else {})}
        for group in groups
        for is_projected, params in _parted(group["params"], hidden)
    ]
    library = importlib.import_module("galore_torch")
    return library.GaLoreAdamW(parted, no_deprecation_warning=True)  # type: ignore[no-any-return]


def _parted(parameters: Sequence[Tensor], chosen: set[int]) -> list[tuple[bool, list[Tensor]]]:
    """The parameters that are chosen, and those that are not, without an empty part."""
    parts = [(is_chosen, [p for p in parameters if (id(p) in chosen) is is_chosen]) for is_chosen in (True, False)]
    return [(is_chosen, part) for is_chosen, part in parts if part]


def _schedulefree(groups: Groups, settings: Settings, model: nn.Module) -> Optimizer:
    optimizer: Any = importlib.import_module("schedulefree").AdamWScheduleFree(groups, **settings)
    optimizer.train()  # its step refuses to run before
    return optimizer  # type: ignore[no-any-return]


def _torchao(class_name: str) -> Kind:
    return Kind("torchao", class_name, _of_library("torchao.optim", class_name), _ADAM, {"block": "block_size"})


_ADAFACTOR = _of_library("transformers", "Adafactor", scale_parameter=False, relative_step=False)
KINDS: dict[str, Kind] = {
    "adafactor": Kind("transformers", "Adafactor", _ADAFACTOR, takes={"beta1": "beta1"}),
    "adagrad": _torch("Adagrad", "foreach"),  # its fused kernel is for the CPU alone
    "adam": _torch("Adam", *_FLAGS, carried=_ADAM),
    "adamw": _torch("AdamW", *_FLAGS, carried=_ADAM),
    "adamw-4bit": _torchao("AdamW4bit"),
    "adamw-8bit": _bitsandbytes("AdamW8bit", states=2, bits=8),
    "adamw-fp8": _torchao("AdamWFp8"),
    "galore": Kind(
        "galore_torch",
        "GaLoreAdamW",
        _galore,
        _ADAM,
        {"rank": "rank", "gap": "update_proj_gap", "scale": "scale"},
    ),
    "lion": _bitsandbytes("Lion", states=1, bits=32),
    "lion-8bit": _bitsandbytes("Lion8bit", states=1, bits=8),
    "muon": Kind("", "Muon", _muon, _ADAM, {"momentum": "momentum"}),
    "paged-adamw": _bitsandbytes("PagedAdamW", states=2, bits=32, is_paged=True),
    "paged-adamw-8bit": _bitsandbytes("PagedAdamW8bit", states=2, bits=8, is_paged=True),
    "paged-lion": _bitsandbytes("PagedLion", states=1, bits=32, is_paged=True),
    "paged-lion-8bit": _bitsandbytes("PagedLion8bit", states=1, bits=8, is_paged=True),
    "rmsprop": _torch("RMSprop", "foreach", "momentum"),
    "schedulefree-adamw": Kind("schedulefree", "AdamWScheduleFree", _schedulefree, _ADAM, {"foreach": "foreach"}),
    "sgd": _torch("SGD", *_FLAGS, "momentum"),
    "torchao-adamw-8bit": _torchao("AdamW8bit"),
}
"""The optimizers by name. Adafactor is that of transformers, which `optim="adafactor"` of its Trainer uses and which
has a first moment (`beta1`); settings that do not follow the Trainer's, a learning rate of its own and a scale by the
parameters' size, are off as there (`_get_adafactor` in trainer_optimizer.py, 5.23)."""

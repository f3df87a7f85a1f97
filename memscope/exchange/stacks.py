"""Phase, category, module and operator of an allocation, inferred from its stack.

A frame is matched as `filename:function`. Sources of the names: torch/optim/optimizer.py and adam.py, torch/nn/modules/
module.py, torch/utils/checkpoint.py, torch/autograd/graph.py, aten/src/ATen/cuda/CublasHandlePool.cpp,
torch/csrc/autograd/engine.cpp and functions/accumulate_grad.cpp (PyTorch 2.6 to 2.13); transformers/trainer.py and
modeling_utils.py (5.x), accelerate/utils/operations.py (1.x).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from memscope.exchange.layout import Frames, damaged
from memscope.trace import Category, Phase

__all__ = ["NO_STACK", "Place", "StackReader"]

_PHASES: tuple[tuple[Phase, str], ...] = (
    ("zero_grad", r":zero_grad$"),
    (
        "optimizer",
        r"/torch/optim/(?!lr_scheduler)[^:]*:(?!__init__|load_state_dict|add_param_group)"
        r"|optim(?![^:]*lr_scheduler)[^:]*:step$",
    ),
    ("recompute", r"/torch/utils/checkpoint\.py:(unpack_hook|recompute_fn)$"),
    ("backward", r":backward$|/torch/autograd/graph\.py:_engine_run_backward$|:torch::autograd::Engine::"),
    ("forward", r"/torch/nn/modules/module\.py:_(wrapped_)?call_impl$|:forward$"),
    ("loss", r"/torch/nn/modules/loss\.py:|/torch/nn/functional\.py:(.*_loss|cross_entropy)$"),
)
"""Phase → pattern of its frames. The innermost match decides: an optimizer's closure may run the forward pass."""
_CATEGORIES: tuple[tuple[Category, str], ...] = (
    ("workspace", r":at::cuda::.*(getNewWorkspace|getCUDABlasLtWorkspace|getCurrentCUDABlasHandle)"),
    (
        "optimizer_state",
        r"optim[^:]*:(_init_group|_?init_state|load_state_dict|_process_value_according_to_param_policy)$",
    ),
    ("gradient", r":torch::autograd::AccumulateGrad::"),
)
"""Category → pattern of a frame that implies it in any phase."""
_OUTSIDE_A_STEP: tuple[tuple[Category, str], ...] = (
    ("input", r":(send_to_device|_prepare_inputs?|(batch|transfer_batch|move_data|_move)_to_device)$"),
    (
        "parameter",
        r"/torch/nn/(modules|parameter|init)[^:]*:(__init__|__new__|reset_parameters|_?apply|convert|_load_from_state_dict)$"
        r"|:(from_pretrained|load_state_dict|set_module_tensor_to_device)$|/safetensors/[^:]*:load_(file|model)$",
    ),
)
"""Category → pattern of a frame that implies it in a stack without a phase. Buffers look like parameters."""
_OPERATOR = re.compile(r"^at::_ops::(?!empty|new_empty|resize_)(\w+)::")
"""C++ frame of an operator. Operators that only allocate are skipped: they run inside the operator of interest."""
_BETWEEN_MODULES = re.compile(r"/torch/nn/modules/(module|container)\.py$")

_FLAT = (str, int, float, type(None))
"""Types of the values of a frame that can be compared in no time: a list may share its parts without end."""
_STRIDE = 7
"""Distance of the frames that form a stack's key; odd, because a module's call has pairs of frames."""


class Place(NamedTuple):
    """The information inferred from a stack."""

    phase: Phase | None
    """None: unknown."""
    category: Category | None
    """The category, if the stack alone decides it; None: phase and lifetime decide it."""
    module: str
    """The chain of active modules. Stacks hold no module names, so each module is named by its source file and the line
    that calls the next one."""
    op: str
    """The operator if the stack has C++ frames; else the innermost line of Python."""


NO_STACK = Place(None, None, "(unknown)", "")
"""Place of an allocation without a stack: none was recorded, or its thread ran no Python."""


class StackReader:
    """Infers places from stacks, once for each distinct stack.

    Attributes:
        places: the distinct places of the stacks read so far; the first is `NO_STACK`.
    """

    def __init__(self) -> None:
        self.places: list[Place] = [NO_STACK]
        self._index: dict[Place, int] = {NO_STACK: 0}
        self._known: dict[tuple[int, ...], list[tuple[Frames, int]]] = {}
        self._labels: dict[str, tuple[Phase | None, Category | None, Category | None]] = {}

    def read(self, frames: Frames) -> int:
        """Return the index in `places` of a stack's place. The frames must stay alive and unchanged.

        Raises:
            TraceFileError: `frames` is not a stack.
        """
        if not frames:
            return 0
        # A snapshot shares one object per frame among stacks, so the ids of some frames find stacks that may be equal.
        alike = self._known.setdefault((len(frames), *map(id, frames[::_STRIDE])), [])
        for stack, index in alike:
            if stack == frames:
                return index
        place = self._look_at(frames)
        index = self._index.setdefault(place, len(self.places))
        if index == len(self.places):
            self.places.append(place)
        if all(isinstance(value, _FLAT) for frame in frames for value in frame.values()):
            alike.append((frames, index))
        return index

    def _look_at(self, frames: Frames) -> Place:
        phase: Phase | None = None
        category: Category | None = None
        outside: Category | None = None
        for frame in frames:
            here, category_here, outside_here = self._label(frame)
            category, outside = category or category_here, outside or outside_here
            if phase is None:
                phase = here
            elif phase in ("forward", "loss") and here in ("backward", "recompute"):
                phase = "recompute"
            elif phase == "loss" and here == "forward":
                phase = "forward"
        if phase is None:
            category = category or outside
        chain = _chain(frames, "__init__" if phase is None else "forward")
        return Place(phase, category, chain or NO_STACK.module, _operator(frames))

    def _label(self, frame: Mapping[str, Any]) -> tuple[Phase | None, Category | None, Category | None]:
        text = f"{_filename(frame)}:{_name(frame)}"
        label = self._labels.get(text)
        if label is None:
            label = self._labels[text] = _first(_PHASES, text), _first(_CATEGORIES, text), _first(_OUTSIDE_A_STEP, text)
        return label


def _first(rules: tuple[tuple[Any, str], ...], text: str) -> Any:
    return next((name for name, pattern in rules if re.search(pattern, text)), None)


def _chain(frames: Frames, function: str) -> str:
    python = (frame for frame in reversed(frames) if _is_python(frame))
    found = [f for f in python if _name(f) == function and not _BETWEEN_MODULES.search(_filename(f))]
    calls = [f"{_stem(frame)}:{_line(frame)}" for frame in found[:-1]]
    return ".".join([*calls, *(_stem(frame) for frame in found[-1:])])


def _operator(frames: Frames) -> str:
    for frame in frames:
        match = _OPERATOR.match(_name(frame))
        if match:
            return f"aten.{match[1]}"
    innermost = next((frame for frame in frames if _is_python(frame)), None)
    if innermost is None:
        return ""
    return f"{PurePosixPath(_filename(innermost)).name}:{_line(innermost)} {_name(innermost)}"


def _is_python(frame: Mapping[str, Any]) -> bool:
    filename = _filename(frame)
    return filename.endswith(".py") or filename.startswith("<")


def _stem(frame: Mapping[str, Any]) -> str:
    return PurePosixPath(_filename(frame)).stem


def _name(frame: Mapping[str, Any]) -> str:
    return _text(frame, "name")


def _filename(frame: Mapping[str, Any]) -> str:
    return _text(frame, "filename").replace("\\", "/")


def _line(frame: Mapping[str, Any]) -> int:
    line = frame.get("line")
    return line if type(line) is int else 0


def _text(frame: Any, key: str) -> str:
    text = frame.get(key) if isinstance(frame, dict) else None
    if not isinstance(text, str):
        damaged(f"a frame of a stack has no {key}")
    return text

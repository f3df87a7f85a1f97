"""What a launcher asks of the program that it starts, and what became of it: two JSON files in a scratch folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from memscope import __version__
from memscope.errors import MemscopeError
from memscope.trace import write_whole

__all__ = ["VARIABLE", "Failure", "Offer", "Offers", "ProgramOutcome", "Request"]

VARIABLE = "MEMSCOPE_PROGRAM"
"""The environment variable that holds the path of the request."""


class _Document:
    """A dataclass that is a file."""

    def write(self, path: Path) -> None:
        """Write it as JSON.

        Raises:
            TraceFileError: the file cannot be written.
        """
        write_whole(path, msgspec.json.encode(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises:
            MemscopeError: the file is missing, or is none of this version.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError) as error:
            raise MemscopeError(f"{path}: cannot be read as {cls.__name__}: {error}") from error


@dataclass(frozen=True)
class Request(_Document):
    """What to do with a program. Every Python process of the program reads it."""

    device: str
    """`cpu`, `cuda`, or the name of a device to simulate."""
    simulated: bool
    device_file: str | None
    """TOML file with more devices."""
    allocator: str | None
    """Settings of PyTorch's allocator, in the syntax of PYTORCH_CUDA_ALLOC_CONF; None: those of the environment."""
    assume: str
    """What a simulation takes for values that it cannot know, as `Assume.parse` reads it."""
    steps: int | None
    """Number of optimizer steps after which the program ends; None: it runs to its own end."""
    strategies: str
    """Plan to apply to the program's model and optimizer, such as `lora:r=8,ckpt`; empty for the baseline."""
    folder: str
    """Scratch folder, which holds this request and receives trace and outcome; see `Scratch`."""
    command: tuple[str, ...]
    """The program's command line."""
    asks: bool = False
    """Whether `Offers` are wanted."""
    layer_list: str = ""
    """For the offer of `ckpt`: lists of the layers, as `ckpt:layer-list` names them."""
    deadline: float | None = None
    """See `StepLimits.deadline`."""
    version: str = __version__
    """The launcher's version of memscope, which the program's Python must have too."""


@dataclass(frozen=True)
class Failure:
    """An error inside the program that memscope explains."""

    kind: str
    """Name of the class in `memscope.errors`."""
    message: str
    exit_code: int
    traceback: str = ""

    @classmethod
    def of(cls, error: MemscopeError, traceback: str = "") -> Failure:
        """The failure that an error stands for."""
        known = next(one for one in type(error).__mro__ if one.__module__ == MemscopeError.__module__)
        return cls(known.__name__, str(error), error.exit_code, traceback)


@dataclass(frozen=True)
class Offer:
    """A strategy that the program's models can take."""

    spec: str
    """The strategy in plan syntax."""
    is_exact: bool
    """See `Strategy.is_exact`."""


@dataclass(frozen=True)
class Offers:
    """What could be changed in the models of a program, as they are when their optimizers are built."""

    strategies: tuple[Offer, ...] = ()
    """Of those asked for, the ones that change the model or the optimizer, and are not part of the plan."""
    layered: tuple[str, ...] = ()
    """Classes of the models that have layers to checkpoint."""
    layers: tuple[str, ...] = ()
    """Names of the layers; empty unless one model has layers."""
    optimizers: int = 0
    """Number of optimizers that the program has built."""
    model: dict[str, Any] = field(default_factory=dict)
    """The model with these layers; see `memscope.strategies.ckpt.layer_plan.described`."""


@dataclass(frozen=True)
class ProgramOutcome(_Document):
    """What the process that trained leaves when it ends."""

    ended: Literal["stopped", "late", "ended", "failed"]
    """Whether memscope stopped it after enough steps or its deadline, it reached its end, or an exception ended it."""
    steps: int
    """Number of optimizer steps that were completed."""
    trace: str | None = None
    """Path of the trace; None if nothing was recorded."""
    failure: Failure | None = None
    """An error that memscope explains."""
    exception: str | None = None
    """Last line of the traceback of the exception that ended the program."""
    notes: tuple[str, ...] = ()
    """Texts that are shown with the results."""
    offers: Offers | None = None
    """What could be changed, if the request asks for it."""

"""Checkpoint plans: an option for each layer of a model, as a value and as a file that people can read and write.

The file is JSON: `{"format": "memscope-checkpoint-plan", "schema_version": 1, "layers": {"layers.0": "none", …},
"made_for": {…}}`. The options are those of `memscope.strategies.ckpt.options`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import nn

from memscope.errors import UsageError, excerpt
from memscope.strategies import Problem
from memscope.strategies.ckpt.options import Option, check_segments
from memscope.trace import Count, mismatch, read_json, write_whole
from memscope.workload.description import Workload

__all__ = ["SCHEMA_VERSION", "LayerPlan", "described", "made_for"]

SCHEMA_VERSION = 1
_FORMAT = "memscope-checkpoint-plan"
_Model = TypedDict("_Model", {"class": str, "parameters": Count, "layers": list[str]}, total=False)


class _MadeFor(TypedDict, total=False):
    target: str
    settings: dict[str, Any]
    strategies: list[str]
    device: str
    model: _Model


class _File(TypedDict):
    schema_version: Count
    layers: dict[str, str]
    made_for: NotRequired[_MadeFor]


@dataclass(frozen=True)
class LayerPlan:
    """Options of a model's layers.

    Raises:
        UsageError: when there is no layer, an option is unknown, or segments are inconsistent.
    """

    layers: Mapping[str, str]
    """Option of each layer, by its name in the model, in order."""
    made_for: Mapping[str, Any] = field(default_factory=dict)
    """Origin of the plan: `target`, `settings`, `strategies`, `device`, and `model` as returned by `described`."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UsageError("a checkpoint plan needs layers, and this one has none")
        check_segments(self.options)

    @property
    def options(self) -> dict[str, Option]:
        """The parsed options."""
        options = {}
        for name, text in self.layers.items():
            try:
                options[name] = Option.parse(text)
            except UsageError as error:
                raise UsageError(f"{name}: {error}") from None
        return options

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the plan as a JSON file, completely or not at all.

        Raises:
            UsageError: when the file exists and `overwrite` is False, or `made_for` holds more than JSON values.
            TraceFileError: when it cannot be written.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already: choose another name, or overwrite it with -f")
        content = {"format": _FORMAT, "schema_version": SCHEMA_VERSION}
        content |= {"layers": dict(self.layers), "made_for": dict(self.made_for)}
        try:
            text = json.dumps(content, indent=2)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{path}: cannot be written: made_for holds more than JSON values ({error})") from None
        write_whole(path, f"{text}\n".encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerPlan:
        """Read a plan file.

        Raises:
            UsageError: when the file is missing, no plan, truncated, of a newer version, or has an unknown option.
        """
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file") from None
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path}: not a checkpoint plan: {_EXPECTED}") from None
        except (ValueError, RecursionError) as error:
            begun = isinstance(error, json.JSONDecodeError) and _FORMAT in error.doc
            what = "a truncated or damaged checkpoint plan" if begun else "not a checkpoint plan"
            raise UsageError(f"{path}: {what}: no JSON ({error}); {_EXPECTED}") from None
        try:
            return cls(*_parts(content))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None

    def check(self, model: nn.Module, layers: Iterable[str]) -> list[Problem]:
        """Every sign that the plan was made for another model.

        Args:
            model: the model before any strategy is applied.
            layers: names of its layers, in order.
        """
        found = list(layers)
        missing = [name for name in self.layers if name not in found]
        more = [name for name in found if name not in self.layers]
        made_for, model_has = self.made_for.get("model", {}), described(model, found)
        differences = [f"has no {_listed(missing)}"] if missing else []
        differences += [f"also has {_listed(more)}, for which it has no option"] if more else []
        if not differences and list(self.layers) != found:
            differences.append("has the same layers in another order")
        differences += [
            f"{what} {model_has[key]}, not {made_for[key]}"
            for key, what in (("class", "is a"), ("parameters", "has parameters in number:"))
            if key in made_for and made_for[key] != model_has[key]
        ]
        if "layers" in made_for and not missing and not more and made_for["layers"] != model_has["layers"]:
            differences.append(f"has layers of the classes {_classes(model_has)}, not {_classes(made_for)}")
        fix = "make one for this model with memscope advise"
        return [Problem(f"the checkpoint plan is for another model: this one {text}", fix) for text in differences]

    def other_settings(self, settings: Mapping[str, Any]) -> list[str]:
        """Settings that differ from those of the plan's origin, each as `seq_len is 1024, not 2048`."""
        made_for = self.made_for.get("settings", {})
        return [
            f"{key} is {settings[key]}, not {value}"
            for key, value in made_for.items()
            if key in settings and settings[key] != value
        ]


_EXPECTED = "expected a file written by memscope advise"


def made_for(workload: Workload, layers: Iterable[str], strategies: Sequence[str], device: str) -> dict[str, Any]:
    """The origin that a plan records, from a workload before any strategy is applied."""
    return {
        "target": workload.name,
        "settings": workload.settings,
        "strategies": list(strategies),
        "device": device,
        "model": described(workload.model, layers),
    }


def described(model: nn.Module, layers: Iterable[str]) -> dict[str, Any]:
    """Identifies a model: its class, its number of parameters and the classes of its layers."""
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": [type(model.get_submodule(name)).__name__ for name in layers],
    }


def _parts(content: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The fields `layers` and `made_for` of a file."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UsageError(f'not a checkpoint plan: it does not say "format": "{_FORMAT}"; {_EXPECTED}')
    version = content.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        raise UsageError(
            f"written with checkpoint plan schema {excerpt(version)}, this memscope reads up to {SCHEMA_VERSION}: "
            "upgrade memscope"
        )
    if damage := mismatch(content, _File):
        raise UsageError(f"a damaged checkpoint plan: {damage}")
    return content["layers"], content.get("made_for", {})


def _listed(names: Iterable[str]) -> str:
    """`"a", "b" and 3 more`."""
    quoted = [f'"{name}"' for name in names]
    return ", ".join(quoted) if len(quoted) <= 4 else f"{', '.join(quoted[:3])} and {len(quoted) - 3} more"


def _classes(model: Mapping[str, Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, model["layers"])))

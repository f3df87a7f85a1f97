"""The published measurements of `scoreboard/cases.toml`, the commands that predict them, and the remembered results."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "ATTEMPTS",
    "Group",
    "PredictingCommand",
    "PublishedCase",
    "load_groups",
    "models",
    "remembered",
    "requirements",
]

FOLDER = Path(__file__).with_name("scoreboard")
ATTEMPTS = ("first", "read")
"""The command before the program was read, and the one after."""
BUILD = "build/scoreboard"
"""Where models and environments are made, relative to the repository."""


@dataclass(frozen=True)
class PredictingCommand:
    """A command that predicts a run."""

    target: str
    settings: Mapping[str, Any]
    strategies: str
    device: str

    @property
    def words(self) -> tuple[str, ...]:
        """The words after `memscope`."""
        pairs = [f"{key}={_text(value)}" for key, value in self.settings.items()]
        plan = ("-s", self.strategies) if self.strategies else ()
        return ("profile", self.target, "--device", self.device, *plan, *(("--set", *pairs) if pairs else ()))


@dataclass(frozen=True)
class PublishedCase:
    """A run that somebody measured and published."""

    id: str
    title: str
    source: str
    published: Mapping[str, int]
    """Bytes by what was measured: allocated, reserved or device."""
    settings: Mapping[str, Any]
    """Settings of both attempts, without those of the group."""
    strategies: str
    attempts: Mapping[str, PredictingCommand]
    """By the names of `ATTEMPTS`; empty if memscope cannot predict the run."""
    read_off: bool
    """Whether a setting was chosen by this case."""
    beyond: str | None
    """What the published figure includes and a simulated step does not."""
    refused: str | None
    """Why there is no prediction."""


@dataclass(frozen=True)
class Group:
    """Runs of one program."""

    id: str
    title: str
    source: str
    measured_with: str
    environment: str
    changes: str
    """What reading the program changed."""
    note: str
    cases: tuple[PublishedCase, ...]


@cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((FOLDER / "cases.toml").read_text(encoding="utf-8"))


def load_groups() -> tuple[Group, ...]:
    """All published runs, by program."""
    return tuple(_group(table) for table in _tables()["group"])


def requirements() -> Mapping[str, tuple[str, ...]]:
    """The packages of every environment but the current one."""
    return {name: tuple(table["requirements"]) for name, table in _tables()["environments"].items()}


def models() -> Mapping[str, Mapping[str, Any]]:
    """The configurations of models that memscope does not ship."""
    found: Mapping[str, Mapping[str, Any]] = _tables()["models"]
    return found


def remembered() -> dict[str, Any]:
    """Results of `make scoreboard`: id of a case → attempt → what was predicted, or why it was not."""
    file = FOLDER / "results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}  # type: ignore[no-any-return]


def _group(table: Mapping[str, Any]) -> Group:
    return Group(
        id=table["id"],
        title=table["title"],
        source=table["source"],
        measured_with=table["measured_with"],
        environment=table.get("environment", "current"),
        changes=table.get("changes", "").strip(),
        note=table.get("note", "").strip(),
        cases=tuple(_case(case, table) for case in table["case"]),
    )


def _case(case: Mapping[str, Any], group: Mapping[str, Any]) -> PublishedCase:
    refused = case.get("refused")
    return PublishedCase(
        id=case["id"],
        title=case["title"],
        source=case.get("source", group["source"]),
        published=case["published"],
        settings=case.get("settings", {}),
        strategies=case.get("strategies", ""),
        attempts={} if refused else {name: _attempt(case, group, name) for name in ATTEMPTS},
        read_off=case.get("read_off", False),
        beyond=case.get("beyond"),
        refused=refused,
    )


def _attempt(case: Mapping[str, Any], group: Mapping[str, Any], name: str) -> PredictingCommand:
    own = case.get(name, {})
    settings = {**group[name].get("settings", {}), **case.get("settings", {}), **own.get("settings", {})}
    target = own.get("target", group[name]["target"])
    kind, colon, what = target.partition(":")
    if what in models():
        target = f"{kind}{colon}{BUILD}/models/{what}"
    return PredictingCommand(target, settings, case.get("strategies", ""), group["device"])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

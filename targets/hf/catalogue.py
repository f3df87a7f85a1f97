"""The models that are shipped as configurations, in `models/`: no file is fetched for them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ShippedModel", "load_catalogue"]

_FOLDER = Path(__file__).with_name("models")


@dataclass(frozen=True)
class ShippedModel:
    """A public model: its configuration, and where both come from."""

    source: str
    """Name on the hub of the config.json, which memscope has not read."""
    parameters: int
    """Published number of parameters."""
    published: str
    """Where that number is published, and what the model counted there has more or less; or that it is not checked."""
    sizes: str
    """What the sizes of the configuration were checked against."""
    config: Mapping[str, Any]
    """What decides the model in its config.json."""

    @property
    def about(self) -> str:
        """A line for `memscope targets`."""
        return f"{self.parameters / 1e6:,.0f} million parameters, {self.source}"


@cache
def load_catalogue() -> dict[str, ShippedModel]:
    """The shipped models by name, family by family."""
    found: dict[str, ShippedModel] = {}
    for file in sorted(_FOLDER.glob("*.toml")):
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        found |= {name: ShippedModel(**table) for name, table in tables.items()}
    return found

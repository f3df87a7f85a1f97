"""Find the config.json of a model: in a folder, on the hub, or in the catalogue that is shipped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memscope.errors import UsageError, nearest
from memscope.targets.hf.catalogue import load_catalogue
from memscope.targets.hf.files import read_json
from memscope.targets.hf.hub import fetch

__all__ = ["ADAPTER", "CONFIG", "ModelSource", "find_model", "is_on_hub", "model_in"]

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class ModelSource:
    """The configuration of a model."""

    name: str
    """Name of the model in tables and folders."""
    values: Mapping[str, Any]
    """The content of config.json."""
    place: str
    """Where it comes from, for messages."""
    code: str | None = None
    """Folder, or name on the hub, of the Python code that may come with the model; None: no code can come with it."""


def is_on_hub(text: str) -> bool:
    """Whether a text has the form of a name on the hub, ORG/NAME, and is not a path that exists."""
    return bool(_HUB_NAME.fullmatch(text)) and not Path(text).exists()


def find_model(text: str) -> ModelSource:
    """The model that a text names: a folder, a config.json, a shipped name, or a name on the hub.

    Raises:
        UsageError: nothing has this name, or its config.json cannot be read.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return model_in(path)
    if (path / CONFIG).is_file():
        return model_in(path / CONFIG)
    shipped = load_catalogue()
    if text in shipped:
        return ModelSource(text, shipped[text].config, f"the catalogue ({shipped[text].source})")
    if path.is_dir():
        raise UsageError(f"{path}: the folder has no {CONFIG}. {_content(path)}")
    if is_on_hub(text):
        return ModelSource(text.partition("/")[2], read_json(fetch(text, CONFIG)), text, code=text)
    raise UsageError(
        f'no model "{text}": expected a folder with {CONFIG}, a name on the hub (org/name), or a name that is shipped. '
        f"{nearest(text, shipped)}"
    )


def model_in(file: Path) -> ModelSource:
    """The model of a config.json.

    Raises:
        UsageError: the file is no configuration of a model.
    """
    if file.suffix in (".bin", ".safetensors", ".pt", ".pth", ".gguf"):
        raise UsageError(f"{file}: holds weights, which memscope does not read: give the {CONFIG} beside it")
    values = read_json(file)
    if "model_type" not in values and "architectures" not in values:
        raise UsageError(f'{file}: expected the {CONFIG} of a model, which has a "model_type"; found {_keys(values)}')
    folder = file.resolve().parent
    name = folder.name if file.name == CONFIG else file.stem
    return ModelSource(name, values, str(file), code=str(folder))


def _content(folder: Path) -> str:
    """What a folder without a configuration holds, and what it may have been meant for."""
    names = sorted(path.name for path in folder.iterdir())
    recipes = [name for name in names if name.endswith((".yml", ".yaml"))]
    if recipes:
        return f"A recipe in it is named by its file: hf:{folder / recipes[0]}"
    if "params.json" in names:
        return "params.json is Meta's format: memscope profile targets/llama2 --preset FOLDER"
    found = f"found {', '.join(names[:5])}" if names else "it is empty"
    return f"Expected {CONFIG} (a model) or {ADAPTER} (a PEFT adapter); {found}"


def _keys(values: Mapping[str, Any]) -> str:
    return ", ".join([*values][:5]) or "nothing"

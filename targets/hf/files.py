"""JSON and YAML files that a user names, with one error for a file that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from memscope.errors import UsageError, excerpt
from memscope.targets.hf.libraries import needed

__all__ = ["read_json", "read_yaml"]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UsageError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON ({error})") from error
    return _object(path, values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; tags that would make Python objects are refused.

    Raises:
        UsageError: the file cannot be read, holds no mapping, or PyYAML is missing.
    """
    yaml = needed("yaml")
    try:
        values = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    return _object(path, values)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{path}: cannot be read ({reason})") from error


def _object(path: Path, values: object) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected settings by name at the top, found {excerpt(values)}")
    return {str(key): value for key, value in values.items()}

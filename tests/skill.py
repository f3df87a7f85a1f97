"""What skills/memscope/SKILL.md says about the JSON of each command."""

import re
from pathlib import Path
from typing import Any

SKILL = Path(__file__).parents[1] / "skills/memscope/SKILL.md"


def told_keys(command: str) -> list[str]:
    """The paths in the first column of a command's table, such as `runs[].peak.device`."""
    _, _, table = SKILL.read_text(encoding="utf-8").partition(f"| key of {command} | meaning |\n")
    rows = re.match(r"(?:\|.*\n)*", table)
    assert rows
    return [path for row in rows[0].splitlines() for path in re.findall(r"`(.+?)`", row.split(" | ")[0])]


def lacking(document: Any, command: str) -> list[str]:
    """The paths that the skill tells and a document of the command does not have."""
    paths = told_keys(command)
    assert len(paths) > 5
    return [path for path in paths if not _has(document, path.split("."))]


def _has(value: Any, path: list[str]) -> bool:
    if not path:
        return True
    key, rest = path[0], path[1:]
    name = key.removesuffix("[]")
    if not isinstance(value, dict) or name not in value:
        return False
    if name == key:
        return _has(value[name], rest)
    return isinstance(value[name], list) and all(_has(item, rest) for item in value[name])

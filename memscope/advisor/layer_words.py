"""The options of a plan's layers, in words."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["in_words", "short_option"]


def in_words(layers: Mapping[str, str]) -> str:
    """The options of the layers, with equal neighbours of one list as ranges: `layers.0-15 full, layers.16-31 none`."""
    spans: list[tuple[str, str, str]] = []
    for name, option in layers.items():
        if option.startswith("within:"):
            option = spans[-1][2]
        in_same_list = spans and spans[-1][1].rpartition(".")[0] == name.rpartition(".")[0]
        if in_same_list and spans[-1][2] == option:
            spans[-1] = (spans[-1][0], name, option)
        else:
            spans.append((name, name, option))
    if not spans or {option for _, _, option in spans} == {"none"}:
        return "nothing"
    words = (f"{_range(first, last)} {short_option(option)}" for first, last, option in spans)
    return ", ".join(words)


def short_option(option: str) -> str:
    """An option in short: `save:attention.wq/aten.mm+attention.wk/aten.mm` is `save wq+wk`."""
    kind, _, rest = option.partition(":")
    if kind != "save":
        return option.replace(":", " ")
    calls = [call.partition("/") for call in rest.split("+")]
    return f"{kind} {'+'.join(module.rpartition('.')[2] or op.rpartition('.')[2] for module, _, op in calls)}"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}-{last.rpartition('.')[2]}"

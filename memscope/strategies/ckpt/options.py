"""The options for one layer's activations, as text.

- `none`: nothing is recomputed.
- `full`: the layer's forward is computed again in the backward pass; only its input is kept.
- `full:4`: the same over this layer and the next three, whose option is then `within:` and this layer's name.
- `recompute:attention+mlp`: these direct children of the layer are recomputed, each on its own.
- `save:mlp.up/aten.mm+./aten.add`: the layer is recomputed but for the results of these calls: a module of the layer
  (`.` is the layer itself) and an operator.
- `offload`: the tensors that the layer saves for its backward move to the host until then.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from memscope.errors import UsageError, excerpt, nearest

__all__ = ["Call", "Option", "check_segments"]

Call = tuple[str, str]
"""A module, named as in its layer (`.` is the layer itself), and an operator without overload, such as `aten.mm`."""
OptionKind = Literal["none", "full", "recompute", "save", "offload", "within"]
_KINDS: dict[str, OptionKind] = {kind: kind for kind in get_args(OptionKind)}
_EXAMPLES = {
    "recompute": "recompute:attention+mlp",
    "save": "save:mlp.up/aten.mm+attention/aten.bmm",
    "within": "within:layers.8",
}


@dataclass(frozen=True)
class Option:
    """A parsed option. Fields that its kind does not use keep their defaults."""

    kind: OptionKind
    length: int = 1
    """full: layers that the checkpoint covers."""
    children: tuple[str, ...] = ()
    """recompute: names of direct children."""
    calls: tuple[Call, ...] = ()
    """save: calls whose results are kept."""
    head: str = ""
    """within: the layer whose checkpoint covers this one."""

    @classmethod
    def parse(cls, text: str) -> Option:
        """Read an option.

        Raises:
            UsageError: when the option is unknown or malformed.
        """
        word, colon, rest = text.partition(":")
        kind = _KINDS.get(word)
        if kind is None:
            raise UsageError(f'unknown option "{excerpt(text)}": {nearest(word, _KINDS)}')
        if kind == "full":
            return cls("full", length=_length(text, rest) if colon else 1)
        if kind == "none" or kind == "offload":
            if colon:
                raise UsageError(f'option "{text}": nothing comes after {kind}')
            return cls(kind)
        words = tuple(rest.split("+"))
        if not all(words):
            raise UsageError(f'option "{text}" is incomplete: expected, for example, {_EXAMPLES[kind]}')
        if len(set(words)) < len(words):
            raise UsageError(f'option "{text}" names something twice: name it once')
        if kind == "within":
            return cls("within", head=rest)
        return cls("recompute", children=words) if kind == "recompute" else cls("save", calls=_calls(text, words))


def _length(text: str, digits: str) -> int:
    if not re.fullmatch(r"\d{1,9}", digits) or int(digits) < 2:
        shown = excerpt(text)
        raise UsageError(f'option "{shown}": expected full, or full:N with a whole number N of layers from 2 on')
    return int(digits)


def _calls(text: str, words: tuple[str, ...]) -> tuple[Call, ...]:
    calls = []
    for word in words:
        module, slash, op = word.rpartition("/")
        if not slash or not op:
            raise UsageError(f'option "{text}": expected MODULE/OPERATOR, such as mlp.up/aten.mm, but found "{word}"')
        calls.append((module or ".", op))
    return tuple(calls)


def check_segments(options: Mapping[str, Option]) -> None:
    """Check that every segment covers exactly the layers whose options say so.

    Raises:
        UsageError: for the first layer that does not fit.
    """
    names = list(options)
    expected: dict[str, str] = {}
    for index, (name, option) in enumerate(options.items()):
        if option.head != expected.get(name, ""):
            found = f"within:{option.head}" if option.head else option.kind
            wanted = f"within:{expected[name]}" if name in expected else "no within:, since no full:N before covers it"
            raise UsageError(f'{name}: the option is "{found}", expected {wanted}')
        if option.kind == "full":
            covered = names[index + 1 : index + option.length]
            if len(covered) < option.length - 1:
                raise UsageError(f"{name}: full:{option.length} covers more layers than follow: {len(covered)} do")
            expected |= dict.fromkeys(covered, name)

"""Properties of operators that selective checkpointing depends on."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["OperatorTraits", "operator", "why_not_kept"]


class OperatorTraits(NamedTuple):
    """Properties of every call of an operator."""

    name: str
    """Without overload, such as `aten.mm`."""
    is_question: bool
    """It reads a tensor's metadata, not its values."""
    changes_first: bool
    """It changes only its first argument in place."""
    changes_others: bool
    """It changes another argument, or several, in place."""
    draws: bool
    """It draws random numbers."""
    dropout: int | None
    """Position of the argument `dropout_p`; an attention call without it, or with zero, draws no random numbers."""

    def draws_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call draws random numbers."""
        if self.dropout is None:
            return self.draws
        return self.draws and bool(args[self.dropout] if len(args) > self.dropout else kwargs.get("dropout_p"))


@cache
def operator(func: Any) -> OperatorTraits:
    """The properties of an operator that a dispatch mode receives."""
    if not isinstance(func, torch._ops.OpOverload):
        return OperatorTraits(str(func), False, False, False, False, None)
    arguments = func._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    changes_first = written[:1] == [True] and sum(written) == 1
    return OperatorTraits(
        name=str(func._overloadpacket),
        is_question=func.namespace == "prim",
        changes_first=changes_first,
        changes_others=any(written) and not changes_first,
        draws=torch.Tag.nondeterministic_seeded in func.tags,
        dropout=next((index for index, a in enumerate(arguments) if a.name == "dropout_p"), None),
    )


def why_not_kept(op: str) -> str | None:
    """Why the results of an operator, such as `aten.view`, cannot be kept; None when they can."""
    namespace, _, name = op.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None) if namespace and name else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return f'"{op}" is not an operator of PyTorch {torch.__version__}: expected one such as aten.mm'
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    if any(overload.is_view for overload in overloads):
        return f'"{op}" returns a view: name the operator that makes the viewed tensor'
    if name.endswith("_") and any(overload._schema.is_mutable for overload in overloads):
        return f'"{op}" changes a tensor in place: name the operator that makes this tensor'
    return None

"""What selective checkpointing must know of an operator, looked up once."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

__all__ = ["Operator", "operator", "why_not_kept"]


class Operator(NamedTuple):
    """What is true of every call of an operator."""

    name: str
    """Without overload, such as `aten.mm`."""
    is_question: bool
    """It asks a tensor what it is, not what it holds."""
    changes_first: bool
    """It changes its first argument in place, and no other."""
    changes_others: bool
    """It changes other arguments in place, or several."""
    draws: bool
    """It draws random numbers."""
    dropout: int | None
    """Position of the argument `dropout_p`: without it, or where it is zero, attention draws none."""

    def draws_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call draws random numbers."""
        if self.dropout is None:
            return self.draws
        return self.draws and bool(args[self.dropout] if len(args) > self.dropout else kwargs.get("dropout_p"))


@cache
def operator(func: Any) -> Operator:
    """Of the operator that a dispatch mode is given."""
    if not isinstance(func, torch._ops.OpOverload):
        return Operator(str(func), False, False, False, False, None)
    arguments = func._schema.arguments
    written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
    changes_first = written[:1] == [True] and sum(written) == 1
    return Operator(
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
        return f'"{op}" is no operator of PyTorch {torch.__version__}: expected one such as aten.mm'
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    if any(overload.is_view for overload in overloads):
        return f'"{op}" has no result of its own, it shows another one: name the operator that makes that'
    if name.endswith("_") and any(overload._schema.is_mutable for overload in overloads):
        return f'"{op}" has no result of its own, it changes another one in place: name the operator that makes that'
    return None

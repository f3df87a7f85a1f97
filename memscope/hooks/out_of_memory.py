"""Whether an exception that ended a run goes back to a device that ran out of memory."""

from __future__ import annotations

import torch

__all__ = ["is_out_of_memory"]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether it is a `torch.OutOfMemoryError`, or was raised because of one or while one was handled.

    Frameworks raise errors of their own there.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False

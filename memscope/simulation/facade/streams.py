"""Streams on a simulated GPU: everything happens in order, on one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memscope.simulation.refusal import no_answer

__all__ = ["InOrder", "one_stream"]

_ONE_STREAM = (
    "several CUDA streams are used, but everything is simulated on one: on a GPU each stream has memory of its own, "
    "reserved memory may be higher, and copies may run beside the computation, while here they add to its time"
)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class InOrder:
    """The stream, or an event on it. Everything happens in order, so there is nothing to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    record = synchronize = wait = wait_event = wait_stream = staticmethod(_nothing)

    def record_event(self, event: Any = None) -> InOrder:
        """An event, which has happened."""
        return event or InOrder()

    def query(self) -> bool:
        """Whether all work is done: always true."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Refuse: a simulation measures no time."""
        raise no_answer("torch.cuda.Event.elapsed_time", "no kernel runs, so no time can be measured")


def one_stream(note: Callable[[str], None]) -> dict[str, Any]:
    """Answers of `torch.cuda` about streams; `note` is told when something runs on another one."""

    class OnlyStream(InOrder):
        """A stream, on which nothing is done."""

        def __enter__(self) -> OnlyStream:
            note(_ONE_STREAM)
            return self

        def __exit__(self, *exception: Any) -> None:
            pass

    def set_stream(stream: Any) -> None:
        note(_ONE_STREAM)

    only = OnlyStream()
    return {
        "Stream": OnlyStream,
        "ExternalStream": OnlyStream,
        "Event": InOrder,
        "stream": lambda stream: stream or only,
        "set_stream": set_stream,
        "current_stream": lambda device=None: only,
        "default_stream": lambda device=None: only,
    }

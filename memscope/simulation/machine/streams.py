"""Streams and events of a simulated program: everything happens in order, on one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memscope.simulation.assumptions import Assumptions, Origin
from memscope.simulation.facade.visible_gpu import InOrder
from memscope.simulation.refusal import no_answer

__all__ = ["streams_of_a_program"]

_ASSUMED_MILLISECONDS = 1.0
_ONE_STREAM = (
    "the program uses several CUDA streams, but everything is simulated on one: on a GPU each stream has memory of its "
    "own, and reserved memory may be higher"
)


def streams_of_a_program(assumptions: Assumptions, note: Callable[[str], None]) -> dict[str, Any]:
    """Answers of `torch.cuda` about streams and events.

    Args:
        assumptions: receives the times that events are asked for.
        note: told when a program runs something on another stream.
    """

    class OnlyStream(InOrder):
        """A stream, on which nothing is done."""

        def __enter__(self) -> OnlyStream:
            note(_ONE_STREAM)
            return self

        def __exit__(self, *exception: Any) -> None:
            pass

    class TimelessEvent(InOrder):
        """An event. No time passes on a GPU that is not there."""

        def elapsed_time(self, end: Any) -> float:
            """An assumed time in milliseconds."""
            if assumptions.policy.refuse:
                raise no_answer("torch.cuda.Event.elapsed_time", "no kernel runs, so no time can be measured")
            assumptions.rest_on([Origin.here("the time between two events", f"{_ASSUMED_MILLISECONDS} ms")])
            return _ASSUMED_MILLISECONDS

    def set_stream(stream: Any) -> None:
        note(_ONE_STREAM)

    only = OnlyStream()
    return {
        "Stream": OnlyStream,
        "ExternalStream": OnlyStream,
        "Event": TimelessEvent,
        "stream": lambda stream: stream or only,
        "set_stream": set_stream,
        "current_stream": lambda device=None: only,
        "default_stream": lambda device=None: only,
    }

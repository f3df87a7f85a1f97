"""Events of a simulated program, which may ask for the time between them."""

from __future__ import annotations

from typing import Any

from memscope.simulation.assumptions import Assumptions, Origin
from memscope.simulation.facade.streams import InOrder
from memscope.simulation.refusal import no_answer

__all__ = ["events_of_a_program"]

_ASSUMED_MILLISECONDS = 1.0


def events_of_a_program(assumptions: Assumptions) -> dict[str, Any]:
    """Answers of `torch.cuda` about events; `assumptions` receives the times that are asked for."""

    class TimelessEvent(InOrder):
        """An event. No time passes on a GPU that is not there."""

        def elapsed_time(self, end: Any) -> float:
            """An assumed time in milliseconds."""
            if assumptions.policy.refuse:
                raise no_answer("torch.cuda.Event.elapsed_time", "no kernel runs, so no time can be measured")
            assumptions.rest_on([Origin.here("the time between two events", f"{_ASSUMED_MILLISECONDS} ms")])
            return _ASSUMED_MILLISECONDS

    return {"Event": TimelessEvent}

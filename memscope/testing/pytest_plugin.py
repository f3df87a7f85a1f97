"""Memory limits in tests: the mark `@pytest.mark.memscope(limit="1GiB")` and the fixture `memscope_trace`.

pytest loads this plugin in every project where memscope is installed, so heavy imports wait until a test needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pytest

from memscope.errors import UsageError
from memscope.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from memscope.trace import Trace
    from memscope.workload.description import Workload

__all__ = ["MemscopeTrace", "memscope_trace"]

_EXAMPLE = '@pytest.mark.memscope(limit="1GiB")'


class MemscopeTrace(Protocol):
    """Type of the fixture `memscope_trace`: `memscope.simulate`, checked against the limit of the test's mark."""

    def __call__(self, workload: Workload | Callable[[], Workload], **options: Any) -> Trace:
        """Return the trace of a workload; `options` are those of `memscope.simulate`."""


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line(
        "markers", "memscope(limit): fail if a trace of the fixture memscope_trace peaks above limit, such as 1GiB"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Fail a test whose mark cannot be read, or would check nothing."""
    if item.get_closest_marker("memscope") is None:
        return
    _limit_bytes(item)
    if "memscope_trace" not in getattr(item, "fixturenames", ()):
        pytest.fail(
            f"{_EXAMPLE} limits the traces of the fixture memscope_trace, but this test does not use that fixture: "
            "use the fixture, or remove the mark",
            pytrace=False,
        )


@pytest.fixture
def memscope_trace(request: pytest.FixtureRequest) -> MemscopeTrace:
    """Trace training steps without computing them and without a GPU: `memscope_trace(build, strategies="lora")`.

    Takes the arguments of `memscope.simulate` and returns its trace. Under the mark `memscope`, the test fails at the
    first trace whose peak allocated memory exceeds the limit.
    """
    limit_bytes = _limit_bytes(request.node)

    def trace(workload: Workload | Callable[[], Workload], **options: Any) -> Trace:
        from memscope.simulation.simulate import simulate

        found = simulate(workload, **options)
        if limit_bytes is not None and found.events and found.peak.allocated_bytes > limit_bytes:
            pytest.fail(_over(found, limit_bytes), pytrace=False)
        return found

    return trace


def _limit_bytes(item: pytest.Item) -> int | None:
    mark = item.get_closest_marker("memscope")
    if mark is None:
        return None
    limit = mark.kwargs.get("limit")
    if mark.args or set(mark.kwargs) != {"limit"} or not isinstance(limit, str) or not limit.strip()[-1:].isalpha():
        pytest.fail(f"the mark memscope takes one limit with its unit: {_EXAMPLE}", pytrace=False)
    try:
        return parse_bytes(limit)
    except UsageError as error:
        pytest.fail(f"the limit of the mark memscope cannot be read: {error}", pytrace=False)


def _over(trace: Trace, limit_bytes: int) -> str:
    """The message for a trace above the limit: where it peaks, and its categories."""
    peak = trace.peak
    most = sorted(trace.by_category().items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in most if size)
    return (
        f"the peak of {trace.meta['target']} is {format_bytes(peak.allocated_bytes)} ({peak.allocated_bytes:,} bytes), "
        f"above the limit of {format_bytes(limit_bytes)} ({limit_bytes:,} bytes), simulated on "
        f"{trace.meta['device']['name']}, in step {peak.step}, {peak.phase.replace('_', ' ')}: {parts}"
    )

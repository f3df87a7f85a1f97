"""Worker processes: a fault costs the task that it happens in, and no other."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import SimpleNamespace

import faults
import pytest

from memscope.errors import MemscopeError, UsageError
from memscope.runs import processes
from memscope.runs.processes import Workers, alone, workers
from memscope.runs.worker import RunLost

SAID = {
    "killed": "the target's process was killed (SIGKILL), probably because the host ran out of memory",
    "crashed": f"the target's process died of SIGABRT (at {faults.__file__}:",
    "ended": f"the target ended its process with exit code 0 (at {faults.__file__}:",
    "stuck": f"the target took longer than 3,600 s (at {faults.__file__}:",
    "stopped": "the target took longer than 3,600 s",
    "broken_pipe": "the target",
    "half_a_message": "the target ended its process with exit code 0",
    "out_of_memory": f"the host ran out of memory (at {faults.__file__}:",
}


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Two workers. Their hour is over once a task says that it is stuck and no other is left."""
    hour = SimpleNamespace(is_over=False)
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * hour.is_over, sleep=time.sleep)
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(processes, "wait", lambda objects, timeout: wait(objects, 0.05))
    with workers(2, timeout_seconds=3600) as team:
        team.hour = hour  # type: ignore[attr-defined]
        yield team


def answers_of(team: Workers, tasks: list[tuple[str, int]]) -> dict[int, int | MemscopeError]:
    found: dict[int, int | MemscopeError] = {}
    heard: list[object] = []

    def hear(message: object) -> None:
        heard.append(message)
        pass_time()

    def pass_time() -> None:
        team.hour.is_over = bool(heard) and len(found) == len(tasks) - 1  # type: ignore[attr-defined]

    for index, answer in team.answers(faults.carry_out, tasks, hear):
        found[index] = answer
        pass_time()
    return found


@pytest.mark.parametrize("fault", SAID)
def test_the_results_of_other_tasks_survive(fault: str, team: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "stopped":  # it cannot say where it is, however long one waits
        monkeypatch.setattr(processes, "_PATIENCE_SECONDS", 0.1)
    found = answers_of(team, [("", 1), (fault, 2), ("", 3), ("", 4), ("", 5)])
    lost = found.pop(1)
    assert found == {0: 1, 2: 9, 3: 16, 4: 25}
    assert isinstance(lost, RunLost)
    assert SAID[fault] in str(lost)


def test_when_all_tasks_are_killed_each_says_so(team: Workers) -> None:
    found = answers_of(team, [("killed", 1), ("killed", 2), ("killed", 3)])
    assert sorted(found) == [0, 1, 2]
    assert all(isinstance(lost, RunLost) for lost in found.values())


def test_an_explained_error_is_a_result_and_the_worker_goes_on(team: Workers) -> None:
    found = answers_of(team, [("refused", 1), ("", 2), ("refused", 3)])
    assert [type(found[index]) for index in range(3)] == [UsageError, int, UsageError]
    assert str(found[0]) == "not this one"


def test_any_other_error_is_raised_with_the_traceback_of_the_worker() -> None:
    with pytest.raises(RuntimeError, match="Unreadable: 1 and 2") as caught:
        alone(faults.carry_out, "unreadable", 1)
    assert "in unreadable" in str(caught.value.__cause__)


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        alone(faults.lock)


def test_a_worker_that_is_killed_between_tasks_is_replaced() -> None:
    with workers(1) as team:
        ((_, first),) = team.answers(faults.pid, [()])
        assert isinstance(first, int)
        os.kill(first, signal.SIGKILL)
        team._all[0].process.join()
        assert dict(team.answers(faults.carry_out, [("", 3)])) == {0: 9}


def test_a_worker_is_used_again_and_ends_with_the_block() -> None:
    with workers(1) as team:
        pids = {pid for _, pid in team.answers(faults.pid, [(), (), ()])}
        assert len(pids) == 1
    (pid,) = pids
    assert isinstance(pid, int)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_tasks_that_nobody_waits_for_are_ended() -> None:
    with workers(2) as team:
        for _index, _answer in team.answers(faults.carry_out, [("stuck", 1), ("", 2)]):
            break
        assert dict(team.answers(faults.carry_out, [("", 3), ("", 4)])) == {0: 9, 1: 16}

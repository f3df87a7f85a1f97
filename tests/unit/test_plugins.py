"""Errors for broken strategies of other packages."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest

from memscope import simulate
from memscope.errors import MemscopeError, UsageError
from memscope.strategies import Plan, available, plugins
from memscope.testing import toy_workload

GOOD = """
    import dataclasses
    from memscope.strategies import Problem, Stage, Strategy

    class Mine(Strategy):
        name = "mine"
        stage = Stage.STEP
        exact = True

        @dataclasses.dataclass(frozen=True)
        class Config:
            size: int = 1

        def check(self, workload):
            return []

        def apply(self, workload):
            workload.settings["mine"] = self.config.size
"""
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Install]:
    """Installs a package with one strategy, `mine`: the source in `GOOD`, with texts in it replaced."""

    def install(*changes: str) -> None:
        code = dedent(GOOD)
        for before, after in zip(changes[::2], changes[1::2], strict=True):
            assert before in code
            code = code.replace(before, after)
        (tmp_path / "memscope_test_plugin.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        table = [EntryPoint("mine", "memscope_test_plugin:Mine", "memscope.strategies")]
        monkeypatch.setattr(plugins, "entry_points", lambda group: table)
        monkeypatch.delitem(sys.modules, "memscope_test_plugin", raising=False)
        available.cache_clear()

    yield install
    available.cache_clear()


def test_a_sound_strategy_is_used(install: Install) -> None:
    install()
    workload = toy_workload()
    Plan.parse("mine:size=3").apply(workload)
    assert workload.settings["mine"] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("class Mine(Strategy)", "class Mine"), "it is not a subclass of memscope.Strategy"),
        (('name = "mine"', 'name = "yours"'), "its entry point is named 'mine', but its class has name = 'yours'"),
        (('    name = "mine"\n', ""), "but its class has name = None"),
        (("Stage.STEP", '"step"'), "its stage is 'step', expected one of memscope.strategies.Stage"),
        (("exact = True", "pass"), "its exact is None, expected True or False"),
        (("class Config", "class Settings"), "its Config is None, expected a frozen dataclass of its settings"),
        (("    @dataclasses.dataclass(frozen=True)\n", ""), "expected a frozen dataclass"),
        (("size: int = 1", "size: int"), "its Config cannot be created without arguments: "),
    ],
)
def test_an_invalid_strategy_is_named_with_its_fault(install: Install, changes: list[str], said: str) -> None:
    install(*changes)
    with pytest.raises(UsageError) as caught:
        Plan.parse("mine")
    assert str(caught.value).startswith('strategy "mine" (memscope_test_plugin:Mine) cannot be used: ')
    assert said in str(caught.value)


def test_code_that_fails_when_it_is_imported_is_named_with_its_line(install: Install) -> None:
    install("import dataclasses", "import dataclasses\nraise ValueError('no such GPU')")
    with pytest.raises(UsageError, match=r"cannot be imported: ValueError: no such GPU \(at .*_test_plugin.py:3"):
        available()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("return []", "return None"), r'strategy "mine": check\(\) returned None, expected a list of Problem'),
        (
            ("return []", "raise KeyError('layers')"),
            r"\"mine\" failed in check\(\): KeyError: 'layers' .*, in check: raise",
        ),
        (('["mine"]', '["mine"][0]'), r"\"mine\" failed in apply\(\): KeyError: 'mine' \(at .*, in apply: work"),
    ],
)
def test_a_strategy_that_fails_in_check_or_apply_is_named_with_its_line(
    install: Install, changes: list[str], said: str
) -> None:
    install(*changes)
    with pytest.raises(MemscopeError, match=said):
        Plan.parse("mine").apply(toy_workload())
    with pytest.raises(MemscopeError, match=said):
        simulate(toy_workload, strategies="mine")


def test_a_baseline_that_fails_is_named_with_its_line(install: Install) -> None:
    install("def apply", "def baseline(self, workload):\n        1 / 0\n\n    def apply")
    with pytest.raises(MemscopeError, match=r"\"mine\" failed in baseline\(\): ZeroDivision.*, in baseline: 1 / 0"):
        Plan.parse("mine").prepare_baseline(toy_workload(), applied=())

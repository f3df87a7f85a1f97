"""Plans: strategies in the order of their application, and the text that names them.

A plan is written as text such as `lora:r=16,targets=wq+wv,optim:adamw,fused,ckpt`. A comma-separated word with a `=`
before any `:` is a setting of the strategy before it. A bare word after a comma starts a new strategy if it names one;
otherwise it is a switch of the strategy before it, as it is directly after the colon: `fused` means `fused=true`. The
value of a strategy's choice (`memscope.workload.settings.choice`) is such a word too: `adamw`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memscope.errors import UsageError, nearest
from memscope.strategies.plugins import available, called
from memscope.strategies.strategy import Problem, Strategy
from memscope.workload.settings import bare_words, fill

if TYPE_CHECKING:
    from memscope.workload.description import Workload

__all__ = ["Plan", "read_alternatives", "read_strategies"]


@dataclass(frozen=True)
class Plan:
    """Strategies in the order of their application: by stage, then by name.

    Examples:
        >>> from memscope import Plan
        >>> plan = Plan.parse("amp,lora:r=8")
        >>> str(plan)
        'lora:r=8,amp'
    """

    strategies: tuple[Strategy, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            UsageError: the text is malformed, or names an unknown strategy, key or value.
        """
        return cls.of(*read_strategies(text))

    @classmethod
    def of(cls, *strategies: Strategy) -> Plan:
        """Build a plan from strategies in any order.

        Raises:
            UsageError: a strategy occurs twice, two strategies conflict, or a strategy lacks a feature it requires;
                the message lists every such problem.
        """
        ordered = tuple(sorted(strategies, key=lambda s: (s.stage, s.name)))
        names = [s.name for s in ordered]
        wrong = [
            f'"{name}" occurs {names.count(name)} times: name it once'
            for name in sorted(set(names))
            if names.count(name) > 1
        ]
        wrong += _conflicts(ordered) + _lacks(ordered)
        if wrong:
            raise UsageError(_listed("the plan cannot be used", wrong))
        return cls(ordered)

    @property
    def specs(self) -> list[str]:
        """The text of each strategy, in order."""
        return [strategy.spec for strategy in self.strategies]

    def __str__(self) -> str:
        return ",".join(self.specs)

    def __bool__(self) -> bool:
        return bool(self.strategies)

    def check(self, workload: Workload) -> None:
        """Check whether the plan can be applied to a workload; changes nothing.

        Raises:
            UsageError: the plan cannot be applied; the message lists every problem of every strategy.
        """
        wrong = [f"{s.name}: {problem}" for s in self.strategies for problem in _problems(s, workload)]
        if wrong:
            raise UsageError(_listed(f'the plan "{self}" cannot be applied to "{workload.name}"', wrong))

    def apply(self, workload: Workload) -> None:
        """Check every strategy against the workload, then apply them in order.

        Raises:
            UsageError: the plan cannot be applied; the message lists every problem, and nothing has been changed.
        """
        self.check(workload)
        self.carry_out(workload)

    def carry_out(self, workload: Workload) -> None:
        """Apply the strategies in order to a workload that has passed `check`."""
        for strategy in self.strategies:
            called(strategy, "apply", workload)

    def prepare_baseline(self, workload: Workload, applied: Collection[str]) -> None:
        """For a fair comparison, call `baseline` of each strategy whose name is not in `applied`."""
        for strategy in self.strategies:
            if strategy.name not in applied:
                called(strategy, "baseline", workload)


def read_strategies(text: str) -> list[Strategy]:
    """The strategies that a plan's text names, in the order of the text, not checked against each other.

    Raises:
        UsageError: the text is malformed, or names an unknown strategy, key or value.
    """
    strategies: list[Strategy] = []
    for name, words in _words(text):
        strategies.append(_strategy(name, words, text, strategies))
    return strategies


def read_alternatives(text: str) -> list[list[Strategy]]:
    """The strategies that a plan's text names, each with its alternatives: `lora:r=8/16,amp` has two of `lora`.

    `/` separates the alternatives of a value or of a switch; several settings give every combination. The path of a
    file that exists is one value.

    Raises:
        UsageError: the text is malformed, names an unknown strategy, key or value, or an alternative twice.
    """
    found: list[list[Strategy]] = []
    for name, words in _words(text):
        before = [alternatives[0] for alternatives in found]
        choices = [[*_choices(key, value, text)] for key, value in words.items()]
        alternatives = [_strategy(name, dict(chosen), text, before) for chosen in itertools.product(*choices)]
        specs = [strategy.spec for strategy in alternatives]
        twice = next((spec for spec in specs if specs.count(spec) > 1), None)
        if twice is not None:
            raise UsageError(f'"{twice}" is twice among the alternatives of "{name}" in "{text}": leave one out')
        found.append(alternatives)
    return found


def _choices(key: str, value: str | None, text: str) -> Iterator[tuple[str, str | None]]:
    """A setting with each of its alternatives; the text of a switch is None."""
    whole = key if value is None else value
    for one in [whole] if Path(whole).is_file() else whole.split("/"):
        if not one:
            raise UsageError(f'malformed alternatives "{whole}" in "{text}": expected values between / such as r=8/16')
        yield (one, None) if value is None else (key, one)


def _strategy(name: str, words: dict[str, str | None], text: str, before: Sequence[Strategy]) -> Strategy:
    """A strategy with its settings as text; `before` are those before it in the plan."""
    if name not in available():
        raise UsageError(f'unknown strategy "{name}" in plan "{text}": {_hint(name, words, before)}')
    kind = available()[name]
    return kind(fill(kind.Config, words, of=f'strategy "{name}"'))


def _hint(unknown: str, words: Mapping[str, str | None], before: Sequence[Strategy]) -> str:
    """What to write in place of the name of a strategy that there is not."""
    for name, kind in available().items():
        if unknown in bare_words(kind.Config):
            settings = [key if value is None else f"{key}={value}" for key, value in words.items()]
            return f"write {name}:{','.join([unknown, *settings])}"
    return nearest(unknown, [*available(), *(bare_words(before[-1].Config) if before else ())])


def _words(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """The names of a plan's strategies, each with its settings as text; None: the word stands alone."""
    found: list[tuple[str, dict[str, str | None]]] = []
    for word in [w.strip() for w in text.split(",")] if text.strip() else []:
        equals, colon = word.find("="), word.find(":")
        if equals >= 0 and (colon < 0 or equals < colon):
            if not found:
                raise UsageError(
                    f'malformed plan "{text}": the setting "{word}" has no strategy before it; write STRATEGY:{word}'
                )
            setting = word
        elif found and word not in available() and _stands_alone(word, after=found[-1][0]):
            setting = word
        else:
            name, _, setting = word.partition(":")
            if not name or (colon >= 0 and not setting):
                raise UsageError(
                    f'malformed plan "{text}": expected STRATEGY or STRATEGY:KEY=VALUE,… but found "{word}"'
                )
            found.append((name, {}))
            if not setting:
                continue
        key, equal, value = setting.partition("=")
        if not key or (equal and not value):
            raise UsageError(
                f'malformed plan "{text}": expected KEY=VALUE after "{found[-1][0]}" but found "{setting}"'
            )
        if key in found[-1][1]:
            raise UsageError(f'malformed plan "{text}": "{key}" is set twice for "{found[-1][0]}"')
        found[-1][1][key] = value if equal else None
    return found


def _stands_alone(word: str, *, after: str) -> bool:
    """Whether a word is a setting of a strategy by itself."""
    kind = available().get(after)
    return kind is not None and word in bare_words(kind.Config)


def _problems(strategy: Strategy, workload: Workload) -> Iterable[Problem]:
    if workload.optimizer_factory is None and strategy.trains:
        what = f"it changes {strategy.trains}, and inference has none"
        return [Problem(what, "leave it out, or train: give the workload an optimizer")]
    found: list[Problem] = called(strategy, "check", workload)
    return found


def _conflicts(strategies: tuple[Strategy, ...]) -> list[str]:
    found = []
    for i, one in enumerate(strategies):
        for other in strategies[i + 1 :]:
            features = sorted((one.conflicts & other.provides) | (other.conflicts & one.provides))
            if other.name in one.conflicts or one.name in other.conflicts:
                found.append(f'"{one.name}" and "{other.name}" cannot be combined: remove one')
            elif features:
                found.append(
                    f'"{one.name}" and "{other.name}" cannot be combined, because of "{features[0]}": '
                    "remove one, or change the setting that adds it"
                )
    return found


def _lacks(strategies: tuple[Strategy, ...]) -> list[str]:
    provided = frozenset().union(*(s.provides | {s.name} for s in strategies)) if strategies else frozenset()
    return [
        f'"{s.name}" requires "{feature}": add a strategy that provides it'
        for s in strategies
        for feature in sorted(s.requires - provided)
    ]


def _listed(title: str, wrong: list[str]) -> str:
    return f"{title}: {wrong[0]}" if len(wrong) == 1 else title + ":" + "".join(f"\n  - {line}" for line in wrong)

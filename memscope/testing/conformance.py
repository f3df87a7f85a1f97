"""The conformance kit: a package that provides a strategy calls `check_strategy(MyStrategy)` in a test."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations, zip_longest
from typing import Any, Literal, Union

import torch
from torch import Tensor

from memscope.errors import UsageError
from memscope.hooks.record import record
from memscope.simulation.simulate import simulate
from memscope.strategies import Plan, Stage, Strategy, available
from memscope.strategies.plugins import called
from memscope.testing.toy import toy_workload
from memscope.trace import CATEGORIES, PHASES, Trace
from memscope.workload.batch import map_tensors
from memscope.workload.description import StepPlan, Workload
from memscope.workload.micro_batches import micro_batches
from memscope.workload.settings import help_of
from memscope.workload.step import Training, run_step

__all__ = ["TOLERANCE", "check_strategy", "toy_workload"]

TOLERANCE = 1e-12
"""Float64 sums in another order may differ by this fraction of the largest value: thousands of roundings of 2⁻⁵³."""
_Build = Callable[[], Workload]
_Steps = list[dict[str, Tensor]]


def check_strategy(strategy: type[Strategy] | str, *, workload: Callable[[], Workload] | None = None) -> None:
    """Check everything that a strategy must promise, on a small workload on the CPU.

    - The strategy is installed and described.
    - Its settings, and those of its candidates, can be written in a plan and read back.
    - Applying it changes something.
    - Alone and with each other installed strategy, a simulation makes the same allocations as a real run, and declared
      conflicts are refused. A pair may also be refused by a `UsageError` when it is applied.
    - Where it is exact (`is_exact`), losses, gradients and buffers equal the baseline's; so do the weights after the
      step if it changes the optimizer. They are equal bit for bit or, if sums are taken in another order, up to
      `TOLERANCE` in float64. Without a workload of your own, this is also checked with batch norm.

    Strategies that it requires are added. Other strategies that cannot be applied to the workload are left out.

    Args:
        strategy: a class, tested with its default settings, or one strategy in plan syntax, such as `lora:r=4`.
        workload: builds a new workload at each call, equal for equal random seeds; None: `toy_workload`, and the same
            with batch norm.

    Raises:
        AssertionError: the strategy breaks a promise; the message names the strategy and the promise.
    """
    name = strategy if isinstance(strategy, str) else getattr(strategy, "name", strategy.__name__)

    def seeded(make: Callable[[], Workload]) -> _Build:
        def build() -> Workload:
            torch.manual_seed(0)
            return make()

        return build

    build = seeded(workload or toy_workload)
    with_batch_norm = [] if workload else [seeded(partial(toy_workload, batch_norm=True))]

    with torch.random.fork_rng(devices=[]):
        with _promise(name, "it is installed and described, and the features it requires are provided"):
            subject = _read(strategy) if isinstance(strategy, str) else _find(strategy)
            _check_description(type(subject))
            needed = _with_needs(subject)
        with _promise(name, "its settings can be written in a plan and read back"):
            _check_settings(subject)
        with _promise(name, "its candidates are settings that a plan can hold, and finding them changes nothing"):
            _check_candidates(type(subject), build)
        with _promise(name, "it can be applied, and changes something"):
            _check_change(needed, subject, build)
        with _promise(name, "simulated and real runs make the same allocations"):
            _check_traces(needed, build)
        for one in (build, *with_batch_norm):
            with _promise(name, "losses, gradients and buffers are unchanged (exact)"):
                if called(subject, "is_exact", one()):
                    _check_parity(needed, subject, one)
        for other in available().values():
            if other.name not in {s.name for s in needed}:
                with _promise(name, f'it can be combined with "{other.name}", or one of the two declares a conflict'):
                    _check_pair(needed, other(), build)


@contextlib.contextmanager
def _promise(name: str, text: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (AssertionError, UsageError)) else f"{type(error).__name__}: "
        raise AssertionError(f'strategy "{name}" breaks a promise: {text}. {kind}{error}') from error


def _require(holds: bool, otherwise: str) -> None:
    if not holds:  # python -O would remove an `assert`, and the check with it
        raise AssertionError(otherwise)


def _find(strategy: type[Strategy]) -> Strategy:
    found = available().get(strategy.name)
    _require(found is strategy, f'Its entry point in "memscope.strategies" is {found}, expected {strategy}')
    return strategy()


def _read(text: str) -> Strategy:
    """The one strategy that a text names, read in a plan together with the strategies it requires."""
    kind = available().get(re.split("[:,]", text)[0])
    others = [other.name for other in _with_needs(kind())[1:]] if kind else []
    found = [s for s in Plan.parse(",".join([text, *others])).strategies if s.name not in others]
    _require(len(found) == 1, f"Expected one strategy, found {len(found)}")
    return found[0]


def _check_description(kind: type[Strategy]) -> None:
    _require(isinstance(kind.stage, Stage), f"Its stage is {kind.stage!r}, expected one of memscope.strategies.Stage")
    _require(isinstance(kind.exact, bool), f"Its exact is {kind.exact!r}, expected True or False")
    is_exact = kind.exact and kind.is_exact is Strategy.is_exact
    _require(is_exact or bool(kind.changes), "It is not always exact, but its `changes` is empty: say what it changes")
    _require(bool(kind.__doc__), "The class has no docstring, which is its help text")
    silent = [field for field, text in help_of(kind.Config).items() if not text]
    _require(not silent, f"Config has no docstring, which is the help text, under {', '.join(silent)}")


def _check_settings(strategy: Strategy) -> None:
    kind, hints, configs = type(strategy), typing.get_type_hints(strategy.Config), [strategy.config]
    for field in dataclasses.fields(kind.Config):
        with contextlib.suppress(UsageError, ValueError):  # a value that Config rejects cannot occur in a plan
            configs.append(kind.Config(**{field.name: _other(hints[field.name], getattr(kind.Config(), field.name))}))
    for config in configs:
        _check_reads_back(kind(config))


def _check_reads_back(strategy: Strategy) -> None:
    again = _read(strategy.spec).config
    _require(again == strategy.config, f'"{strategy.spec}" reads back as {again}, expected {strategy.config}')


def _check_candidates(kind: type[Strategy], build: _Build) -> None:
    workload = build()
    before = _state(workload)
    for config in kind.candidates(workload):
        _require(type(config) is kind.Config, f"Its candidate {config!r} is not a {kind.__name__}.Config")
        _check_reads_back(kind(config))
        kind(config).check(workload)
    for config in kind.left_out(workload):
        _require(type(config) is kind.Config, f"{config!r}, which it leaves out, is not a {kind.__name__}.Config")
    _require(_are_same(before, _state(workload)), "candidates() or check() changed the plan, the model or the data")


def _other(kind: Any, value: Any = None) -> Any:
    """A value of a settings field that differs from the given one."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is not None else _other(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return next((a for a in arguments if a != value), value)
    if origin is tuple:
        return (*(value or ()), _other(arguments[0]))
    _require(kind in (bool, int, float, str), f"A setting of kind {kind} cannot be written in a plan")
    return not value if kind is bool else f"{value or ''}x" if kind is str else kind((value or 0) + 1)


def _with_needs(strategy: Strategy) -> list[Strategy]:
    """A strategy, and an installed strategy for each required feature that is not provided yet."""
    chosen = [strategy]
    for user in chosen:  # grows during the loop
        for feature in sorted(user.requires):
            if not any(feature in {s.name, *s.provides} for s in chosen):
                providers = [kind for kind in available().values() if feature in {kind.name, *kind.provides}]
                _require(bool(providers), f'"{user.name}" requires "{feature}", which no installed strategy provides')
                chosen.append(providers[0]())
    return chosen


def _check_change(needed: list[Strategy], subject: Strategy, build: _Build) -> None:
    workload = build()
    problems = [str(problem) for strategy in needed for problem in strategy.check(workload)]
    _require(not problems, f"Its check() rejects the workload: {'; '.join(problems)}. Pass another workload")
    for strategy in Plan.of(*needed).strategies:
        before = _state(workload)
        strategy.apply(workload)
        after = _state(workload)
        changed = strategy is not subject or not _are_same(before, after)
        _require(changed, "Its apply() did not change the plan, the model or the data")


def _state(workload: Workload) -> dict[Any, Any]:
    """Everything that a strategy may change."""
    state: dict[Any, Any] = dict(vars(workload))
    for name, module in workload.model.named_modules():
        for key, value in vars(module).items():
            entries = value if isinstance(value, dict) else {None: value}
            state |= {(name, key, entry): item for entry, item in entries.items()}
    for name, p in workload.model.named_parameters():
        state[name, ...] = (p.requires_grad, p.dtype, p.device, p.shape, p.data_ptr(), p._version)
    return state


def _are_same(before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    return before.keys() == after.keys() and all(_is_same(before[key], after[key]) for key in before)


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (tuple, StepPlan)) and bool(one == other))


def _check_traces(strategies: list[Strategy], build: _Build) -> None:
    plan = str(Plan.of(*strategies))
    simulated = _allocations(simulate(build, device="cpu", strategies=plan))
    real = _allocations(record(build, strategies=plan))
    for index, (one, other) in enumerate(zip_longest(simulated, real)):
        _require(one == other, f'With "{plan}", allocation {index} is simulated as {one}, but measured as {other}')


def _allocations(trace: Trace) -> list[tuple[Any, ...]]:
    """Each allocation: `(bytes, step, micro-batch, allocations made before its free or 0, category, phase, module)`."""
    made = trace.born.searchsorted(trace.freed)
    columns = (trace.requested, trace.step, trace.micro_batch, made, trace.category, trace.phase, trace.module)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(*numbers, CATEGORIES[c], PHASES[p], trace.modules[m]) for *numbers, c, p, m in rows]


def _check_parity(needed: list[Strategy], subject: Strategy, build: _Build) -> None:
    plan, without = Plan.of(*needed), Plan.of(*(s for s in needed if s is not subject))
    for double, steps, tolerance in ((False, 2, 0.0), (True, 1, TOLERANCE)):
        expected = _train(build, without, steps, double, subject, baseline=True)
        found = _train(build, plan, steps, double, subject, baseline=False)
        wrong = list(_differences(expected, found, tolerance))
        if not wrong:
            return
    raise AssertionError(wrong[0])


def _train(build: _Build, plan: Plan, steps: int, double: bool, subject: Strategy, *, baseline: bool) -> _Steps:
    """Loss, gradients, buffers and, if the strategy changes the optimizer, weights of each step.

    All of them are in float64 if `double`.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.double() if double and tensor.is_floating_point() else tensor.clone()

    def keep(*_: Any) -> None:  # once a step, or for each parameter that is updated in the backward pass
        gradients = {name: p.grad for name, p in workload.model.named_parameters()}
        seen.update({f"gradient of {name}": g.clone() for name, g in gradients.items() if g is not None})

    workload, seen = build(), dict[str, Tensor]()
    if double:
        workload.model.double()
    buffers = {name for name, _ in workload.model.named_buffers()}  # a strategy may add some of its own
    if baseline:
        subject.baseline(workload)
    plan.apply(workload)
    training = Training.start(workload, "cpu", partial(map_tensors, move))
    training.optimizer.register_step_pre_hook(keep)
    torch.manual_seed(1)
    results = _Steps()
    for _ in range(steps):
        loss = run_step(training, micro_batches(workload, workload.batches[0]))
        weights = workload.model.named_parameters() if subject.stage is Stage.OPTIM else ()
        kept = [*weights, *((name, buffer) for name, buffer in workload.model.named_buffers() if name in buffers)]
        results.append({"loss": loss, **seen, **{f"{name} afterwards": p.detach().clone() for name, p in kept}})
        seen.clear()
    return results


def _differences(expected: _Steps, found: _Steps, tolerance: float) -> Iterator[str]:
    for step, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one.keys() != other.keys():
            only_one = ", ".join(sorted(one.keys() ^ other.keys()))
            yield f"In step {step}, only the baseline or only the strategy has {only_one}"
            continue
        largest = max(float(value.abs().max()) for value in one.values())
        for name in one:
            difference = float((one[name] - other[name]).abs().max())
            if not difference <= tolerance * largest:  # also when it is NaN
                yield f"In step {step}, the {name} differs by {difference:.3g}; the largest value is {largest:.3g}"


def _check_pair(needed: list[Strategy], other: Strategy, build: _Build) -> None:
    try:
        together = list({strategy.name: strategy for strategy in [*_with_needs(other), *needed]}.values())
    except AssertionError:  # the other strategy cannot be used at all
        return
    if any(one.conflicts & {two.name, *two.provides} for one, two in permutations(together, 2)):
        with contextlib.suppress(UsageError):
            _require(not Plan.of(*together), "The conflict is declared, but the plan was accepted")
    elif not any(strategy.check(build()) for strategy in together):
        try:
            Plan.of(*together).apply(build())
        except UsageError:  # refused in words: what one of them has changed leaves nothing to do for the other
            return
        _check_traces(together, build)

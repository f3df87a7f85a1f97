"""The runs of a profile: their labels, their files, what they are compared with."""

from __future__ import annotations

from pathlib import Path

from memscope.errors import MemscopeError, UsageError
from memscope.simulation.assumptions import Assume
from memscope.strategies import Plan, Strategy

__all__ = [
    "asked_of_baseline",
    "check_assume",
    "file_name",
    "is_auto",
    "labels_of",
    "named_error",
    "refuse_existing",
    "textbook_of",
]


def named_error(error: MemscopeError, label: str) -> MemscopeError:
    """The same error, with the name of its run."""
    named = type(error)(f"run {label}: {error}")
    named.__cause__ = error.__cause__
    return named


def labels_of(plans: list[Plan]) -> list[str]:
    """Names of the runs: the baseline; then each strategy of one plan alone and all together, or several plans.

    A strategy that requires others has no run of its own.

    Raises:
        UsageError: a plan is given twice.
    """
    if len(plans) == 1 and len(plans[0].strategies) > 1:
        plans = [*(Plan.of(one) for one in plans[0].strategies if not one.requires - one.provides), plans[0]]
    labels = ["baseline", *(str(plan) for plan in plans if plan)]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UsageError(f'plan "{twice[0]}" is given twice: name each plan once')
    return labels


def asked_of_baseline(plans: list[Plan]) -> list[str]:
    """What strategies ask of the run without them: the docstrings of their `baseline`."""
    asking = {
        s.name: type(s).baseline for plan in plans for s in plan.strategies if type(s).baseline is not Strategy.baseline
    }
    return [f"{(baseline.__doc__ or '').strip().rstrip('.')} ({name})" for name, baseline in sorted(asking.items())]


def is_auto(plan: Plan) -> bool:
    """Whether a plan contains `ckpt:auto`. The class is known by its name: its module imports torch."""
    return any(strategy.name == "ckpt" and strategy.config.auto for strategy in plan.strategies)


def textbook_of(label: str) -> dict[str, str]:
    """What textbooks say of the run's strategy, if it has exactly one: row of Table 1 → arrow."""
    strategies: tuple[Strategy, ...] = () if label == "baseline" else Plan.parse(label).strategies
    return dict(strategies[0].textbook) if len(strategies) == 1 else {}


def file_name(label: str) -> str:
    """The label as part of the name of a file."""
    return "".join(c if c.isalnum() or c in "-_.+=" else "_" for c in label.replace(",", "+"))


def refuse_existing(paths: list[Path], force: bool) -> None:
    """Check that no file would be overwritten, unless that is forced.

    Raises:
        UsageError: one of them exists.
    """
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UsageError(f"{existing[0]}{more} exists already: choose another folder with -o, or overwrite with -f")


def check_assume(text: str, simulated: bool) -> None:
    """Check that `--assume` can be read, and is not given to a real run, which would ignore it.

    Raises:
        UsageError: otherwise.
    """
    Assume.parse(text)
    if text and not simulated:
        raise UsageError("--assume is for simulations: a real run has every value; leave it out, or add --simulate")

"""Apply a plan to a program: to the model of each optimizer that it builds, and to that optimizer."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memscope.errors import UsageError
from memscope.program.built import optimizers_followed
from memscope.program.loop_flags import flag_for
from memscope.program.models import trained_model
from memscope.program.offers import with_offers
from memscope.program.parameter_groups import TrainedBefore
from memscope.program.request import Offers
from memscope.strategies import Plan, Problem, Stage, Strategy
from memscope.strategies.plugins import called
from memscope.workload.description import Workload
from memscope.workload.optimizer import built_by

__all__ = ["AppliedPlan"]


class AppliedPlan:
    """Context in which every optimizer that is built, and the model that it trains, are changed as a plan says.

    A model is changed once, whichever optimizers train it.

    Attributes:
        chosen: what the strategies chose; see `Strategy.chosen`.
        offers: what else could be changed in the models; None: nobody asks.
    """

    def __init__(
        self,
        plan: Plan,
        changed: Callable[[], None] = lambda: None,
        asks: Collection[str] = (),
        layer_list: str = "",
    ) -> None:
        """Prepare to apply a plan.

        Args:
            plan: the plan; an empty one changes nothing.
            changed: called after each model that was changed.
            asks: see `Request.asks`.
            layer_list: see `Request.layer_list`.
        """
        self.chosen: dict[str, dict[str, str]] = {}
        self.offers = Offers() if asks else None
        self._plan, self._changed = plan, changed
        self._asks, self._layer_list = set(asks) - {strategy.name for strategy in plan.strategies}, layer_list
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._frozen: set[int] = set()
        self._refused: list[tuple[str, UsageError]] = []
        self._told: list[str] = []
        self._is_applied = self._is_applying = False
        self._scopes = contextlib.ExitStack()

    def __enter__(self) -> AppliedPlan:
        self._scopes.enter_context(optimizers_followed(self._built))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.close()

    @property
    def notes(self) -> list[str]:
        """What the strategies tell; optimizers that the plan does not suit, though others; models that need no plan."""
        notes = self._told + [
            f'The plan "{self._plan}" was not applied to {what}: {error}' for what, error in self._refused
        ]
        if any("recomputation" in strategy.provides for strategy in self._plan.strategies):
            notes += [
                f"{type(model).__name__} checkpoints activations by itself (gradient_checkpointing): the baseline too"
                for model in self._models
                if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())
            ]
        return notes

    def require_use(self, *, built: bool) -> None:
        """Refuse a program that trains without the plan.

        Args:
            built: whether the program must have built its optimizer by now.

        Raises:
            UsageError: the plan could be applied to no optimizer, or conflicts with what the program does.
        """
        if self._is_applied:
            self._refuse_conflicts()
        elif self._refused:
            raise self._refused[0][1]
        elif built:
            raise UsageError(
                f'the plan "{self._plan}" was not applied: the program has built no torch.optim.Optimizer after it '
                "imported torch. Make the change in the program"
            )

    def _built(self, optimizer: Optimizer) -> None:
        """The program has built an optimizer."""
        if self._is_applying:
            return
        for strategy in self._plan.strategies:
            if strategy.stage is Stage.STEP:
                raise UsageError(_of_the_loop(strategy))
        self._is_applying = True
        try:
            self._apply(optimizer)
        except _Refused as refused:
            self._refused.append((f"the parameters of {type(optimizer).__name__}", refused.error))
        finally:
            self._is_applying = False

    def _apply(self, optimizer: Optimizer) -> None:
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        model = trained_model(given)
        if model is None:
            raise _Refused(
                UsageError(f"no nn.Module that can be called holds the parameters of {type(optimizer).__name__}")
            )
        done = self._has_changed(model)
        plan = Plan(tuple(s for s in self._plan.strategies if s.stage is Stage.OPTIM or not done))
        before = TrainedBefore.of(model, self._frozen)
        workload = _workload(model, lambda parameters: before.regrouped(optimizer, model))
        if self.offers is not None:
            self.offers = replace(self.offers, optimizers=self.offers.optimizers + 1)
            if not done:
                self.offers = with_offers(self.offers, workload, self._asks, self._layer_list, _problems)
        if not self._plan:
            self._models.add(model)
            return
        self._check(plan, workload)
        loop = _loop_of(workload)
        for strategy in plan.strategies:
            called(strategy, "apply", workload)
            if _loop_of(workload) != loop:
                raise UsageError(_of_the_loop(strategy))
            if strategy.chosen:
                self.chosen[strategy.name] = dict(strategy.chosen)
        if not done:
            self._models.add(model)
            self._frozen |= before.frozen_now
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        built = built_by(workload.optimizer_factory, trainable, model)
        if not any(group["params"] for group in built.param_groups):
            raise UsageError(
                f'the plan "{self._plan}" leaves the optimizer {type(optimizer).__name__} nothing to train: it was '
                "given none of the parameters that are trained now"
            )
        self._become(optimizer, built)
        self._told += [note for note in workload.notes if note not in self._told]
        self._is_applied = True
        self._changed()

    def _become(self, optimizer: Any, built: Optimizer) -> None:
        """Make the program's object the optimizer that was built: the program goes on with it.

        Raises:
            UsageError: instances of its class cannot become those of the other class.
        """
        try:
            optimizer.__class__ = type(built)
        except TypeError as error:
            raise UsageError(
                f'the plan "{self._plan}" builds a {type(built).__name__}, but the program goes on with its '
                f"{type(optimizer).__name__}, which cannot become one ({error}): build it in the program"
            ) from error
        vars(optimizer).clear()
        vars(optimizer).update(vars(built))

    def _check(self, plan: Plan, workload: Workload) -> None:
        """Find what prevents a plan, before anything is changed."""
        self._refuse_conflicts()
        for strategy in plan.strategies:
            for problem in _problems(strategy, workload.model):
                raise UsageError(f"{strategy.name}: {problem}")
        try:
            plan.check(workload)
        except UsageError as error:
            raise _Refused(error) from error

    def _refuse_conflicts(self) -> None:
        for strategy in self._plan.strategies:
            for problem in _conflicts(strategy):
                raise UsageError(f"{strategy.name}: {problem}")

    def _has_changed(self, model: nn.Module) -> bool:
        """Whether a model, a part of it, or one that it is part of has been changed."""
        return any(one in self._models for one in model.modules()) or any(
            model is part for one in self._models for part in one.modules()
        )


def _problems(strategy: Strategy, model: nn.Module) -> list[Problem]:
    """Why a strategy cannot change a model in a program, beyond what its own check says."""
    found = _conflicts(strategy)
    kinds = (kind for module in model.modules() for kind in type(module).__mro__)
    if "adapters" in strategy.provides and any(kind.__module__.startswith("peft.") for kind in kinds):
        found.append(Problem("the program's model has adapters of PEFT already", "change those"))
    if strategy.stage is Stage.LOAD and any(kind.__name__ == "LightningModule" for kind in type(model).__mro__):
        what = f"Lightning calls the parts of {type(model).__name__}, which convert no inputs"
        found.append(Problem(what, 'pass precision="bf16-true" to Trainer'))
    return found


def _conflicts(strategy: Strategy) -> list[Problem]:
    """What the program does that a strategy cannot be combined with."""
    if "gradient scaler" not in strategy.conflicts or not any(
        issubclass(type(one), torch.amp.GradScaler) and getattr(one, "_enabled", False) for one in gc.get_objects()
    ):
        return []
    what = "the program scales its loss with a GradScaler"
    return [Problem(what, "train in bfloat16 instead of float16, and leave the scaler out")]


class _Refused(Exception):
    """The plan cannot be applied to one optimizer; perhaps to others."""

    def __init__(self, error: UsageError) -> None:
        super().__init__(str(error))
        self.error = error


def _workload(model: nn.Module, optimizer_factory: Callable[[Iterable[Tensor]], Optimizer]) -> Workload:
    """A program's model and optimizer as strategies see them. The program's loop is not part of it."""
    return Workload(
        model=model,
        batches=[],
        loss=_no_loss,
        optimizer_factory=optimizer_factory,
        name=type(model).__name__,
    )


def _no_loss(model: nn.Module, batch: Any) -> Tensor:
    raise UsageError("the loss of a program is computed in its own loop")


def _loop_of(workload: Workload) -> list[Any]:
    """What of a workload stands for the training loop."""
    return [workload.model, workload.plan, workload.loss, workload.batches, workload.split, workload.weight]


def _of_the_loop(strategy: Strategy) -> str:
    return f'"{strategy.spec}" changes the training loop, which is the program\'s own: {flag_for(strategy)}'

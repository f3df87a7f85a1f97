"""Find what could be changed in a program's model, for `memscope advise`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from torch import nn

from memscope.errors import UsageError
from memscope.program.request import Offer, Offers
from memscope.strategies import Problem, Stage, Strategy, available
from memscope.strategies.ckpt import Checkpoint
from memscope.strategies.ckpt.layer_plan import described
from memscope.strategies.ckpt.layers import named_layers
from memscope.strategies.plugins import called
from memscope.workload.description import Workload

__all__ = ["with_offers"]

_ProblemsOf = Callable[[Strategy, nn.Module], Sequence[Problem]]


def with_offers(
    known: Offers, workload: Workload, asks: Collection[str], layer_list: str, problems_of: _ProblemsOf
) -> Offers:
    """The offers of the models before, and those of another model; its optimizer is not counted.

    Args:
        known: the offers so far.
        workload: the model and its optimizer, which no strategy has changed yet.
        asks: names of the strategies that are asked for.
        layer_list: the lists of layers, as in `ckpt:layer-list`.
        problems_of: what else prevents a strategy.
    """
    exact = {offer.spec: offer.is_exact for offer in known.strategies}
    for name, kind in available().items():
        for strategy in _candidates(kind, workload, layer_list) if name in asks else ():
            if not called(strategy, "check", workload) and not problems_of(strategy, workload.model):
                is_exact = bool(called(strategy, "is_exact", workload))
                exact[strategy.spec] = exact.get(strategy.spec, True) and is_exact
    offers = tuple(Offer(spec, is_exact) for spec, is_exact in exact.items())
    try:
        layers = tuple(named_layers(workload.model, layer_list))
    except UsageError:
        return replace(known, strategies=offers)
    layered = (*known.layered, workload.name)
    if len(layered) > 1:
        return replace(known, strategies=offers, layered=layered, layers=(), model={})
    found = described(workload.model, layers)
    return replace(known, strategies=offers, layered=layered, layers=layers, model=found)


def _candidates(kind: type[Strategy], workload: Workload, layer_list: str) -> Iterator[Strategy]:
    if kind is Checkpoint:
        yield Checkpoint(Checkpoint.Config(layer_list=layer_list))
    elif kind.stage is not Stage.STEP:
        yield from map(kind, called(kind(), "candidates", workload))

"""Chains of layers like LLaMA2-7B's. Sizes follow from shapes; times are assumed, not measured.

A layer in bfloat16, one sequence of 2048 tokens: `[1, 2048, 4096]`, and `[1, 2048, 11008]` in the feed-forward. Kernels
are taken to do 150 TFLOP/s and 1.2 TB/s, about half of what an A100 can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from memscope.advisor.plan.planner import Chain, Choice

__all__ = [
    "OPERATORS",
    "UNIT",
    "Op",
    "chain_of",
    "greedy_order",
    "keeping",
    "layer_choices",
    "varied_layers",
]

TOKENS, DIM, HIDDEN = 2048, 4096, 11008
UNIT = TOKENS * DIM * 2
"""Bytes of a hidden state, the boundary between layers."""
_WIDE = TOKENS * HIDDEN * 2
_PER_FLOP, _PER_BYTE = 1e9 / 150e12, 1e9 / 1.2e12
STATIC_BYTES = 14 * 10**9
"""Weights, and a few adapters."""


@dataclass(frozen=True)
class Op:
    """One operator of a layer, whose result can be kept or recomputed."""

    name: str
    size_bytes: int
    nanoseconds: int


def _linear(name: str, inputs: int, outputs: int) -> Op:
    return Op(name, TOKENS * outputs * 2, round(2 * TOKENS * inputs * outputs * _PER_FLOP))


def _elementwise(name: str, size_bytes: int, operands: int) -> Op:
    return Op(name, size_bytes, round(size_bytes * operands * _PER_BYTE))


OPERATORS = (
    _elementwise("norm1", UNIT, 2),
    _linear("q", DIM, DIM), _linear("k", DIM, DIM), _linear("v", DIM, DIM),
    _elementwise("rotary", 2 * UNIT, 3),
    Op("attention", UNIT + TOKENS * 32 * 4, round(2 * TOKENS * TOKENS * DIM * _PER_FLOP)),  # causal: half of all
    _linear("o", DIM, DIM),
    _elementwise("residual", UNIT, 3),
    _elementwise("norm2", UNIT, 2),
    _linear("w1", DIM, HIDDEN), _linear("w3", DIM, HIDDEN),
    _elementwise("silu", _WIDE, 2),
    _elementwise("product", _WIDE, 3),
)  # fmt: skip
_NOT_SAVED = {"q", "k", "o"}
"""Results that autograd itself does not save: their consumers are linear."""


def greedy_order(operators: Sequence[Op]) -> list[Op]:
    """Operators by bytes a nanosecond, to be recomputed in this order (MSPS in PyTorch 2.13's sac_estimator.py)."""
    return sorted(operators, key=lambda operator: -operator.size_bytes / operator.nanoseconds)


def saved_bytes(operators: Iterable[Op]) -> int:
    """Bytes that autograd saves without checkpointing."""
    return sum(operator.size_bytes for operator in operators if operator.name not in _NOT_SAVED)


def keeping(name: str, kept: Sequence[Op], operators: Sequence[Op], layer: int, layers: int) -> Choice:
    """A checkpointed layer that keeps some results."""
    kept_bytes = sum(operator.size_bytes for operator in kept)
    again = sum(operator.nanoseconds for operator in operators) - sum(operator.nanoseconds for operator in kept)
    return Choice(
        option=name,
        length=1,
        kept_bytes=kept_bytes,
        held_bytes=0,
        forward_bytes=STATIC_BYTES + UNIT + max(kept_bytes, 4 * _WIDE) + UNIT,
        backward_bytes=STATIC_BYTES + saved_bytes(operators) + UNIT + 3 * _WIDE + (layers - layer) * 10**6,
        nanoseconds=again,
        saves_input=True,
        saves_output=False,
    )


def layer_choices(operators: Sequence[Op], layer: int, layers: int, segments: Sequence[int]) -> list[Choice]:
    """Twelve options: none, full, and ten that keep more and more of the results; and segments."""
    order = greedy_order(operators)
    full = keeping("full", [], operators, layer, layers)
    everything = saved_bytes(operators)
    local = STATIC_BYTES + UNIT + everything + UNIT
    choices = [Choice("none", 1, everything, 0, local, full.backward_bytes, 0, True, False), full]
    choices += [keeping(f"save:{count}", order[-count:], operators, layer, layers) for count in range(1, 11)]
    for length in segments:
        if layer + length <= layers:
            more = (length - 1) * (everything + UNIT)
            choices.append(
                Choice(f"full:{length}", length, 0, 0, full.forward_bytes, full.backward_bytes + more,
                       length * full.nanoseconds, True, False)
            )  # fmt: skip
    return choices


def chain_of(layers: Sequence[Sequence[Op]], segments: Sequence[int] = ()) -> Chain:
    """Layers with these operators, and a head with 32000 logits a token in float32."""
    logits = TOKENS * 32000 * 4
    choices = [tuple(layer_choices(operators, i, len(layers), segments)) for i, operators in enumerate(layers)]
    return Chain(
        tuple(choices),
        (UNIT,) * (len(layers) + 1),
        STATIC_BYTES + 2 * logits,
        STATIC_BYTES + 3 * logits,
        True,
        STATIC_BYTES,
    )


def varied_layers(count: int, seed: int = 7) -> list[list[Op]]:
    """Layers of which no two are alike: sizes and times differ by up to a third."""
    rng = np.random.default_rng(seed)

    def varied(operator: Op) -> Op:
        size, time = rng.uniform(2 / 3, 4 / 3, size=2)
        return Op(operator.name, round(operator.size_bytes * size / 512) * 512, round(operator.nanoseconds * time))

    return [[varied(operator) for operator in OPERATORS] for _ in range(count)]

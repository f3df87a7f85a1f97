"""The planner's view of a model: a chain of layers with choices for each, and the cost of a sequence of choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Chain", "Choice", "Evaluation", "evaluate"]

_MOST = 2**52
"""Sums of sizes and of times stay below this, so that they are exact in double precision."""


@dataclass(frozen=True)
class Choice:
    """One option for `length` consecutive layers.

    Raises:
        ValueError: when it covers no layer, or a figure is negative.
    """

    option: str
    length: int
    """Layers it covers; more than one form a segment under one checkpoint."""
    kept_bytes: int
    """Alive from its forward until its backward, without its input and output (the boundaries)."""
    held_bytes: int
    """Also alive until the forward pass of the micro-batch ends: weights that autocast has cast."""
    forward_bytes: int
    """Peak while its forward runs, including its input, less the bytes that the layers before keep and hold."""
    backward_bytes: int
    """Peak while its backward runs, less the bytes that the layers before keep.

    Includes the bytes it kept, its input if it saves it, the gradients so far, and all static bytes.
    """
    nanoseconds: int
    """Extra time over the option `none`."""
    saves_input: bool
    """Whether its graph keeps its input, the boundary before it."""
    saves_output: bool
    """Whether its graph keeps its output, the boundary after it."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f'option "{self.option}" covers {self.length} layers: expected 1 or more')
        for name in ("kept_bytes", "held_bytes", "nanoseconds"):
            if getattr(self, name) < 0:
                raise ValueError(f'option "{self.option}": {name} is {getattr(self, name)}: expected 0 or more')


@dataclass(frozen=True)
class Chain:
    """Layers that run one after the other, with the choices that begin at each.

    Raises:
        ValueError: when the choices cannot cover the layers, or a size makes no sense.
    """

    choices: tuple[tuple[Choice, ...], ...]
    """The choices that begin at each layer `[layers]`; those of one layer differ in option or length."""
    boundary_bytes: tuple[int, ...]
    """Size of each layer's input, and of the last output `[layers + 1]`."""
    head_forward_bytes: int
    """Peak from the last layer's forward to the end of the forward pass, less the bytes that layers keep and hold."""
    head_backward_bytes: int
    """Peak from there to the last layer's backward, less the bytes that layers keep."""
    head_saves_input: bool
    """Whether the head keeps the last boundary, which is then part of the two peaks above."""
    fixed_bytes: int
    """Peak of all that depends on no choice: the optimizer step, the backward of an embedding."""

    def __post_init__(self) -> None:
        layers = len(self.choices)
        if not layers:
            raise ValueError("a chain without layers: expected 1 or more")
        if len(self.boundary_bytes) != layers + 1:
            raise ValueError(f"{len(self.boundary_bytes)} boundaries for {layers} layers: expected {layers + 1}")
        if min(self.boundary_bytes) < 0 or self.fixed_bytes < 0:
            raise ValueError("a boundary or fixed_bytes is less than 0 bytes")
        for layer, choices in enumerate(self.choices):
            _check_layer(layer, choices, layers - layer)
        self._check_cover()
        for most, what in ((self.most_bytes, "bytes"), (self.most_nanoseconds, "nanoseconds")):
            if most >= _MOST:
                raise ValueError(
                    f"the largest choices of all layers add up to {most} {what}: expected less than {_MOST}"
                )

    def choice(self, layer: int, option: str, length: int) -> Choice:
        """The choice that begins at a layer and has this option and length.

        Raises:
            ValueError: when the layer has no such choice.
        """
        for choice in self.choices[layer] if layer < len(self.choices) else ():
            if choice.option == option and choice.length == length:
                return choice
        raise ValueError(f'layer {layer} of {len(self.choices)} has no option "{option}" that covers {length} layers')

    @property
    def most_bytes(self) -> int:
        """A budget that every sequence of choices fits."""
        added = sum(max((c.kept_bytes + c.held_bytes for c in choices), default=0) for choices in self.choices)
        once = [size for choices in self.choices for c in choices for size in (c.forward_bytes, c.backward_bytes)]
        most_once = max(*once, self.head_forward_bytes, self.head_backward_bytes, self.fixed_bytes)
        return added + sum(self.boundary_bytes) + most_once

    @property
    def most_nanoseconds(self) -> int:
        """A time that no sequence of choices exceeds."""
        return sum(max((choice.nanoseconds for choice in choices), default=0) for choices in self.choices)

    def _check_cover(self) -> None:
        reached = {0}
        for layer, choices in enumerate(self.choices):
            if layer in reached:
                reached.update(layer + choice.length for choice in choices)
        if len(self.choices) not in reached:
            stuck = max(reached)
            raise ValueError(f"no sequence of choices covers the layers: none goes on from layer {stuck}")


def _check_layer(layer: int, choices: Sequence[Choice], left: int) -> None:
    known: set[tuple[str, int]] = set()
    for choice in choices:
        if choice.length > left:
            raise ValueError(f'layer {layer}: option "{choice.option}" covers {choice.length} layers, {left} are left')
        if (choice.option, choice.length) in known:
            raise ValueError(f'layer {layer}: option "{choice.option}" for {choice.length} layers is there twice')
        known.add((choice.option, choice.length))


@dataclass(frozen=True)
class Evaluation:
    """The cost of a sequence of choices."""

    nanoseconds: int
    peak_bytes: int
    binding: str
    """Where the peak is: `forward of layer 3`, `backward of layers 4 to 7`, `head` or `fixed`; the first of equals."""


def evaluate(chain: Chain, choices: Sequence[Choice]) -> Evaluation:
    """The cost of a sequence of choices.

    Args:
        chain: the layers, and the costs of the choices.
        choices: from the first layer to the last; only their options and lengths count, the costs are the chain's.

    Raises:
        ValueError: when the choices are not the chain's, or do not cover its layers.
    """
    layer = kept = held = nanoseconds = 0
    lent = 0  # bytes of the boundary before this layer that the choice before saves
    sides = [(chain.fixed_bytes, "fixed")]
    for given in choices:
        choice = chain.choice(layer, given.option, given.length)
        where = f"layer {layer}" if choice.length == 1 else f"layers {layer} to {layer + choice.length - 1}"
        saved = chain.boundary_bytes[layer] if choice.saves_input else 0
        sides.append((kept + held + choice.forward_bytes, f"forward of {where}"))
        sides.append((kept + choice.backward_bytes + max(lent - saved, 0), f"backward of {where}"))
        kept += choice.kept_bytes + max(lent, saved)
        held += choice.held_bytes
        nanoseconds += choice.nanoseconds
        layer += choice.length
        lent = chain.boundary_bytes[layer] if choice.saves_output else 0
    if layer != len(chain.choices):
        raise ValueError(f"the choices cover {layer} of {len(chain.choices)} layers")
    kept += 0 if chain.head_saves_input else lent
    sides.append((kept + held + chain.head_forward_bytes, "head"))
    sides.append((kept + chain.head_backward_bytes, "head"))
    peak_bytes, binding = max(sides, key=lambda side: side[0])
    return Evaluation(nanoseconds, peak_bytes, binding)

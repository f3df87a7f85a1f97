"""Chains of layers to plan checkpoints for: random chains, and every plan of a small one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import strategies as st

from memscope.advisor.plan.planner import Chain, Choice

__all__ = ["every_plan", "in_proportion", "random_chains", "takes", "varied"]


@st.composite
def random_chains(draw: st.DrawFn, most_layers: int = 5, units: tuple[int, ...] = (1, 2**30 + 1)) -> Chain:
    """A few layers with up to three choices each, some of two layers; few different numbers, so that many tie."""
    layers = draw(st.integers(1, most_layers))
    unit = draw(st.sampled_from(units))
    few, time, size = (st.integers(*ends).map(lambda number: number * unit) for ends in ((0, 6), (0, 4), (-2, 12)))

    def choice(name: str, length: int) -> Choice:
        return Choice(
            name,
            length,
            draw(few),
            draw(few),
            draw(size),
            draw(size),
            draw(time),
            draw(st.booleans()),
            draw(st.booleans()),
        )

    choices = []
    for layer in range(layers):
        lengths = [1, *draw(st.lists(st.integers(1, min(2, layers - layer)), max_size=2))]
        choices.append(tuple(choice(f"option {number}", length) for number, length in enumerate(lengths)))
    boundaries = tuple(draw(st.lists(few, min_size=layers + 1, max_size=layers + 1)))
    return Chain(tuple(choices), boundaries, draw(size), draw(size), draw(st.booleans()), draw(few))


def every_plan(chain: Chain, layer: int = 0) -> Iterator[tuple[Choice, ...]]:
    """Every sequence of choices that covers the layers from one on."""
    if layer == len(chain.choices):
        yield ()
        return
    for choice in chain.choices[layer]:
        for rest in every_plan(chain, layer + choice.length):
            yield (choice, *rest)


def takes(chain: Chain, plan: tuple[Choice, ...]) -> tuple[int, int]:
    """Time and peak of a plan, from the constraints in the order of the design."""
    s = e = time = i = 0
    p = False
    left_sides = [chain.fixed_bytes]
    for c in plan:
        boundary = chain.boundary_bytes[i]
        left_sides.append(s + e + c.forward_bytes)
        left_sides.append(s + c.backward_bytes + (boundary if p and not c.saves_input else 0))
        s += c.kept_bytes + (boundary if c.saves_input or p else 0)
        e += c.held_bytes
        time += c.nanoseconds
        i += c.length
        p = c.saves_output
    s += chain.boundary_bytes[i] if p and not chain.head_saves_input else 0
    left_sides += [chain.head_forward_bytes + s + e, chain.head_backward_bytes + s]
    return time, max(left_sides)


def varied(seed: int, *, layers: int, options: int, is_held: bool = True) -> Chain:
    """Layers that all differ: what an option keeps saves time, more or less; some cover two layers."""
    rng = np.random.default_rng(seed)

    def choice(layer: int, number: int) -> Choice:
        length = 2 if number == options - 1 and layer + 2 <= layers else 1
        kept, held = int(rng.integers(0, 1000)), int(rng.integers(0, 400)) if is_held else 0
        time = int((1000 - kept) * rng.uniform(0.5, 1.5)) * length
        local = rng.integers(100, 400, size=2)
        is_saving_input, is_saving_output = (bool(flag) for flag in rng.integers(0, 2, size=2))
        return Choice(
            f"option {number}", length, kept, held, int(local[0]), int(local[1]) + kept, time, is_saving_input,
            is_saving_output,
        )  # fmt: skip

    choices = tuple(tuple(choice(layer, number) for number in range(options)) for layer in range(layers))
    boundaries = tuple(int(size) for size in rng.integers(0, 50, size=layers + 1))
    # Held bytes, about 200 a layer, count at the head's forward only: so that both of its sides may decide.
    return Chain(choices, boundaries, 300, 300 + (100 * layers if is_held else 0), bool(seed % 2), 500)


def in_proportion(layers: int, options: int) -> Chain:
    """Layers that all differ, with times in proportion to the bytes not kept: many plans are nearly the fastest."""
    rng = np.random.default_rng(1)
    choices = []
    for most in rng.integers(200_000_000, 1_000_000_000, size=layers):
        kept = [int(most), 0, *(int(size) for size in rng.integers(0, most, size=options - 2))]
        choices.append(tuple(
            Choice(f"option {number}", 1, size, 0, 0, 0, (int(most) - size) // 100, False, False)
            for number, size in enumerate(kept)
        ))  # fmt: skip
    return Chain(tuple(choices), (0,) * (layers + 1), 0, 0, True, 0)

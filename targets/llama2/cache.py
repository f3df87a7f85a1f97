"""The KV cache: keys and values of the tokens that a model has seen, so that each token passes through it once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Cache", "LayerCache"]

_PADDING = -1


class LayerCache:
    """Keys (after the rotary embedding) and values of one layer, each `[rows, columns, kv_heads, head_dim]`."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens, `[rows, new, kv_heads, head_dim]` each, and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        self.keys, self.values = keys, values
        return keys, values

    def choose(self, rows: Tensor) -> None:
        """Continue with these rows, int64 `[chosen]`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


class Cache:
    """The keys and values of all layers for several rows of tokens. They grow with every token, as in transformers.

    A row that is shorter than others has columns of padding, which no token sees. A column's position is that of its
    token in the row: keys are rotated, so their order does not matter.
    """

    def __init__(self, layers: int) -> None:
        self.layers = [LayerCache() for _ in range(layers)]
        self._positions: list[list[int]] = []
        self._chosen: list[int] | None = None

    def __bool__(self) -> bool:
        """Whether any token has been seen."""
        return bool(self._positions)

    def begin(self, lengths: Sequence[int]) -> None:
        """Note the first tokens: rows of these lengths, padded on the right."""
        longest = max(lengths)
        self._positions = [[*range(length), *[_PADDING] * (longest - length)] for length in lengths]

    def choose(self, rows: list[int]) -> None:
        """The next tokens continue these rows, of which some may be left out and others occur several times."""
        if rows != list(range(len(self._positions))):
            self._positions = [list(self._positions[row]) for row in rows]
            self._chosen = rows

    def grow(self, device: torch.device) -> Tensor:
        """Make room for one more token of each row, and return their positions, int64 `[rows]`."""
        if self._chosen is not None:
            chosen, self._chosen = torch.tensor(self._chosen, device=device), None
            for layer in self.layers:
                layer.choose(chosen)
        new = [max(row) + 1 for row in self._positions]
        for row, position in zip(self._positions, new, strict=True):
            row.append(position)
        return torch.tensor(new, device=device)

    def mask(self, h: Tensor, window: int | None) -> Tensor | None:
        """What to add to the scores of the newest tokens, `[rows, 1, 1, columns]`; None: they see all columns."""
        last = [row[-1] for row in self._positions]
        least = [0 if window is None else max(position - window + 1, 0) for position in last]
        hidden = [[one < low for one in row] for row, low in zip(self._positions, least, strict=True)]
        if not any(map(any, hidden)):
            return None
        places = torch.tensor(hidden, device=h.device)[:, None, None, :]
        return torch.zeros(places.shape, dtype=h.dtype, device=h.device).masked_fill_(places, float("-inf"))

"""How safely a simulated run fits into memory: the room it leaves, against the error known of such predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memscope.analysis.ledger import ledger
from memscope.trace import Trace
from memscope.units import format_bytes, format_part

__all__ = ["CONTEXT_ERROR_BYTES", "KNOWN_ERROR", "RESERVED_ERROR", "Fit", "fit_of"]

RESERVED_ERROR = 0.012
"""Largest known error of predicted reserved memory, as a share of it. Source: docs/accuracy.md, *Reserved memory*: what
`nvidia-smi` showed of Mistral-7B, all weights, 8 samples, was 836 MiB more than predicted from 70,462 MiB reserved."""
CONTEXT_ERROR_BYTES = 1187 * 2**20
"""Largest known error of a device's CUDA context, in bytes. Source: the same section: those runs held 1,690 MiB outside
PyTorch's allocator, of which the device table has 503 MiB."""
KNOWN_ERROR = (
    f"published runs took up to {RESERVED_ERROR:.1%} more reserved memory and {format_bytes(CONTEXT_ERROR_BYTES)} more "
    "CUDA context than predicted with the operators of their PyTorch"
)
"""The known error in words. Between releases of PyTorch, reserved memory differs by up to 8 %: docs/scoreboard.md."""


@dataclass(frozen=True)
class Fit:
    """Whether a simulated run fits into memory, and whether it would if the prediction were off by its known error."""

    needed_bytes: int
    """Reserved memory and, where it is estimated, the CUDA context."""
    available_bytes: int
    """Memory of the device, or a budget."""
    known_error_bytes: int

    @classmethod
    def of(cls, reserved_bytes: int, needed_bytes: int, available_bytes: int) -> Fit:
        """The fit of a run with these reserved bytes. `needed_bytes` beyond them are an estimate of the context."""
        context = CONTEXT_ERROR_BYTES if needed_bytes > reserved_bytes else 0
        return cls(needed_bytes, available_bytes, int(RESERVED_ERROR * reserved_bytes) + context)

    @property
    def fits(self) -> bool:
        """Whether the predicted memory fits."""
        return self.needed_bytes <= self.available_bytes

    @property
    def is_safe(self) -> bool:
        """Whether the predicted memory fits, and the known error too."""
        return self.needed_bytes + self.known_error_bytes <= self.available_bytes

    @property
    def verdict(self) -> str:
        """In words: "fits", "fits, but within the known error of 1.52 GiB", or "does not fit"."""
        if not self.fits:
            return "does not fit"
        return "fits" if self.is_safe else f"fits, but within the known error of {format_bytes(self.known_error_bytes)}"

    def __str__(self) -> str:
        return f"{self.verdict}: {format_part(self.needed_bytes, self.available_bytes)}; {KNOWN_ERROR}"

    def document(self) -> dict[str, Any]:
        """As JSON values, sizes in bytes."""
        return {
            "fits": self.fits,
            "safe": self.is_safe,
            "needed": self.needed_bytes,
            "available": self.available_bytes,
            "known_error": self.known_error_bytes,
        }


def fit_of(trace: Trace, available_bytes: int | None = None) -> Fit | None:
    """The fit of a simulated run into a budget, or into the memory of its device.

    None for a measured run, for a device without a caching allocator, and for one whose memory is not limited.
    """
    available = trace.meta.get("capacity") if available_bytes is None else available_bytes
    found = ledger(trace)
    match trace.meta.get("device"):
        case {"simulated": True} if found is not None and available is not None:
            reserved, device = found.total("reserved"), found.total("device")
            assert reserved is not None
            return Fit.of(reserved, reserved if device is None else device, available)
    return None

"""What the labels in a history say of its blocks: those that memscope's recorder attaches while it records.

See `memscope.hooks.labels`. A block that was allocated outside of operators has no label, nor has one that is older
than the recording, unless a later label says what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memscope.exchange.device_history import DeviceHistory
from memscope.exchange.inference import Course
from memscope.hooks.labels import read_label
from memscope.trace import CATEGORIES, PHASES, Ints

__all__ = ["Told", "told_by"]

_SETUP = PHASES.index("setup")


@dataclass(frozen=True, eq=False)
class Told:
    """What labels say, of the events and blocks of a history."""

    course: Course
    """Where the run was at each event: where the last label before it says."""
    category: Ints
    """Category of each block; -1: no label tells it `[blocks]`."""
    op: list[str | None]
    module: list[str | None]
    """Operator and module of each block; None: no label tells it."""

    def lacks(self) -> list[str]:
        """The columns of the trace that labels do not tell of every block."""
        columns = {"category": (self.category < 0).any(), "module": None in self.module, "op": None in self.op}
        return [name for name, lacks in columns.items() if lacks]


def told_by(history: DeviceHistory) -> Told | None:
    """Read the labels of a history; None if it has none."""
    blocks, entries = history.blocks, history.entries
    if not any(read_label(entry.get("user_metadata")) for entry in entries):
        return None
    category = np.full(len(blocks.entry), -1, dtype=np.int64)
    # The memory that was there when the recording began was made by no operator.
    op: list[str | None] = ["" if entry < 0 else None for entry in blocks.entry.tolist()]
    module: list[str | None] = [None] * len(op)
    born = {entry: row for row, entry in enumerate(blocks.entry.tolist()) if entry >= 0}
    alive = {address: row for row, address in enumerate(blocks.address.tolist()) if blocks.entry[row] < 0}
    places = np.empty((len(entries), 3), dtype=np.int64)
    place = (_SETUP, -1, 0)
    for number, entry in enumerate(entries):
        label = read_label(entry.get("user_metadata"))
        row = born.get(number)
        if row is not None:
            alive[entry["addr"]] = row
        if "op" in label:
            place = PHASES.index(label["phase"]), label["step"], label["micro_batch"]
            if row is not None:
                op[row], module[row] = label["op"], label["module"]
        elif "category" in label and entry["action"] == "annotate" and entry["addr"] in alive:
            row = alive[entry["addr"]]
            category[row], module[row] = CATEGORIES.index(label["category"]), label["module"]
        places[number] = place
    of_events = np.vstack([places, [_SETUP, -1, 0]])[blocks.event_entry]
    return Told(Course(*of_events.T), category, op, module)

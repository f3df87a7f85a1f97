"""Make a file for `tests/golden` from a memory snapshot of a GPU, taken by anyone.

    python benchmarks/golden_from_snapshot.py snapshot.pickle tests/golden/gpu-name.npz \
        --source REPOSITORY/PATH@COMMIT --licence MIT --torch 2.6

Most histories begin with a model in memory. The initial state is derived backwards from the final state, and entries
that create it precede the recorded ones: they allocate each segment, split it into blocks, and free the blocks that
were free, in `about["began"]` events. Stacks, times, and all other data unrelated to memory are omitted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_report import ACTIONS, write_history

from memscope.allocator.recorded import Entry, RecordedBlocks
from memscope.allocator.settings import SMALL_SEGMENT, SMALL_SIZE
from memscope.errors import MemscopeError, UsageError
from memscope.exchange.device_history import read_device, segments_before
from memscope.exchange.layout import read_layout
from memscope.exchange.plain_pickle import read_plain_pickle


def golden_of(data: Any, device: int) -> tuple[list[Entry], dict[str, Any]]:
    """Return the entries of a golden file and their description, from the content of a snapshot.

    Raises:
        UsageError: a replay cannot be compared with the history.
    """
    snapshot = read_layout(data)
    known = read_device(snapshot, device, lambda *_: None)
    actions = [entry["action"] for entry in known.entries]
    if known.size_differences or len(known.notes) > any("before the history began" in note for note in known.notes):
        raise UsageError(f"the history is incomplete: {'; '.join(known.notes)}")
    if "oom" in actions or actions.count("free_requested") != actions.count("free_completed"):
        raise UsageError(
            "the history runs out of memory, or has frees that wait for a stream: golden files support neither"
        )
    before = segments_before(snapshot, device)
    if any(segment["is_expandable"] for segment in before):
        raise UsageError("the history begins with expandable segments: their growth before the history is unknown")
    streams = {segment["address"]: segment["stream"] for segment in data["segments"] if segment["device"] == device}
    for entry in reversed(known.entries):
        if entry["action"] == "segment_free":
            streams[entry["addr"]] = entry["stream"]
    first = leading_to([{**segment, "stream": streams[segment["address"]]} for segment in before])
    return [*first, *map(dict, known.entries)], {
        "began": sum(entry["action"] in ("alloc", "free_completed") for entry in first),
        "cases": [{"settings": snapshot.settings.get("PYTORCH_CUDA_ALLOC_CONF", "")}],
        "measured": {"allocated": _peak_allocated(known.blocks), "reserved": known.blocks.peak_reserved},
    }


def leading_to(segments: Sequence[Entry]) -> list[Entry]:
    """Return requests that lead an empty allocator, with PyTorch's default settings, to these segments.

    For each segment, a request of its size creates it and is freed. The segment is then filled to its end, so that the
    next one must be created. Blocks that were free are freed last.
    """
    entries: list[Entry] = []
    unused: list[Entry] = []
    for segment in segments:
        at, stream, size = segment["address"], segment["stream"], segment["total_size"]
        most = SMALL_SIZE if size == SMALL_SEGMENT else size  # largest request that the segment can serve
        entries += [_entry("segment_alloc", at, size, stream), _entry("alloc", at, most, stream)]
        entries.append(_entry("free_completed", at, most, stream))
        for block in segment["blocks"]:
            end = at + block["size"]
            while at < end:
                part = min(end - at, most)
                entries.append(_entry("alloc", at, part, stream))
                if block["state"] == "inactive":
                    unused.append(_entry("free_completed", at, part, stream))
                at += part
    return entries + unused


def _entry(action: str, address: int, size: int, stream: int) -> Entry:
    return {"action": action, "addr": address, "size": size, "stream": stream}


def _peak_allocated(blocks: RecordedBlocks) -> int:
    change = np.zeros(len(blocks.event_entry), dtype=np.int64)
    ends = blocks.freed >= 0
    change[blocks.born] = blocks.size
    change[blocks.freed[ends]] = -blocks.size[ends]
    return int(change.cumsum().max(initial=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snapshot", type=Path)
    parser.add_argument("golden", type=Path)
    parser.add_argument("--source", required=True, help="published location of the snapshot: repository, path, commit")
    parser.add_argument("--licence", required=True, help="licence of the repository, which must be permissive")
    parser.add_argument(
        "--torch", required=True, help="version of PyTorch that wrote the snapshot, and how it is known"
    )
    parser.add_argument("--gpu", default="a GPU that is not named", help="name of the GPU (default: %(default)s)")
    parser.add_argument("--device", type=int, default=0, help="index of the GPU in the snapshot (default: %(default)s)")
    options = parser.parse_args()
    try:
        entries, about = golden_of(read_plain_pickle(options.snapshot), options.device)
    except MemscopeError as error:
        parser.error(str(error))
    about |= {
        "source": f"{options.source}: a memory snapshot, reduced to sizes, addresses and streams",
        "licence": options.licence,
        "torch": options.torch,
        "device": options.gpu,
        "driver_addresses": tuple(map(int, options.torch.split()[0].split(".")[:2])) < (2, 12),
    }
    write_history(options.golden, [entry for entry in entries if entry["action"] in ACTIONS], about)
    print(f"{options.golden}: {len(entries):,} entries, {options.golden.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""The ledger of a measured run: from the tensors to the memory the driver counts, with the unexplained rest."""

import dataclasses

import pytest
from histories import BASE, MIB, Script, block, segment

from memscope.analysis.ledger import ledger
from memscope.gpu.nvml import DriverMemory

GIB = 2**30


def measured(before, after):
    """A run that began with 20 MiB reserved, of which it used 1000 bytes, and ended with 42 MiB."""
    script = Script(before=[segment(block(20 * MIB, "inactive"))])
    with script.op("aten.mm.default"):
        script.entry("segment_alloc", BASE + 64 * MIB, 22 * MIB)
        script.alloc(BASE, 1000)
    ended = [segment(block(20 * MIB)), segment(block(22 * MIB), address=BASE + 64 * MIB)]
    trace = script.trace(after=ended)
    driver = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
    return dataclasses.replace(trace, meta={**trace.meta, "driver": driver, "reserved_before": 20 * MIB})


KNOWN = (
    DriverMemory(80 * GIB, 600 * MIB, 520 * MIB, 80 * MIB),
    DriverMemory(80 * GIB, 700 * MIB, 612 * MIB, 88 * MIB),
)


def test_every_level_from_the_tensors_to_the_driver_has_a_line():
    found = ledger(measured(*KNOWN))
    # The context took 520 - 20 MiB before the first step; at the end the process has 612 MiB, 42 of them reserved.
    assert [(line.name, line.added, line.total) for line in found.lines] == [
        ("requested", 1000, 1000),
        ("allocated", 24, 1024),
        ("reserved", 42 * MIB - 1024, 42 * MIB),
        ("context", 500 * MIB, 542 * MIB),
        ("unexplained", 70 * MIB, 612 * MIB),
        ("device", 0, 612 * MIB),
        ("others", 88 * MIB, 700 * MIB),
    ]
    assert found.note == ""
    assert not any(line.estimate for line in found.lines)


def test_an_unidentified_process_is_counted_with_the_others_and_the_ledger_says_so():
    unknown = [DriverMemory(d.total_bytes, d.used_bytes, reason="in a container") for d in KNOWN]
    found = ledger(measured(*unknown))
    assert found["device"].total == 700 * MIB
    assert found["device"].seen_in == "nvidia-smi, of all processes together"
    assert found.total("others") is None
    assert "in a container" in found.note


@pytest.mark.parametrize("before", [KNOWN[0], DriverMemory(reason="no library")])
def test_without_the_driver_the_ledger_ends_with_reserved_memory_and_says_why(before):
    found = ledger(measured(before, DriverMemory(reason="no library")))
    assert [line.name for line in found.lines] == ["requested", "allocated", "reserved"]
    assert found.total("device") is None
    assert "no library" in found.note

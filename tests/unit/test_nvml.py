"""Memory counted by the driver, and the reason if it cannot be queried. An object with its functions replaces it."""

import sys
from types import SimpleNamespace

import pytest

from memscope.gpu.nvml import DriverMemory, driver_memory

GIB = 2**30


class NVMLError(Exception):
    pass


class Driver:
    """`processes` maps process ids to bytes; `fails` names the functions that raise."""

    NVMLError = NVMLError
    nvmlMemory_v2 = 2  # noqa: N815

    def __init__(self, processes=None, fails=()):
        self.processes, self.fails, self.open, self.asked = processes or {}, fails, 0, []

    def _called(self, name):
        if name in self.fails:
            raise NVMLError(f"{name}: Insufficient Permissions")

    def nvmlInit(self):  # noqa: N802
        self._called("nvmlInit")
        self.open += 1

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self._called("nvmlDeviceGetHandleByUUID")
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):  # noqa: N802
        self._called("nvmlDeviceGetMemoryInfo")
        if version and "version" in self.fails:
            raise NVMLError("Argument version mismatch")
        return SimpleNamespace(total=80 * GIB, used=10 * GIB if version else 11 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        self._called("nvmlDeviceGetComputeRunningProcesses")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in self.processes.items()]


def test_this_process_and_the_others_are_counted_separately():
    driver = Driver({41: 7 * GIB, 42: 3 * GIB})
    assert driver_memory("abc", 41, driver) == DriverMemory(80 * GIB, 10 * GIB, 7 * GIB, 3 * GIB)
    assert driver.asked == ["GPU-abc"]
    assert driver.open == 0, "NVML is shut down again"


def test_without_a_process_id_it_is_this_process(monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 42)
    assert driver_memory("abc", library=Driver({42: 10 * GIB})).process_bytes == 10 * GIB


@pytest.mark.parametrize("uuid", ["GPU-abc", "MIG-abc"])
def test_a_complete_identifier_is_passed_on_unchanged(uuid):
    driver = Driver()
    driver_memory(uuid, 1, driver)
    assert driver.asked == [uuid]


def test_an_older_driver_is_queried_by_the_older_function():
    assert driver_memory("abc", 41, Driver({41: GIB}, fails=("version",))).used_bytes == 11 * GIB


def test_a_process_the_driver_does_not_list_is_not_known_but_the_device_is():
    found = driver_memory("abc", 7, Driver({41: 10 * GIB}))
    assert (found.used_bytes, found.process_bytes, found.others_bytes) == (10 * GIB, None, None)
    assert "does not list process 7" in found.reason
    assert "container" in found.reason


def test_a_process_without_a_reported_size_is_unknown():
    found = driver_memory("abc", 41, Driver({41: None}))
    assert found.process_bytes is None
    assert "each process" in found.reason


def test_without_permission_to_list_processes_the_device_is_still_known():
    found = driver_memory("abc", 41, Driver(fails=("nvmlDeviceGetComputeRunningProcesses",)))
    assert (found.total_bytes, found.process_bytes) == (80 * GIB, None)
    assert "Insufficient Permissions" in found.reason


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo"])
def test_a_driver_that_does_not_answer_gives_a_reason_not_an_error(function):
    driver = Driver({41: GIB}, fails=(function,))
    found = driver_memory("abc", 41, driver)
    assert found == DriverMemory(reason=found.reason)
    assert function in found.reason
    assert driver.open == 0


def test_without_the_package_the_reason_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    found = driver_memory("abc", 41)
    assert found.total_bytes is None
    assert "nvidia-ml-py" in found.reason


def test_an_outdated_package_gives_a_reason_not_an_error():
    library = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None)
    assert "nvmlDeviceGetHandleByUUID" in driver_memory("abc", 41, library).reason

"""Devices that can be simulated, with their properties, from `devices.toml` or a user's file of the same format."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from memscope.allocator.settings import MIN_BLOCK
from memscope.errors import UsageError, excerpt, nearest
from memscope.trace import read_whole
from memscope.units import format_bytes, parse_budget

__all__ = ["DTYPES", "Device", "all_devices", "get_device", "load_devices"]

DTYPES = ("fp32", "tf32", "fp16", "bf16")
"""Kinds of arithmetic with a peak rate; tf32 is fp32 data on TensorFloat-32 tensor cores."""

_MOST_BYTES, _LONGEST_LINE, _LONGEST_NAME = 2**17, 1000, 60
"""Upper bounds on a file's bytes (the built-in devices take 22 KB), and on the characters of a line and a name. tomllib
takes time that grows with the square of the parts of a dotted key, which cannot continue on another line."""

_UNIFIED = re.compile(
    r"\bgb10\b|dgx[-_ ]?spark|\b(agx|jetson|orin|thor|xavier)\b|\b(apple|mps)\b|\bm[1-9]([-_ ]?(pro|max|ultra))?\b"
    r"|\bmi300a\b|strix[-_ ]?halo"
)
"""Names of devices whose memory the CPU and the GPU share."""


@dataclass(frozen=True)
class Device:
    """A model of device, as PyTorch sees it. `sources` gives the source of each figure by field name."""

    name: str
    """Name in memscope's commands, such as `a100-40gb`."""
    vendor_name: str
    """Name that the driver reports, such as `NVIDIA A100-SXM4-40GB`."""
    kind: Literal["cuda", "cpu"]
    """Type of the device in PyTorch, which selects the rules to simulate."""
    capability: tuple[int, int]
    """CUDA compute capability (major, minor); (0, 0) for a CPU."""
    capacity_bytes: int | None
    """`torch.cuda.get_device_properties().total_memory`; None: no limit."""
    multiprocessors: int
    """Streaming multiprocessors; 0 for a CPU."""
    bandwidth_bytes_per_second: float | None
    """Peak bandwidth of the device's memory; None: unknown."""
    peak_flops_per_second: Mapping[str, float] = field(hash=False)
    """Dense peak rate by kind of arithmetic (see `DTYPES`); no entry: no fast path, or no figure."""
    context_bytes: int
    """Estimated bytes of a process's CUDA context and libraries, which lie outside PyTorch's allocator."""
    sources: Mapping[str, str] = field(hash=False)
    """Field name → source of its figure."""
    measured_bandwidth_bytes_per_second: float | None = None
    """Bandwidth measured with programs that only move data; None: no figure."""
    measured_flops_per_second: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Rate measured with large matrix products in PyTorch, by kind of arithmetic; no entry: no figure."""
    host_bytes_per_second: float | None = None
    """Rate measured for copies between the device and pinned host memory, in one direction; None: no figure."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with dicts in place of the read-only mappings, which cannot be pickled."""
        values = (getattr(self, one.name) for one in fields(self))
        return type(self), tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    @property
    def allocatable_bytes(self) -> int | None:
        """Bytes available to PyTorch's allocator if no other process uses the device: an estimate."""
        return None if self.capacity_bytes is None else self.capacity_bytes - self.context_bytes

    @property
    def memory_bytes_per_second(self) -> float | None:
        """Expected memory bandwidth: the measured one or, without a measurement, the peak; None: unknown."""
        return self.measured_bandwidth_bytes_per_second or self.bandwidth_bytes_per_second

    def flops_per_second(self, kind: str) -> float | None:
        """Return the expected rate of a kind of arithmetic: measured or, without a measurement, peak; None: unknown."""
        return self.measured_flops_per_second.get(kind) or self.peak_flops_per_second.get(kind)

    @property
    def round_size(self) -> Callable[[int], int] | None:
        """Function from requested bytes to the bytes of the allocation, before blocks are split; None: no rounding."""
        return _whole_blocks if self.kind == "cuda" else None


def all_devices() -> tuple[Device, ...]:
    """Return the built-in devices, in the order of `devices.toml`: `gpu` and `cpu` first."""
    return tuple(_built_in().values())


def get_device(name: str, added: Mapping[str, Device] | None = None) -> Device:
    """Return the device called `name`, ignoring case, from the built-in devices and `added`.

    `a100-40gb:28GiB` is that device with 28 GiB of memory.

    Raises:
        UsageError: no device has this name, and the message offers the nearest one or, for a device with unified
            memory, says why there is none; or the memory after the colon is no size, or too small for the CUDA context.
    """
    name, colon, memory = name.partition(":")
    if colon:
        whole, capacity_bytes = get_device(name, added), parse_budget(memory)
        if capacity_bytes <= whole.context_bytes:
            raise UsageError(
                f'device "{name}:{memory}": its CUDA context alone takes {format_bytes(whole.context_bytes)}, so give '
                "it more memory than that"
            )
        return replace(whole, capacity_bytes=capacity_bytes)
    devices = {**_built_in(), **(added or {})}
    wanted = name.strip().lower()
    found = devices.get(wanted)
    if found is None and _UNIFIED.search(wanted):
        raise UsageError(
            f'device "{name}" cannot be simulated: its memory is unified, that is, shared by CPU and GPU. How much of '
            "it PyTorch gets depends on the operating system and on other programs, so no capacity would be true. "
            'Choose a device with memory of its own ("memscope devices" lists them), or give such a device the memory '
            "that you expect to be free, for example rtx5090:90GiB; its kernels may take other workspaces"
        )
    if found is None:
        more = '"memscope devices" lists them all; a TOML file adds your own'
        raise UsageError(f'there is no device "{name}": {nearest(wanted, devices)}. {more}')
    return found


def load_devices(path: Path) -> dict[str, Device]:
    """Read a user's TOML file, and return its devices by name: one table each, with the keys of `devices.toml`.

    `vendor_name`, `capability`, `capacity_bytes` and `multiprocessors` are required. `context_bytes` defaults to 0.
    Without the rates of memory and of fp32, there are no time estimates.

    Raises:
        UsageError: the file cannot be read, is not TOML, holds no device, or names a built-in device; or a field is
            missing or unknown, or its value is out of range. The message names the file, device, field and value, and
            the expected value.
    """
    devices = _read(path, required=("vendor_name", "capability", "capacity_bytes", "multiprocessors"))
    taken = sorted(devices.keys() & {*_built_in(), "cuda"})
    if taken:
        raise UsageError(f'{path}: memscope already has a device "{taken[0]}": choose another name')
    return devices


@cache
def _built_in() -> dict[str, Device]:
    return _read(Path(__file__).with_name("devices.toml"), required=("vendor_name",))


def _whole_blocks(size_bytes: int) -> int:
    return -(-size_bytes // MIN_BLOCK) * MIN_BLOCK


def _read(path: Path, required: tuple[str, ...]) -> dict[str, Device]:
    try:
        text = read_whole(path, _MOST_BYTES).decode()
        for number, line in enumerate(text.splitlines(), start=1):
            if len(line) > _LONGEST_LINE:
                raise UsageError(f"{path}: line {number} of the device file has more than {_LONGEST_LINE} characters")
        tables = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: the device file cannot be read: {error.strerror}") from error
    except RecursionError:
        raise UsageError(f"{path}: the device file is not usable: its values are nested too deep") from None
    except ValueError as error:  # TOMLDecodeError, UnicodeDecodeError, and a number of thousands of digits
        raise UsageError(f"{path}: the device file is not valid TOML: {error}") from error
    if not tables:
        raise UsageError(f"{path}: the file holds no device: expected one table per device, such as [my-gpu]")
    return {name: _Table(path, name, table, required).device() for name, table in tables.items()}


@dataclass(frozen=True)
class _Table:
    """The table of one device in a file. Errors of its methods name the file, device and field."""

    path: Path
    name: str
    table: Any
    required: tuple[str, ...]

    def device(self) -> Device:
        if not isinstance(self.table, dict):
            name = excerpt(self.name)
            raise UsageError(f'{self.path}: "{name}" = {_quoted(self.table)}: expected a device table, [{name}]')
        if len(self.name) > _LONGEST_NAME or not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", self.name):
            expected = f"lowercase letters, digits, - and ., {_LONGEST_NAME} in all"
            raise UsageError(f'{self.path}: device name "{excerpt(self.name)}": expected {expected}')
        known = set(Device.__dataclass_fields__) - {"name"}
        for key in self.table:
            if key not in known:
                raise UsageError(
                    f'{self.path}: device "{self.name}" has no field "{excerpt(key)}": {nearest(key, known)}'
                )
        for key in self.required:
            if key not in self.table:
                raise UsageError(f'{self.path}: device "{self.name}": {key} is missing: expected {_EXPECTED[key]}')
        kind = self.table.get("kind", "cuda")
        if kind not in ("cuda", "cpu"):
            raise self.wrong("kind", kind, '"cuda" or "cpu"')
        capacity_bytes = self.whole("capacity_bytes", 2**28, 2**44)
        context_bytes = self.whole("context_bytes", 0, 2**33) or 0
        if capacity_bytes is not None and context_bytes >= capacity_bytes:
            raise self.wrong("context_bytes", context_bytes, f"less than capacity_bytes, {capacity_bytes}")
        return Device(
            name=self.name,
            vendor_name=self.text("vendor_name"),
            kind=kind,
            capability=self.capability() if kind == "cuda" else (0, 0),
            capacity_bytes=capacity_bytes,
            multiprocessors=self.whole("multiprocessors", 1, 1024) or 0,
            bandwidth_bytes_per_second=self.rate("bandwidth_bytes_per_second", self.table, 1e9, 1e14),
            peak_flops_per_second=MappingProxyType(self.flops("peak_flops_per_second")),
            context_bytes=context_bytes,
            sources=MappingProxyType(self.sources(known)),
            measured_bandwidth_bytes_per_second=self.rate("measured_bandwidth_bytes_per_second", self.table, 1e9, 1e14),
            measured_flops_per_second=MappingProxyType(self.flops("measured_flops_per_second")),
            host_bytes_per_second=self.rate("host_bytes_per_second", self.table, 1e8, 1e13),
        )

    def text(self, key: str) -> str:
        value = self.table[key]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(key, value, _EXPECTED[key])
        return value

    def whole(self, key: str, least: int, most: int) -> int | None:
        value = self.table.get(key)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise self.wrong(key, value, f"{_EXPECTED[key]}, from {least} to {most}")
        return value

    def rate(self, key: str, table: Mapping[str, Any], least: float, most: float) -> float | None:
        value = table.get(key)
        if value is not None and (type(value) not in (int, float) or not least <= value <= most):
            raise self.wrong(key, value, f"a number from {least:g} to {most:g}")
        return None if value is None else float(value)

    def capability(self) -> tuple[int, int]:
        value = self.table.get("capability")
        match = re.fullmatch(r"(\d{1,2})\.(\d)", value) if isinstance(value, str) else None
        if match is None or int(match[1]) < 5:
            raise self.wrong("capability", value, _EXPECTED["capability"])
        return int(match[1]), int(match[2])

    def flops(self, field_name: str) -> dict[str, float]:
        table = self.table.get(field_name, {})
        if not isinstance(table, dict):
            raise self.wrong(field_name, table, f"a table with keys among {', '.join(DTYPES)}")
        for key in table:
            if key not in DTYPES:
                raise self.wrong(f"{field_name}.{key}", table[key], f"one of {', '.join(DTYPES)}")
        rates = {key: self.rate(key, table, 1e9, 1e17) for key in table}
        return {key: value for key, value in rates.items() if value is not None}

    def sources(self, known: set[str]) -> dict[str, str]:
        table = self.table.get("sources", {})
        if not isinstance(table, dict) or not all(isinstance(text, str) for text in table.values()):
            raise self.wrong("sources", table, "a table of strings, one per figure")
        for key in table:
            if key not in known:
                raise self.wrong(f"sources.{key}", table[key], f"a field name: {nearest(key, known)}")
        return dict(table)

    def wrong(self, key: str, value: object, expected: str) -> UsageError:
        return UsageError(f'{self.path}: device "{self.name}": {excerpt(key)} = {_quoted(value)}: expected {expected}')


def _quoted(value: object) -> str:
    return f"'{excerpt(value)}'" if isinstance(value, str) else excerpt(value)


_EXPECTED = {
    "vendor_name": "the name that the driver reports for the device, as a string",
    "capability": 'the compute capability as a string, such as "8.0"',
    "capacity_bytes": "torch.cuda.get_device_properties().total_memory, a whole number of bytes",
    "multiprocessors": "a whole number of streaming multiprocessors",
    "context_bytes": "a whole number of bytes",
}

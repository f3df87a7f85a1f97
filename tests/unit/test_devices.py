"""The catalogue of simulated devices, and errors in device files."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from memscope.errors import UsageError
from memscope.simulation.devices.catalogue import DTYPES, Device, all_devices, get_device, load_devices

GIB = 2**30
MINE = """
[my-gpu]
vendor_name = "My GPU"
capability = "9.0"
capacity_bytes = 51_539_607_552
multiprocessors = 96
"""


def file_with(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "devices.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str) -> str:
    """The error message for an invalid device file; it names the file, and the exit code is 2."""
    path = file_with(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        load_devices(path)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert str(path) in message
    return message.replace(str(path), "FILE")


def test_the_catalogue_has_these_devices_in_this_order() -> None:
    assert [device.name for device in all_devices()] == [
        "gpu", "cpu", "rtx3090", "rtx4090", "rtx5090", "a10g", "a40", "a6000", "l4", "l40s", "t4", "p100-16gb",
        "v100-16gb", "v100-32gb", "a100-40gb", "a100-80gb", "h100-80gb", "h100-nvl", "h200-141gb", "b200",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "printed_gib"),
    [
        # "GPU 0 has a total capacity of ...": out-of-memory messages in public issues, printed to two decimals.
        ("rtx4090", 23.64),  # ali-vilab/VGen 104
        ("a10g", 22.06),
        ("l4", 22.03),
        ("t4", 14.75),  # hpcaitech/Open-Sora 697
        ("p100-16gb", 15.89),
        ("v100-16gb", 15.77),
        ("v100-32gb", 31.73),
        ("a100-40gb", 39.39),
        ("a100-80gb", 79.26),
        ("h100-80gb", 79.11),  # vllm-project/vllm 27508
        ("h200-141gb", 139.80),
        ("rtx3090", 23.69),
        ("rtx5090", 31.36),  # 31.37 in Wan-Video/Wan2.1 465: it varies with the driver
        ("a6000", 47.54),
        ("l40s", 44.39),
        ("h100-nvl", 93.09),
        ("b200", 178.36),
        ("a40", 45_416 / 1024),  # the MiB of PyTorch's printed device properties
    ],
)
def test_capacity_equals_the_capacity_in_pytorchs_out_of_memory_message(name: str, printed_gib: float) -> None:
    capacity = get_device(name).capacity_bytes
    assert capacity is not None
    assert capacity / GIB == pytest.approx(printed_gib, abs=0.0055)


def test_every_figure_of_every_gpu_names_its_source() -> None:
    figures = {"capacity_bytes", "capability", "multiprocessors", "context_bytes"}
    figures |= {"bandwidth_bytes_per_second", "peak_flops_per_second", "host_bytes_per_second"}
    figures |= {"measured_bandwidth_bytes_per_second", "measured_flops_per_second"}
    gpus = [device for device in all_devices() if device.capacity_bytes is not None]
    assert len(gpus) == 18
    for device in gpus:
        assert set(device.sources) == figures, device.name
        assert all(len(text) > 5 for text in device.sources.values()), device.name


def test_the_figures_of_a_device_are_consistent() -> None:
    for device in all_devices():
        if device.capacity_bytes is None:
            continue
        digits = [int(part) for part in device.name.replace("gb", "").split("-") if part.isdigit()]
        assert not digits or 0.92 < device.capacity_bytes / (digits[0] * GIB) < 1.0, device.name
        assert 90 * 2**20 < device.context_bytes < 750 * 2**20, device.name
        peaks = device.peak_flops_per_second
        assert set(peaks) <= set(DTYPES)
        # Volta has the first tensor cores, Ampere the first with tf32 and bf16.
        assert ("bf16" in peaks) == ("tf32" in peaks) == (device.capability >= (8, 0)), device.name
        assert peaks["fp16"] >= 1.9 * peaks["fp32"], device.name


def test_a_peak_rate_follows_from_cores_and_clock() -> None:
    # A100: 108 SMs, 64 fp32 units each, a multiply and an add per cycle at 1.41 GHz; tensor cores do 16 times that.
    fp32 = 108 * 64 * 2 * 1.41e9
    peaks = get_device("a100-40gb").peak_flops_per_second
    assert peaks["fp32"] == pytest.approx(fp32, rel=0.01)
    assert peaks["bf16"] == pytest.approx(16 * fp32, rel=0.01)


def test_bandwidth_follows_from_bus_and_clock() -> None:
    # T4: 256 bits at 5001 MHz, two transfers a cycle (deviceQuery). A100-40GB: 5120 bits at 1215 MHz.
    assert get_device("t4").bandwidth_bytes_per_second == pytest.approx(256 / 8 * 2 * 5001e6, rel=0.01)
    assert get_device("a100-40gb").bandwidth_bytes_per_second == pytest.approx(5120 / 8 * 2 * 1215e6, rel=0.01)


def test_the_allocator_gets_the_capacity_without_the_context() -> None:
    device = get_device("a100-40gb")
    assert device.allocatable_bytes == 42_298_834_944 - 501 * 2**20


def test_the_gpu_without_a_name_is_an_ampere_without_a_limit() -> None:
    device = get_device("gpu")
    assert (device.kind, device.capability) == ("cuda", (8, 0))
    assert (device.capacity_bytes, device.allocatable_bytes) == (None, None)


def test_only_a_gpu_rounds_allocations() -> None:
    assert get_device("cpu").round_size is None
    rounds = get_device("t4").round_size
    assert rounds is not None
    assert [rounds(size) for size in (0, 1, 512, 513, 4_000_000)] == [0, 512, 512, 1024, 4_000_256]


def test_names_are_read_in_any_case() -> None:
    assert get_device(" A100-40GB ").name == "a100-40gb"


@pytest.mark.parametrize(("given", "meant"), [("a100-40", "a100-40gb"), ("rtx-4090", "rtx4090"), ("h100", "h100-80gb")])
def test_an_unknown_device_gets_the_nearest_name(given: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f'there is no device "{given}": did you mean "{meant}"?'):
        get_device(given)


def test_mi300x_is_absent_and_the_error_lists_the_devices() -> None:
    with pytest.raises(UsageError, match=r'no device "mi300x": .*Valid: a100-40gb, .*v100-32gb\. "memscope devices"'):
        get_device("mi300x")


@pytest.mark.parametrize("name", ["gb10", "DGX-Spark", "m3-max", "jetson-orin", "mps"])
def test_unified_memory_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match=rf'device "{name}" cannot be simulated: its memory is unified'):
        get_device(name)


def test_a_file_adds_a_device(tmp_path: Path) -> None:
    rates = "bandwidth_bytes_per_second = 3e12\npeak_flops_per_second = { bf16 = 8e14 }\n"
    added = load_devices(file_with(tmp_path, MINE + rates + 'sources = { capability = "mine" }\n'))
    assert list(added) == ["my-gpu"]
    assert get_device("my-gpu", added) == Device(
        name="my-gpu", vendor_name="My GPU", kind="cuda", capability=(9, 0), capacity_bytes=48 * GIB,
        multiprocessors=96, bandwidth_bytes_per_second=3e12, peak_flops_per_second={"bf16": 8e14}, context_bytes=0,
        sources={"capability": "mine"},
    )  # fmt: skip
    with pytest.raises(UsageError, match="there is no device"):
        get_device("my-gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("capacity_bytes = 51_539_607_552", ""),
            "capacity_bytes is missing: expected torch.cuda.get_device_properties",
        ),
        (
            ("51_539_607_552", "48"),
            "capacity_bytes = 48: expected torch.cuda.get_device_properties().total_memory, a whole",
        ),
        (("51_539_607_552", '"48GB"'), "capacity_bytes = '48GB': expected"),
        (("51_539_607_552", "5.1e10"), "capacity_bytes = 51000000000.0: expected"),
        (("51_539_607_552", "true"), "capacity_bytes = True: expected"),
        (('"9.0"', "9.0"), 'capability = 9.0: expected the compute capability as a string, such as "8.0"'),
        (('"9.0"', '"sm90"'), "capability = 'sm90': expected"),
        (('"9.0"', '"3.5"'), "capability = '3.5': expected"),
        (("96", "0"), "multiprocessors = 0: expected a whole number of streaming multiprocessors, from 1 to 1024"),
        (('"My GPU"', '""'), "vendor_name = '': expected the name that the driver reports for the device"),
        (("multiprocessors", "multiprocesors"), 'has no field "multiprocesors": did you mean "multiprocessors"?'),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert MINE.replace(*change) != MINE
    colon = "" if message.startswith("has") else ":"
    assert f'FILE: device "my-gpu"{colon} {message}' in refused(tmp_path, MINE.replace(*change))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bandwidth_bytes_per_second = 900", "bandwidth_bytes_per_second = 900: expected a number from 1e+09 to 1e+14"),
        ("bandwidth_bytes_per_second = nan", "bandwidth_bytes_per_second = nan: expected a number from 1e+09 to 1e+14"),
        ("peak_flops_per_second = { fp32 = -1.0 }", "fp32 = -1.0: expected a number from 1e+09 to 1e+17"),
        (
            "peak_flops_per_second = { fp8 = 1e15 }",
            "peak_flops_per_second.fp8 = 1000000000000000.0: expected one of fp32",
        ),
        ("peak_flops_per_second = 1e15", "peak_flops_per_second = 1000000000000000.0: expected a table"),
        ("context_bytes = -1", "context_bytes = -1: expected a whole number of bytes"),
        ("sources = { capacity = 'x' }", "sources.capacity = 'x': expected a field name: did you mean"),
        ("kind = 'rocm'", 'kind = \'rocm\': expected "cuda" or "cpu"'),
    ],
)
def test_an_absurd_figure_is_refused(tmp_path: Path, line: str, message: str) -> None:
    assert message in refused(tmp_path, MINE + line + "\n")


def test_a_context_as_large_as_the_device_is_refused(tmp_path: Path) -> None:
    text = MINE.replace("51_539_607_552", "1_073_741_824") + "context_bytes = 1_073_741_824\n"
    assert "context_bytes = 1073741824: expected less than capacity_bytes, 1073741824" in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "FILE: the file holds no device"),
        ("[my-gpu", "FILE: the device file is not valid TOML: "),
        ("answer = 42", 'FILE: "answer" = 42: expected a device table, [answer]'),
        (MINE.replace("my-gpu", "t4"), 'FILE: memscope already has a device "t4": choose another name'),
        (MINE.replace("my-gpu", "cuda"), 'FILE: memscope already has a device "cuda": choose another name'),
        (MINE.replace("[my-gpu]", '["My GPU"]'), 'FILE: device name "My GPU": expected lowercase letters'),
    ],
)
def test_a_file_that_holds_no_usable_device_is_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


LONG = "the device file has more than 1000 characters"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = " + "[\n" * 50_000, "FILE: the device file is not usable: its values are nested too deep"),
        ("x = " + "[" * 50_000 + "]" * 50_000, f"FILE: line 1 of {LONG}"),
        ("a." * 50_000 + "a = 1", f"FILE: line 1 of {LONG}"),
        (f"[{'a.' * 400}a]\n" * 150, "FILE: the device file is not valid TOML: Cannot declare"),
        ("[" + "k" * 100_000 + "]", f"FILE: line 1 of {LONG}"),
        ("[" + "k" * 900 + "]", f'FILE: device name "{"k" * 60}…": expected lowercase letters'),
        (MINE + "k" * 900 + " = 1", f'FILE: device "my-gpu" has no field "{"k" * 60}…": Valid:'),
        (MINE.replace('"9.0"', '"' + "9" * 900 + '"'), f"capability = '{'9' * 60}…': expected"),
        (MINE.replace("96", "0x" + "f" * 900), "multiprocessors = a number of more than 60 digits: expected"),
        ("#\n" * 70_000, "FILE: has more than 128.0 KiB: expected a much smaller file"),
    ],
)
def test_a_file_made_to_break_readers_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    told = refused(tmp_path, text)
    assert message in told
    assert len(told) < 3000


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: the device file cannot be read: No such file"):
        load_devices(tmp_path / "none.toml")


def test_reading_devices_does_not_load_torch() -> None:
    use = "from memscope.simulation.devices.catalogue import all_devices; all_devices()"
    code = f"import sys; {use}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_device_may_be_given_another_memory() -> None:
    small, whole = get_device("a100-40gb:28GiB"), get_device("a100-40gb")
    assert small == dataclasses.replace(whole, capacity_bytes=28 * 2**30)
    with pytest.raises(UsageError, match="is not a size"):
        get_device("a100-40gb:much")
    with pytest.raises(UsageError, match='"a100-40gb:300MiB": its CUDA context alone takes 501'):
        get_device("a100-40gb:300MiB")

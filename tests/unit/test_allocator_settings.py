"""Allocator settings: reading them, error messages, and the sizes that follow."""

from __future__ import annotations

import pytest
import torch

from memscope.allocator.settings import AllocatorSettings
from memscope.errors import UsageError

KIB, MIB, GIB = 2**10, 2**20, 2**30


def test_every_key_that_places_memory_is_read() -> None:
    read = AllocatorSettings.parse(
        "expandable_segments:True,max_split_size_mb:64,max_non_split_rounding_mb:48,roundup_power2_divisions:8,"
        "garbage_collection_threshold:0.8,large_segment_size_mb:32,per_process_memory_fraction:0.5,"
        "throw_on_cudamalloc_oom:True,version:2.13.0"
    )
    assert read == AllocatorSettings(
        expandable_segments=True,
        max_split_size_bytes=64 * MIB,
        max_non_split_rounding_bytes=48 * MIB,
        roundup_power2_divisions=(8,) * 16,
        garbage_collection_threshold=0.8,
        large_segment_size_bytes=32 * MIB,
        per_process_memory_fraction=0.5,
        throw_on_cudamalloc_oom=True,
        version="2.13",
    )


OF_THE_HOST = """pinned_free_catch_all:True pinned_max_cached_size_mb:64 pinned_max_round_threshold_mb:1
pinned_num_register_threads:2 pinned_reserve_segment_size_mb:64 pinned_use_background_threads:True
pinned_use_cuda_host_register:True pinned_use_hip_host_register:True release_lock_on_cudamalloc:True
release_lock_on_hipmalloc:True graph_capture_record_stream_reuse:True"""
"""All other keys of 2.14.1 and 2.15.0. Source: getKeys() in c10/cuda/CUDAAllocatorConfig.h, names in libc10.so."""


@pytest.mark.parametrize("text", ["", "  ", "backend:native", ",".join(OF_THE_HOST.split())])
def test_keys_without_influence_on_device_memory_keep_the_defaults(text: str) -> None:
    assert AllocatorSettings.parse(text) == AllocatorSettings()


def test_spaces_are_ignored() -> None:
    assert AllocatorSettings.parse(" max_split_size_mb : 64 ").max_split_size_bytes == 64 * MIB


def test_pytorch_accepts_a_split_limit_with_expandable_segments_and_so_do_we() -> None:
    both = AllocatorSettings.parse("expandable_segments:True,max_split_size_mb:64")
    assert both.expandable_segments
    assert both.max_split_size_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("text", "divisions"),
    [
        # AcceleratorAllocatorConfig::roundup_power2_divisions(size) of torch 2.13.0 for 1 MiB, 2 MiB ... 32 GiB.
        ("[256:1,512:2,>:4]", (1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 4, 4, 4, 4, 4)),
        ("[64:8,128:2,256:4,512:2,1024:4,>:1]", (8, 8, 8, 8, 8, 8, 8, 2, 4, 2, 4, 1, 1, 1, 1, 1)),
        ("[>:4]", (0, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)),
        ("[256:4,64:2]", (4, 4, 4, 4, 4, 4, 2, 4, 4, 0, 0, 0, 0, 0, 0, 0)),
        ("[65536:2,32768:4]", (2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4)),
        ("[131072:2]", (2,) * 16),
        ("[]", (0,) * 16),
        ("4", (4,) * 16),
    ],
)
def test_roundup_lists_are_read_as_pytorch_reads_them(text: str, divisions: tuple[int, ...]) -> None:
    assert AllocatorSettings.parse(f"roundup_power2_divisions:{text}").roundup_power2_divisions == divisions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size:64", r'unknown key "max_split_size"; did you mean "max_split_size_mb"\?'),
        ("max_split_size_mb:19", "max_split_size_mb:19: expected at least 20, the size of a large segment"),
        ("max_split_size_mb:20,large_segment_size_mb:40", "max_split_size_mb:20: expected at least 40"),
        ("max_split_size_mb:20.5", "max_split_size_mb:20.5: expected a whole number"),
        ("max_split_size_mb:-1", "max_split_size_mb:-1: expected a whole number"),
        ("max_non_split_rounding_mb:8", "max_non_split_rounding_mb:8: expected at least 20"),
        ("large_segment_size_mb:10", "large_segment_size_mb:10: expected more than 10"),
        ("garbage_collection_threshold:1.0", "garbage_collection_threshold:1.0: expected a number between 0 and 1"),
        ("garbage_collection_threshold:0", "expected a number between 0 and 1, both excluded"),
        ("garbage_collection_threshold:nan", "expected a number between 0 and 1, both excluded"),
        ("garbage_collection_threshold:much", "garbage_collection_threshold:much: expected a number"),
        ("per_process_memory_fraction:1.5", "per_process_memory_fraction:1.5: expected a number from 0 to 1"),
        ("expandable_segments:true", "expandable_segments:true: expected True or False, with a capital letter"),
        ("roundup_power2_divisions:3", "roundup_power2_divisions:3: expected a power of two"),
        ("roundup_power2_divisions:0", "roundup_power2_divisions:0: expected a power of two"),
        ("roundup_power2_divisions:[256:3]", "expected divisions that are a power of two, or 0 for none"),
        ("roundup_power2_divisions:[100:2]", "expected intervals in MiB that are a power of two"),
        ("roundup_power2_divisions:[>:2,256:4]", 'expected ">" as the last entry of the list'),
        ("roundup_power2_divisions:[256]", "roundup_power2_divisions:256:.*expected a whole number"),
        ("backend:cudaMallocAsync", "which memscope cannot replay; use backend:native, or measure on a GPU"),
        ("backend:natve", 'unknown backend; did you mean "native"'),
        ("max_split_size_mb:40,max_split_size_mb:50", r"max_split_size_mb is given twice \(40, 50\)"),
        ("max_split_size_mb", "expected comma-separated key:value pairs"),
        ("max_split_size_mb:", 'cannot read "max_split_size_mb:"'),
        (
            "max_split_size_mb:40;expandable_segments:True",
            'cannot read "max_split_size_mb:40;expandable_segments:True"',
        ),
        ("expandable_segments:True,", "expected comma-separated key:value pairs"),
        ("roundup_power2_divisions:[256:1,512:2", "expected comma-separated key:value pairs"),
    ],
)
def test_invalid_settings_are_refused_with_the_expected_value(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        AllocatorSettings.parse(text)


def test_values_given_in_code_are_checked_too() -> None:
    with pytest.raises(UsageError, match=r"roundup_power2_divisions:\(4, 4\): expected 16 numbers"):
        AllocatorSettings(roundup_power2_divisions=(4, 4))


def test_the_variable_that_pytorch_reads_first_wins() -> None:
    # Order recorded from torch 2.13.0 with all three set, then without the first.
    split = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:200", "PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:300"}
    assert AllocatorSettings.from_environment(split).max_split_size_bytes == 300 * MIB
    split["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:100"
    assert AllocatorSettings.from_environment(split).max_split_size_bytes == 100 * MIB
    split["PYTORCH_CUDA_ALLOC_CONF"] = ""
    assert AllocatorSettings.from_environment(split) == AllocatorSettings()
    assert AllocatorSettings.from_environment({"HOME": "max_split_size_mb:100"}) == AllocatorSettings()


def test_settings_that_are_given_are_not_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:100")
    given = AllocatorSettings(max_split_size_bytes=200 * MIB)
    assert AllocatorSettings.asked(given) == AllocatorSettings.asked("max_split_size_mb:200") == given
    assert AllocatorSettings.asked(None).max_split_size_bytes == 100 * MIB
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "no such setting")
    assert AllocatorSettings.asked("") == AllocatorSettings(), "nobody asks for those of the process"


def test_an_error_in_the_environment_names_the_variable() -> None:
    with pytest.raises(
        UsageError, match=r'environment variable PYTORCH_ALLOC_CONF: .*unknown key "expandable_segment"'
    ):
        AllocatorSettings.from_environment({"PYTORCH_ALLOC_CONF": "expandable_segment:True"})


def test_settings_that_pytorch_ignores_silently_are_reported() -> None:
    collecting = AllocatorSettings.parse("garbage_collection_threshold:0.8")
    assert collecting.without_effect == (
        "garbage_collection_threshold does nothing unless per_process_memory_fraction is below 1",
    )
    rounding = AllocatorSettings.parse("max_non_split_rounding_mb:40")
    assert rounding.without_effect == ("max_non_split_rounding_mb does nothing without max_split_size_mb",)
    limited = AllocatorSettings.parse("garbage_collection_threshold:0.8,per_process_memory_fraction:0.9")
    assert limited.without_effect == ()


@pytest.mark.parametrize(
    ("asked", "block"),
    [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512), (100_000_000, 100_000_256)],
)
def test_sizes_are_rounded_up_to_512_bytes(asked: int, block: int) -> None:
    # 100,000,000 = 195,312 × 512 + 256.
    assert AllocatorSettings().block_size(asked) == block


def test_roundup_divides_the_range_to_the_next_power_of_two() -> None:
    # The example of PyTorch's CUDA notes, in KiB: 4 divisions between 1024 and 2048 give 1280, 1536 and 1792, and 1200
    # becomes 1280. Powers of two stay. Up to 4 × 512 B the steps would be too small: rounded to 512 B, as usual.
    four = AllocatorSettings.parse("roundup_power2_divisions:4")
    assert four.block_size(1200 * KIB) == 1280 * KIB
    assert four.block_size(1281 * KIB) == 1536 * KIB
    assert four.block_size(1793 * KIB) == 2048 * KIB
    assert four.block_size(1024 * KIB) == 1024 * KIB
    assert four.block_size(2048) == 2048
    assert four.block_size(1200) == 1536


def test_each_interval_has_its_own_divisions() -> None:
    lists = AllocatorSettings.parse("roundup_power2_divisions:[256:1,512:2,>:4]")
    assert lists.block_size(300 * MIB + 1) == 300 * MIB + 512  # 1 division: not rounded up
    assert lists.block_size(600 * MIB) == 768 * MIB  # 2 between 512 and 1024
    assert lists.block_size(1100 * MIB) == 1280 * MIB  # 4 between 1024 and 2048
    assert lists.block_size(100 * GIB) == 112 * GIB  # and 4 between 64 and 128 GiB, beyond the last interval


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (33 * MIB, 34 * MIB),
    ],
)
def test_segments_are_2_mib_20_mib_or_rounded_up_to_2_mib(block: int, segment: int) -> None:
    assert AllocatorSettings().segment_size(block) == segment


def test_the_size_of_a_large_segment_can_be_set() -> None:
    assert AllocatorSettings.parse("large_segment_size_mb:12").segment_size(2 * MIB) == 12 * MIB


def test_without_a_version_the_installed_release_counts() -> None:
    assert AllocatorSettings().version is None
    major, minor = torch.__version__.split(".")[:2]
    assert AllocatorSettings().release == (int(major), int(minor))
    assert AllocatorSettings.parse("version:2.4.1+cu121").release == (2, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version:2.3", "version:2.3: the allocator of this release is not known to memscope; it knows 2.4 to 2.15"),
        ("version:3.0", "it knows 2.4 to 2.15"),
        ("version:new", "version:new: expected a release of PyTorch, 2.4 to 2.15"),
        # The names in the compiled allocators of 2.5.1, 2.10.0 and 2.11.0, and the message of 2.9.1: "must be > 20".
        ("version:2.5,max_non_split_rounding_mb:48", "PyTorch 2.5 refuses it; releases from 2.6 on know it"),
        ("version:2.10,large_segment_size_mb:32", "PyTorch 2.10 refuses it; releases from 2.11 on know it"),
        ("version:2.11,throw_on_cudamalloc_oom:True", "PyTorch 2.11 refuses it; releases from 2.12 on know it"),
        ("version:2.14,expandable_segments_reserve:0.5", "PyTorch 2.14 refuses it; releases from 2.15 on know it"),
        (
            "version:2.15,expandable_segments_reserve:0.5",
            "expandable segments grow without end, as those of PyTorch do by default. Leave it out",
        ),
        ("version:2.15,expandable_segments_reserve_by_class:[a:0.25,b:8G]", "it limits the addresses of a segment"),
        ("version:2.9,max_split_size_mb:20", "max_split_size_mb:20: expected more than 20"),
    ],
)
def test_what_another_release_refuses_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        AllocatorSettings.parse(text)
    assert said in str(error.value)


def test_a_limit_of_one_large_segment_is_allowed_since_2_10() -> None:
    assert AllocatorSettings.parse("version:2.10,max_split_size_mb:20").max_split_size_bytes == 20 * MIB


def test_before_2_10_the_last_interval_is_replaced_too() -> None:
    # Recorded from the compiled allocators of 2.9.1 and 2.10.0: 5,243,309 bytes take 5,243,392 and 6,291,456.
    text = "roundup_power2_divisions:[1:8,2:2,4:4,>:1]"
    old, new = (AllocatorSettings.parse(f"{text},version:{version}") for version in ("2.9", "2.10"))
    assert (old.block_size(5_243_309), new.block_size(5_243_309)) == (5_243_392, 6_291_456)


def test_the_environment_cannot_name_a_version() -> None:
    with pytest.raises(UsageError, match=r"simulate with --allocator version:2\.4"):
        AllocatorSettings.from_environment({"PYTORCH_CUDA_ALLOC_CONF": "version:2.4"})

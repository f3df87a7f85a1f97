"""The options of `memscope fit`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from memscope.advisor.advise import DEFAULT_DEVICE
from memscope.command.options import (
    ALLOCATOR,
    ASSUME,
    CHANGED,
    DEVICE_FILE,
    FILE,
    PRESET,
    TIMEOUT,
    TRUST_REMOTE_CODE,
    argument,
    option,
)

__all__ = ["FitOptions"]


@dataclass(frozen=True)
class FitOptions:
    """The options of `memscope fit`."""

    target: Annotated[str, argument(required=False, default="")]
    settings: Annotated[tuple[str, ...], argument(nargs=-1, metavar="[KEY=VALUE]...")]
    device: Annotated[
        str,
        option(
            "--device",
            default=DEFAULT_DEVICE,
            show_default=True,
            help="The device (see: memscope devices); a100-40gb:28GiB is one with less memory.",
        ),
    ]
    device_file: Annotated[Path | None, DEVICE_FILE]
    strategies: Annotated[
        str, option("-s", "--strategies", default="", metavar="PLAN", help="Strategies to apply, such as lora:r=8,amp.")
    ]
    allow: Annotated[
        tuple[str, ...],
        option(
            "--allow",
            multiple=True,
            metavar="NAME,...",
            help="Strategies that change the mathematics and may be proposed if it does not fit, such as lora,bf16.",
        ),
    ]
    preset: Annotated[str | None, PRESET]
    changed: Annotated[tuple[str, ...], CHANGED]
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE]
    allocator: Annotated[str | None, ALLOCATOR]
    assume: Annotated[str, ASSUME]
    timeout: Annotated[str | None, TIMEOUT]
    batch_option: Annotated[
        str | None,
        option("--batch-option", metavar="NAME", help="With a program: the option that sets its micro-batch."),
    ]
    length_option: Annotated[
        str | None, option("--length-option", metavar="NAME", help="With a program: the option that sets its length.")
    ]
    html: Annotated[
        Path | None,
        option(
            "--html",
            type=FILE,
            metavar="FILE",
            help="Also write a page: memory over micro-batch and length, with a line for each device.",
        ),
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite an existing page.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of tables.")]

"""The options of `memscope advise`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from memscope.advisor.advise import DEFAULT_DEVICE
from memscope.advisor.emit import TOOLS
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

__all__ = ["PLAN_FILE", "AdviseOptions"]

PLAN_FILE = "memscope-plan.json"


@dataclass(frozen=True)
class AdviseOptions:
    """The options of `memscope advise`."""

    target: Annotated[str | None, argument(required=False)]
    settings: Annotated[tuple[str, ...], argument(nargs=-1, metavar="[KEY=VALUE]...")]
    budget: Annotated[
        str,
        option("--budget", required=True, metavar="SIZE", help="Memory of the device: 40GB, 37.3GiB, or 90% of it."),
    ]
    device: Annotated[
        str | None,
        option(
            "--device",
            help=f"Device whose kernels and rates are assumed (see: memscope devices). Default: {DEFAULT_DEVICE}.",
        ),
    ]
    device_file: Annotated[Path | None, DEVICE_FILE]
    strategies: Annotated[
        str, option("-s", "--strategies", default="", metavar="PLAN", help="Strategies that every plan must use.")
    ]
    allow: Annotated[
        tuple[str, ...],
        option(
            "--allow",
            multiple=True,
            metavar="NAME,...",
            help="Strategies that change the mathematics and may be used, such as lora,bf16. "
            "All exact strategies may be used.",
        ),
    ]
    layer_list: Annotated[
        str,
        option(
            "--layer-list",
            default="",
            metavar="NAME",
            help="Lists of modules that are the layers, such as transformer.h, joined by +. "
            "Default: all lists of repeated layers.",
        ),
    ]
    preset: Annotated[str | None, PRESET]
    changed: Annotated[tuple[str, ...], CHANGED]
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE]
    allocator: Annotated[str | None, ALLOCATOR]
    assume: Annotated[str, ASSUME]
    emit: Annotated[
        str | None,
        option("--emit", type=click.Choice(TOOLS), help="Also print the plan as settings of another training tool."),
    ]
    timeout: Annotated[str | None, TIMEOUT]
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            type=FILE,
            metavar="FILE",
            help=f"Plan file. Default: {PLAN_FILE}, or with a number if there is one.",
        ),
    ]
    html: Annotated[Path | None, option("--html", type=FILE, metavar="FILE", help="Also write a page with the plan.")]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite existing files.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of tables.")]

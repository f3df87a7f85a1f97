"""The options of `memscope profile`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

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

__all__ = ["DEFAULT_STEPS", "ProfileOptions"]

DEFAULT_STEPS = 2
"""The fewest steps that show the optimizer state in forward and backward passes."""


class _Steps(click.IntRange):
    """A number of steps, or `all`, which stands for None."""

    def __init__(self) -> None:
        super().__init__(1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == "all" else super().convert(value, param, ctx)


@dataclass(frozen=True)
class ProfileOptions:
    """The options of `memscope profile`."""

    target: Annotated[str, argument(required=False, default="")]
    settings: Annotated[tuple[str, ...], argument(nargs=-1, metavar="[KEY=VALUE]...")]
    plans: Annotated[
        tuple[str, ...],
        option(
            "-s",
            "--strategies",
            multiple=True,
            metavar="PLAN",
            help="Strategies to apply, such as lora:r=8,amp. Once: each strategy alone and all together. Repeated: "
            "each plan as given.",
        ),
    ]
    grid: Annotated[
        str | None,
        option(
            "--grid",
            metavar="PLAN",
            help="Table 2: every combination of the strategies of PLAN, each on or off, such as ga:steps=8,amp,lora. A "
            "value may have alternatives: lora:r=8/16/64.",
        ),
    ]
    vary: Annotated[
        tuple[str, ...],
        option(
            "--vary",
            multiple=True,
            metavar="KEY=A/B/…",
            help="With --grid: every combination with each value of a setting, such as n_layers=1/32. Repeatable.",
        ),
    ]
    samples: Annotated[
        int | None,
        option(
            "--samples",
            type=click.IntRange(1),
            help="With --grid: number of samples that the run time is for. [default: 200]",
        ),
    ]
    memory: Annotated[
        str | None,
        option("--memory", metavar="SIZE", help="With --grid on cuda: most memory PyTorch may use, such as 40GB."),
    ]
    table: Annotated[
        Path | None,
        option("--table", type=FILE, metavar="FILE", help="With --grid: write Table 2 to a .csv or .md file."),
    ]
    preset: Annotated[str | None, PRESET]
    changed: Annotated[tuple[str, ...], CHANGED]
    trust_remote_code: Annotated[bool, TRUST_REMOTE_CODE]
    device: Annotated[
        str | None,
        option(
            "--device",
            help="cuda or cpu for a real run, or the device to simulate (see: memscope devices). Default: cuda if "
            "PyTorch has a GPU, else gpu.",
        ),
    ]
    device_file: Annotated[Path | None, DEVICE_FILE]
    allocator: Annotated[str | None, ALLOCATOR]
    simulate: Annotated[
        bool, option("--simulate", is_flag=True, help="Simulate even if the run could be real, as on --device cpu.")
    ]
    assume: Annotated[str, ASSUME]
    steps: Annotated[
        int | None,
        option(
            "--steps",
            default=str(DEFAULT_STEPS),
            show_default=True,
            type=_Steps(),
            help="Optimizer steps; effects are those of the second step. With a program also all: to its own end.",
        ),
    ]
    timeout: Annotated[str | None, TIMEOUT]
    output: Annotated[
        Path | None,
        option("-o", "--output", type=FILE, metavar="FOLDER", help="Folder for traces and page. Default: a new one."),
    ]
    html: Annotated[
        Path | None, option("--html", type=FILE, metavar="FILE", help="Page to write. Default: in that folder.")
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite files that exist.")]
    live: Annotated[
        bool, option("--live", is_flag=True, help="Show memory by category in the terminal while runs are in progress.")
    ]
    quiet: Annotated[
        bool,
        option("--quiet", is_flag=True, help="With a program: write its output to a file in the folder of the run."),
    ]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of tables.")]

"""Pre-train a model on a text: `python -m memscope.targets.gpt.train --preset debug --data text.txt`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from memscope.command.options import FILE, option, with_options
from memscope.command.run import run_command
from memscope.command.target_words import RUNS, settings_of
from memscope.errors import UsageError
from memscope.interrupts import INTERRUPTED
from memscope.targets.gpt.config import Config
from memscope.targets.gpt.pretraining import PretrainingJob, measure, prepare_pretraining, save_weights_of
from memscope.targets.training.device import default_device
from memscope.targets.training.metrics import Outcome
from memscope.targets.training.options import device_option, other_settings, setting_options
from memscope.targets.training.recipe import Recipe
from memscope.targets.training.resume import resumed
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session
from memscope.targets.training.train import train
from memscope.targets.training.watch import watched
from memscope.workload.target import find_target

__all__ = ["command", "main"]

_NAME = "python -m memscope.targets.gpt.train"
_METAVARS = {"data": "FILE", "tokenizer": "FILE"}


@dataclass(frozen=True)
class PretrainingOptions:
    """The options of this command that are not settings of the model or of training."""

    strategies: Annotated[
        str | None,
        option("-s", "--strategies", metavar="PLAN", help="Strategies to apply, such as amp:dtype=bf16,ckpt."),
    ]
    preset: Annotated[str | None, option("--preset", metavar="NAME", help="Shape of the model. Default: 166m.")]
    output: Annotated[
        Path | None,
        option(
            "-o", "--output", type=FILE, metavar="FOLDER", help=f"Folder of the run. Default: a new folder in {RUNS}."
        ),
    ]
    resume: Annotated[
        Path | None,
        option(
            "--resume", type=FILE, metavar="FOLDER", help="Resume the run in this folder; no other option is needed."
        ),
    ]
    force: Annotated[bool, option("-f", "--force", is_flag=True, help="Overwrite the run in the folder.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document at the end.")]


@click.command("train", context_settings={"help_option_names": ["-h", "--help"]})
@setting_options(Config, "data", "tokenizer", "samples", "lr", metavars=_METAVARS)
@setting_options(Recipe)
@with_options(PretrainingOptions)
@other_settings
@device_option
def command(
    options: PretrainingOptions, settings: tuple[str, ...], changed: tuple[str, ...], **texts: str | None
) -> int:
    """Train a GPT, or a model of LLaMA's style, from nothing on a text.

    Techniques are memscope's strategies, mixed precision among them (-s amp:dtype=bf16); memscope profile targets/gpt
    with the same settings shows the memory that a plan needs. Ctrl-C stops after the current step and writes a
    checkpoint. Exit codes: 0 ok, 1 error, 2 usage, 4 out of GPU memory, 130 stopped.
    """
    texts["strategies"] = options.strategies
    words = settings_of([*changed, *settings, *(f"{key}={text}" for key, text in texts.items() if text is not None)])
    words |= {key: str(Path(words[key]).absolute()) for key in _METAVARS if words.get(key, "none") != "none"}
    base: Config = find_target("gpt").configure(options.preset)
    if options.resume is None:
        folder = RunFolder(options.output or RUNS / f"pretraining-{time.strftime('%Y%m%d-%H%M%S')}")
        if "data" not in words:
            raise UsageError("no text given: name a text file with --data FILE")
        folder.require_new(overwrite=options.force)
        session = prepare_pretraining(PretrainingJob.of({"device": default_device(), **words}, base))
        folder.begin(session.job.settings)
    elif options.output or options.force or options.preset:
        raise UsageError("--resume continues the run in its folder: leave out -o, -f and --preset")
    else:
        folder = RunFolder(options.resume)
        session = resumed(
            folder, PretrainingJob, lambda there: PretrainingJob.of({**there, **words}), prepare_pretraining
        )
    saved = _carried_out(session, folder)
    outcome = Outcome.read(folder.metrics)
    if options.as_json:
        click.echo(json.dumps(_document(session, folder, outcome, saved), ensure_ascii=False, indent=2))
    else:
        _tell(session, folder, outcome, saved)
    return 0 if saved else INTERRUPTED


def _carried_out(session: Session, folder: RunFolder) -> Path | None:
    """Carry out the run. Returns the folder of the weights, or None if the run was stopped."""
    total, _ = session.training.workload.parameter_counts()
    plan = f", {session.job.plan}" if session.job.plan else ""
    click.echo(
        f"{total:,} parameters; {len(session.samples)} samples of {session.job.config.seq_len} tokens, "
        f"{session.steps} steps; {session.job.device}{plan}; {folder.path}",
        err=True,
    )
    with watched(session, folder) as watch:
        if session.done == 0:
            measure(session, watch)
        if not train(session, folder, watch):
            return None
        saved = save_weights_of(session, folder)
        measure(session, watch)
        return saved


def _document(session: Session, folder: RunFolder, outcome: Outcome, saved: Path | None) -> dict[str, object]:
    return {
        "schema_version": 1,
        "folder": str(folder.path),
        "settings": session.job.settings,
        "parameters": session.training.workload.parameter_counts()[0],
        "samples": {"trained": len(session.samples), "held_out": len(session.held_out)},
        "steps": {"done": session.done, "total": session.steps},
        **dataclasses.asdict(outcome),
        "saved": None if saved is None else str(saved),
    }


def _tell(session: Session, folder: RunFolder, outcome: Outcome, saved: Path | None) -> None:
    click.echo(
        f"{session.done} of {session.steps} steps: loss {outcome.first_loss:.4f} at the first, "
        f"{outcome.last_loss:.4f} at the last; {outcome.tokens_per_second:,.0f} tokens/s"
    )
    if outcome.perplexity_before is not None and outcome.perplexity_after is not None:
        click.echo(
            f"{len(session.held_out)} held-out samples: perplexity {outcome.perplexity_before:,.2f} before, "
            f"{outcome.perplexity_after:,.2f} after; {outcome.token_accuracy:.1%} of the tokens predicted"
        )
    if saved is None:
        click.echo(f"stopped. To resume: {_NAME} --resume {shlex.quote(str(folder.path))}")
    else:
        click.echo(f"saved: {saved}")


def main(arguments: list[str] | None = None) -> None:
    """Run this program; an error ends it with one message and an exit code."""
    run_command(command, _NAME, arguments)


if __name__ == "__main__":
    main()

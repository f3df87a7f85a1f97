"""Fine-tune a model on instructions: `python -m memscope.targets.llama2.finetune --weights DIR --data alpaca.json`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from memscope.command.options import FILE, option, with_options
from memscope.command.run import run_command
from memscope.command.target_words import RUNS, settings_of
from memscope.errors import UsageError
from memscope.interrupts import INTERRUPTED
from memscope.targets.llama2.job import FinetuneRecipe, Job
from memscope.targets.llama2.model import Architecture
from memscope.targets.llama2.result import evaluate, save_result
from memscope.targets.llama2.session import prepare, shortfalls
from memscope.targets.llama2.target import SHIPPED_TOKENIZER, Config, read_preset
from memscope.targets.training.device import default_device
from memscope.targets.training.metrics import Outcome
from memscope.targets.training.options import device_option, other_settings, setting_options
from memscope.targets.training.resume import resumed
from memscope.targets.training.run_folder import RunFolder
from memscope.targets.training.session import Session
from memscope.targets.training.tokenizer import TOKENIZER, tokenizer_beside
from memscope.targets.training.train import train
from memscope.targets.training.watch import watched
from memscope.units import format_bytes
from memscope.workload.settings import format_value
from memscope.workload.target import find_target

__all__ = ["command", "main"]

_NAME = "python -m memscope.targets.llama2.finetune"
_METAVARS = {"weights": "FOLDER", "data": "FILE", "tokenizer": "FILE"}


@dataclass(frozen=True)
class FinetuneOptions:
    """The options of this command that are not settings of the model or of training."""

    strategies: Annotated[
        str | None,
        option(
            "-s",
            "--strategies",
            metavar="PLAN",
            help="Strategies to apply, such as lora:r=16,targets=wq+wv,amp:dtype=bf16.",
        ),
    ]
    preset: Annotated[
        str | None, option("--preset", metavar="NAME|PATH", help="Shape of the model. Default: that of the weights.")
    ]
    output: Annotated[
        Path | None,
        option(
            "-o",
            "--output",
            type=FILE,
            metavar="FOLDER",
            help=f"Folder for everything the run writes. Default: a new folder in {RUNS}.",
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


@click.command("finetune", context_settings={"help_option_names": ["-h", "--help"]})
@setting_options(
    Config,
    "weights",
    "data",
    "tokenizer",
    "samples",
    "lr",
    metavars=_METAVARS,
    defaults={"tokenizer": "tokenizer.model in the folder of the weights"},
)
@setting_options(FinetuneRecipe)
@with_options(FinetuneOptions)
@other_settings
@device_option
def command(options: FinetuneOptions, settings: tuple[str, ...], changed: tuple[str, ...], **texts: str | None) -> int:
    """Fine-tune LLaMA2, or a model of its family, on instructions in Alpaca's format.

    Defaults: one sample per micro-batch (micro_batch=1), 8 micro-batches per step (accumulation=8), AdamW. Techniques
    are memscope's strategies; memscope profile with the same settings shows the memory that a plan needs.
    Ctrl-C stops after the current step and writes a checkpoint. Exit codes: 0 ok, 1 error, 2 usage, 4 out of GPU
    memory, 130 stopped.
    """
    texts["strategies"] = options.strategies
    given = [f"{key}={text}" for key, text in texts.items() if text is not None]
    words = settings_of([*changed, *settings, *given])
    words |= {key: str(Path(words[key]).absolute()) for key in _METAVARS if words.get(key, "none") != "none"}
    if options.resume is None:
        folder, session = _begun(options, words)
    elif options.output or options.force:
        raise UsageError("--resume continues in the folder of its run: leave out -o and -f")
    else:
        folder, session = _continued(RunFolder(options.resume), options.preset, words)
    saved = _carried_out(session, folder)
    outcome = Outcome.read(folder.metrics)
    if options.as_json:
        click.echo(json.dumps(_document(session, folder, outcome, saved), ensure_ascii=False, indent=2))
    else:
        _tell(session, folder, outcome, saved)
    return 0 if saved else INTERRUPTED


def _begun(options: FinetuneOptions, words: dict[str, str]) -> tuple[RunFolder, Session]:
    folder = RunFolder(options.output or RUNS / f"finetune-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.require_new(overwrite=options.force)
    if "weights" in words and "tokenizer" not in words:
        words["tokenizer"] = str(tokenizer_beside(Path(words["weights"])))
    words = {"device": default_device(), **words}
    session = prepare(Job.of(words, _base(options.preset, words)))
    folder.begin(session.job.settings)
    return folder, session


def _base(preset: str | None, words: Mapping[str, str]) -> Config:
    """The shape of the model, with defaults for all other settings."""
    if preset is not None:
        base: Config = find_target("llama2").configure(preset)
        return base
    if "weights" not in words:
        raise UsageError(
            "no model given: name a folder of weights with --weights, or a shape for random weights with --preset, "
            "such as --preset debug"
        )
    return read_preset(Path(words["weights"]))


def _continued(folder: RunFolder, preset: str | None, words: dict[str, str]) -> tuple[RunFolder, Session]:
    def job_of(settings: dict[str, str]) -> Job:
        shape = _base(preset, words) if preset is not None else Job.of(settings).config
        names = [field.name for field in dataclasses.fields(Architecture)]
        return Job.of({**settings, **{name: format_value(getattr(shape, name)) for name in names}, **words})

    return folder, resumed(folder, Job, job_of, prepare)


def _carried_out(session: Session, folder: RunFolder) -> Path | None:
    """Carry out the run. Returns the path of the saved result, or None if the run was stopped."""
    total, trained = session.training.workload.parameter_counts()
    plan = f", {session.job.plan}" if session.job.plan else ""
    click.echo(
        f"{total:,} parameters, {trained:,} trained; {len(session.samples)} samples, {session.steps} steps; "
        f"{session.job.device}{plan}; {folder.path}",
        err=True,
    )
    for shortfall in shortfalls(session):
        click.echo(shortfall, err=True)
    with watched(session, folder) as watch:
        if session.done == 0:
            evaluate(session, watch)
        if not train(session, folder, watch):
            return None
        saved = save_result(session, folder)
        evaluate(session, watch)
        return saved


def _document(session: Session, folder: RunFolder, outcome: Outcome, saved: Path | None) -> dict[str, Any]:
    total, trained = session.training.workload.parameter_counts()
    return {
        "schema_version": 1,
        "folder": str(folder.path),
        "settings": session.job.settings,
        "parameters": {"total": total, "trained": trained},
        "samples": {"trained": len(session.samples), "held_out": len(session.held_out)},
        "steps": {"done": session.done, "total": session.steps},
        **dataclasses.asdict(outcome),
        "saved": None if saved is None else str(saved),
    }


def _tell(session: Session, folder: RunFolder, outcome: Outcome, saved: Path | None) -> None:
    peak = "" if outcome.peak_bytes is None else f", peak {format_bytes(outcome.peak_bytes)}"
    skipped = f", {outcome.skipped_steps} skipped by the gradient scaler" if outcome.skipped_steps else ""
    click.echo(
        f"{session.done} of {session.steps} steps{skipped}: loss {outcome.first_loss:.4f} at the first, "
        f"{outcome.last_loss:.4f} at the last; {outcome.tokens_per_second:,.0f} tokens/s{peak}"
    )
    if outcome.perplexity_before is not None and outcome.perplexity_after is not None:
        click.echo(
            f"perplexity of {len(session.held_out)} held-out samples: {outcome.perplexity_before:,.2f} before, "
            f"{outcome.perplexity_after:,.2f} after"
        )
    if saved is None:
        click.echo(f"stopped. To resume: {_NAME} --resume {shlex.quote(str(folder.path))}")
        return
    click.echo(f"saved: {saved}")
    words = _how_to_generate(session.job.config, saved)
    if words:
        click.echo(f"Next: {shlex.join(words)}")


def _how_to_generate(config: Config, saved: Path) -> list[str]:
    """The command that tries the saved result; empty for updates of random weights, which are in no file."""
    words = ["python", "-m", "memscope.targets.llama2.generate"]
    if (saved / TOKENIZER).is_file():
        words += ["--weights", str(saved)]
    elif config.weights is not None:
        words += ["--weights", config.weights, "--adapter", str(saved)]
        if config.tokenizer != str(Path(config.weights) / TOKENIZER):
            words += ["--tokenizer", config.tokenizer or str(SHIPPED_TOKENIZER)]
    else:
        return []
    return [*words, "--instruction", "Name three primary colors."]


def main(arguments: list[str] | None = None) -> None:
    """Run this program; an error ends it with one message and an exit code."""
    run_command(command, _NAME, arguments)


if __name__ == "__main__":
    main()

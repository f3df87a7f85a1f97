"""Continue prompts: `python -m memscope.targets.llama2.generate --weights DIR --prompt TEXT`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import torch

from memscope.command.options import FILE, option, with_options
from memscope.command.progress import shown_progress
from memscope.command.run import run_command
from memscope.command.target_words import settings_of
from memscope.errors import UsageError
from memscope.targets.llama2.adapters import load_adapter
from memscope.targets.llama2.alpaca import Instruction
from memscope.targets.llama2.generation import Continuation, Decoding, check_prompts, generate
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import Config, read_preset
from memscope.targets.llama2.weights import load_weights, without_initialization
from memscope.targets.training.device import default_device, require_device, room_on_device
from memscope.targets.training.options import device_option, other_settings, setting_options
from memscope.targets.training.tokenizer import Tokenizer, tokenizer_beside
from memscope.workload.settings import fill

__all__ = ["command", "load_model", "main"]

OnToken = Callable[[list[tuple[int, ...]]], None]
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class GenerateOptions:
    """The options of this command that are not settings of the model or of decoding."""

    weights: Annotated[
        Path,
        option(
            "--weights",
            required=True,
            type=_FOLDER,
            metavar="FOLDER",
            help="Model, in Meta's or Hugging Face's format.",
        ),
    ]
    adapter: Annotated[
        Path | None, option("--adapter", type=_FOLDER, metavar="FOLDER", help="LoRA updates, in PEFT's format.")
    ]
    tokenizer: Annotated[
        Path | None,
        option(
            "--tokenizer",
            type=FILE,
            metavar="FILE",
            help="SentencePiece model.  [default: tokenizer.model in the folder of the weights]",
        ),
    ]
    prompts: Annotated[
        tuple[str, ...], option("--prompt", multiple=True, metavar="TEXT", help="Text to continue; repeatable.")
    ]
    instructions: Annotated[
        tuple[str, ...],
        option(
            "--instruction",
            multiple=True,
            metavar="TEXT",
            help="Instruction for a model tuned on Alpaca's format, put into its template; repeatable.",
        ),
    ]
    about: Annotated[str | None, option("--input", metavar="TEXT", help="Input of the one instruction.")]
    as_json: Annotated[bool, option("--json", is_flag=True, help="Print one JSON document instead of text.")]


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@with_options(GenerateOptions)
@setting_options(Decoding)
@other_settings
@device_option
def command(
    options: GenerateOptions,
    settings: tuple[str, ...],
    changed: tuple[str, ...],
    device: str | None,
    **texts: str | None,
) -> None:
    """Continue texts with LLaMA2, or a model of its family. Prompts run together, but each result is as if run alone.

    Decoding is greedy unless --temperature or --beams is given. With --cache false every token takes one forward pass
    over all the text before it. Text goes to stdout; with one prompt and no beam search, it is streamed.
    """
    decoding = fill(Decoding, {key: text for key, text in texts.items() if text is not None}, of="generation")
    config = fill(read_preset(options.weights), settings_of([*changed, *settings]), of='target "llama2"')
    pieces = Tokenizer.load(options.tokenizer or tokenizer_beside(options.weights), config.vocab_size)
    asked = _prompts(options.prompts, options.instructions, options.about)
    encoded = [[pieces.bos_id, *pieces.encode(text)] for text in asked]
    check_prompts(encoded, config.architecture)
    device = device or default_device()
    require_device(device)
    began = time.perf_counter()
    with room_on_device(_REMEDY):
        model = load_model(options.weights, config, adapter=options.adapter, device=device)
        streamed = len(asked) == 1 and decoding.beams == 1 and not options.as_json
        began = time.perf_counter()
        with _streamed(pieces, encoded[0]) if streamed else _progress(decoding) as on_token:
            found = generate(model, encoded, decoding, eos_id=pieces.eos_id, on_token=on_token)
    seconds = time.perf_counter() - began
    results = [
        {"prompt": text, "text": _text(pieces, ids, one.tokens), **dataclasses.asdict(one)}
        for text, ids, one in zip(asked, encoded, found, strict=True)
    ]
    if options.as_json:
        adapter = str(options.adapter) if options.adapter else None
        about_run = {"weights": str(options.weights), "adapter": adapter, "device": device}
        document = {"schema_version": 1, **about_run, "decoding": dataclasses.asdict(decoding), "seconds": seconds}
        click.echo(json.dumps(document | {"results": results}, ensure_ascii=False, indent=2))
        return
    if not streamed:
        _print(results)
    _print_ends(found, decoding, config, seconds)


_REMEDY = "Continue fewer prompts at once, with fewer --beams, or with --set dtype=bf16 attention=sdpa"


def load_model(
    weights: Path, config: Config | None = None, *, adapter: Path | None = None, device: str = "cpu"
) -> Llama:
    """Load a model for generation from a folder of weights, with the LoRA updates of an adapter if one is given.

    Args:
        weights: a folder in Meta's or Hugging Face's format.
        config: shape, dtype and attention of the model; None: the shape in the folder, and defaults for the rest.
        adapter: a folder in PEFT's format.
        device: cpu or cuda. Loading to a GPU needs host memory for only one tensor at a time.

    Raises:
        UsageError: a file is missing or damaged, or does not fit the model.
    """
    config = config or read_preset(weights)
    with torch.device(device), without_initialization():
        model = Llama(config.architecture)
    load_weights(model, weights)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def _prompts(prompts: Sequence[str], instructions: Sequence[str], about: str | None) -> list[str]:
    if not prompts and not instructions:
        raise UsageError("no text to continue: give one with --prompt or --instruction")
    if about is not None and len(instructions) != 1:
        raise UsageError(f"--input needs exactly one --instruction, but {len(instructions)} are given")
    given = [("--prompt", text) for text in prompts] + [("--instruction", text) for text in instructions]
    for name, text in given:
        if not text.strip():
            raise UsageError(f"{name} {json.dumps(text)} is empty: there is nothing to continue")
    return [*prompts, *(Instruction(text, about or "", "").prompt for text in instructions)]


def _text(tokenizer: Tokenizer, prompt: list[int], new: Sequence[int]) -> str:
    """The new text, with the space it may begin with: decoded alone, its first piece would lose that space."""
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


@contextmanager
def _streamed(tokenizer: Tokenizer, prompt: list[int]) -> Iterator[OnToken]:
    """Print the text as it is generated; a character is held back until all of its bytes are there."""
    text, shown = "", 0

    def show(new: list[tuple[int, ...]]) -> None:
        nonlocal text, shown
        text = _text(tokenizer, prompt, new[0])
        ready = len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
        click.echo(text[shown:ready], nl=False)
        shown = max(shown, ready)

    try:
        yield show
    finally:
        click.echo(text[shown:])


@contextmanager
def _progress(decoding: Decoding) -> Iterator[OnToken]:
    with shown_progress() as told:
        yield lambda new: told("generating", max(map(len, new)), decoding.max_new_tokens)


def _print(results: list[dict[str, Any]]) -> None:
    for result in results:
        if len(results) > 1:
            click.secho(result["prompt"], dim=True)
        click.echo(result["text"] + ("\n" if len(results) > 1 else ""))


def _print_ends(found: Sequence[Continuation], decoding: Decoding, config: Config, seconds: float) -> None:
    tokens = sum(len(one.tokens) for one in found)
    why = {
        "eos": "ended by the model",
        "length": f"--max-new-tokens {decoding.max_new_tokens} reached",
        "context": f"the context of {config.max_seq_len} tokens is full",
    }
    ends = ", ".join(why[one.ended_by] for one in found)
    click.echo(f"{tokens} tokens in {seconds:.1f} s ({ends})", err=True)


def main() -> None:
    """Run this program; an error ends it with one message and an exit code."""
    run_command(command, "python -m memscope.targets.llama2.generate")


if __name__ == "__main__":
    main()

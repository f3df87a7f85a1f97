"""Continue prompts: `python -m memscope.targets.llama2.generate --weights DIR --prompt TEXT`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from memscope.cli.main import run_command
from memscope.cli.progress import shown_progress
from memscope.cli.target_words import settings_of
from memscope.errors import OutOfDeviceMemory, UsageError
from memscope.settings import fill, format_value, help_of
from memscope.targets.llama2.adapters import load_adapter
from memscope.targets.llama2.alpaca import Instruction
from memscope.targets.llama2.generation import Continuation, Decoding, check_prompts, generate
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import SHIPPED_TOKENIZER, Config, read_preset
from memscope.targets.llama2.tokenizer import Tokenizer
from memscope.targets.llama2.weights import load_weights, without_initialization

__all__ = ["command", "load_model", "main"]

F = TypeVar("F", bound=Callable[..., Any])
OnToken = Callable[[list[tuple[int, ...]]], None]
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def _decoding_options(function: F) -> F:
    """An option for each setting of `Decoding`; as text, None where it is not given."""
    helps = help_of(Decoding)
    for field in reversed(dataclasses.fields(Decoding)):
        text = f"{helps[field.name]}  [default: {format_value(field.default)}]"
        function = click.option(f"--{field.name.replace('_', '-')}", field.name, metavar="VALUE", help=text)(function)
    return function


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--weights", required=True, type=_FOLDER, metavar="FOLDER", help="The model, in Meta's or Hugging Face's format."
)
@click.option("--adapter", type=_FOLDER, metavar="FOLDER", help="LoRA updates of it, in PEFT's format.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="SentencePiece model.  [default: tokenizer.model in the folder of the weights]",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; may be repeated.")
@click.option(
    "--instruction",
    "instructions",
    multiple=True,
    metavar="TEXT",
    help="The same for models tuned on Alpaca's format: the text is put into its template; may be repeated.",
)
@click.option("--input", "about", metavar="TEXT", help="What the one instruction is about.")
@_decoding_options
@click.option(
    "--set",
    "changed",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting of the model, such as dtype=bf16 or attention=sdpa (see: memscope targets); "
    "more may follow as KEY=VALUE.",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="Where to compute. Default: cuda where PyTorch has a GPU."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def command(
    settings: tuple[str, ...],
    weights: Path,
    adapter: Path | None,
    tokenizer: Path | None,
    prompts: tuple[str, ...],
    instructions: tuple[str, ...],
    about: str | None,
    changed: tuple[str, ...],
    device: str | None,
    as_json: bool,
    debug: bool,
    **texts: str | None,
) -> None:
    """Continue texts with LLaMA2, or a model of its family; several at once, each as it would be alone.

    Greedy, unless a --temperature or --beams is given. There is no KV cache: every token is one forward pass over all
    the text before it. Text goes to stdout, as it comes where there is one prompt and no beam search.
    """
    decoding = fill(Decoding, {key: text for key, text in texts.items() if text is not None}, of="generation")
    config = fill(read_preset(weights), settings_of([*changed, *settings]), of='target "llama2"')
    pieces = _tokenizer(tokenizer, weights, config)
    asked = _prompts(prompts, instructions, about)
    encoded = [[pieces.bos_id, *pieces.encode(text)] for text in asked]
    check_prompts(encoded, config.architecture)
    device = _device(device)
    began = time.perf_counter()
    with _room_on_device():
        model = load_model(weights, config, adapter=adapter, device=device)
        streamed = len(asked) == 1 and decoding.beams == 1 and not as_json
        began = time.perf_counter()
        with _streamed(pieces, encoded[0]) if streamed else _progress(decoding) as on_token:
            found = generate(model, encoded, decoding, eos_id=pieces.eos_id, on_token=on_token)
    seconds = time.perf_counter() - began
    results = [
        {"prompt": text, "text": _text(pieces, ids, one.tokens), **dataclasses.asdict(one)}
        for text, ids, one in zip(asked, encoded, found, strict=True)
    ]
    if as_json:
        about_run = {"weights": str(weights), "adapter": str(adapter) if adapter else None, "device": device}
        document = {"schema_version": 1, **about_run, "decoding": dataclasses.asdict(decoding), "seconds": seconds}
        click.echo(json.dumps(document | {"results": results}, ensure_ascii=False, indent=2))
        return
    if not streamed:
        _print(results)
    _print_ends(found, decoding, config, seconds)


def load_model(
    weights: Path, config: Config | None = None, *, adapter: Path | None = None, device: str = "cpu"
) -> Llama:
    """A model from a folder of weights, with the LoRA updates of an adapter, on a device, for use and not for training.

    Args:
        weights: a folder of Meta's or Hugging Face's format.
        config: its shape, dtype and attention; None: the shape of the folder, and the defaults.
        adapter: a folder of PEFT's format.
        device: cpu or cuda. The host needs no more than one tensor beside what is there.

    Raises:
        UsageError: when a file is missing or damaged, or does not fit the model.
    """
    config = config or read_preset(weights)
    with torch.device(device), without_initialization():
        model = Llama(config.architecture)
    load_weights(model, weights)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


def _tokenizer(given: Path | None, weights: Path, config: Config) -> Tokenizer:
    path = given or weights / "tokenizer.model"
    if given is None and not path.is_file():
        raise UsageError(
            f"weights {weights}: there is no tokenizer.model with them: name their tokenizer with --tokenizer FILE "
            f"(the one that is shipped is {SHIPPED_TOKENIZER})"
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise UsageError(
            f"tokenizer {path}: its vocabulary has {tokenizer.vocab_size} tokens, the model's {config.vocab_size}: "
            "it is of another model; name the right one with --tokenizer FILE"
        )
    return tokenizer


def _prompts(prompts: Sequence[str], instructions: Sequence[str], about: str | None) -> list[str]:
    if not prompts and not instructions:
        raise UsageError("there is nothing to continue: give a text with --prompt or --instruction")
    if about is not None and len(instructions) != 1:
        raise UsageError(f"--input belongs to one --instruction, {len(instructions)} are given")
    given = [("--prompt", text) for text in prompts] + [("--instruction", text) for text in instructions]
    for option, text in given:
        if not text.strip():
            raise UsageError(f"{option} {json.dumps(text)} is empty: there is nothing to continue")
    return [*prompts, *(Instruction(text, about or "", "").prompt for text in instructions)]


def _device(device: str | None) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device on this machine: leave it out, or use cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _room_on_device() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"the GPU ran out of memory ({'. '.join(str(error).split('. ')[:2])}): continue fewer prompts at once, "
            "with fewer --beams, or with --set dtype=bf16 attention=sdpa"
        ) from error


def _text(tokenizer: Tokenizer, prompt: list[int], new: Sequence[int]) -> str:
    """What was added, with the space it may begin with: the first piece of a text decodes without."""
    return tokenizer.decode([*prompt, *new])[len(tokenizer.decode(prompt)) :]


@contextmanager
def _streamed(tokenizer: Tokenizer, prompt: list[int]) -> Iterator[OnToken]:
    """Prints the text as it comes; a character waits until all of its bytes are there."""
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
        "eos": "the model ended it",
        "length": f"--max-new-tokens {decoding.max_new_tokens} reached",
        "context": f"the context of {config.max_seq_len} tokens is full",
    }
    ends = ", ".join(why[one.ended_by] for one in found)
    click.echo(f"{tokens} tokens in {seconds:.1f} s ({ends})", err=True)


def main() -> None:
    """Run the command."""
    run_command(command, "python -m memscope.targets.llama2.generate")


if __name__ == "__main__":
    main()

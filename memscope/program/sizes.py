"""The options of a program's command line that set its micro-batch and its length."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from memscope.errors import UsageError
from memscope.program.command_line import CommandLine

__all__ = ["SizeOption", "SizeOptions", "size_options"]

_MICRO_BATCH = (
    "per_device_train_batch_size", "micro_batch_size", "micro_batch", "device_batch_size", "train_batch_size",
    "batch_size", "batchsize", "bs",
)  # fmt: skip
"""Usual names, what counts for one device first."""
_LENGTH = (
    "max_seq_length", "max_seq_len", "seq_length", "sequence_length", "sequence_len", "seq_len", "context_length",
    "block_size", "cutoff_len", "model_max_length", "max_length",
)  # fmt: skip
_JOINED = re.compile(r"(?P<name>-{0,2}[A-Za-z][\w.-]*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class SizeOption:
    """An option with a number."""

    name: str
    """As it is spelled: `--batch-size`, `train.batch_size`, or `BATCH_SIZE` of the environment."""
    value: int
    place: int | None
    """Index of the word that holds the number; None: it is a variable of the environment."""


@dataclass(frozen=True)
class SizeOptions:
    """The options of a program that set its sizes."""

    micro_batch: SizeOption
    length: SizeOption | None
    """None: no option sets the length."""

    def changed(self, program: CommandLine, micro_batch: int, length: int | None) -> CommandLine:
        """The program with other sizes."""
        program = _changed(program, self.micro_batch, micro_batch)
        return program if self.length is None or length is None else _changed(program, self.length, length)

    @property
    def told(self) -> str:
        """Which options are varied, as a sentence."""
        length = "" if self.length is None else f", and {self.length.name} for its length"
        return f"Each size is a run of the program with another {self.micro_batch.name}{length}."


def size_options(
    program: CommandLine, environment: Mapping[str, str], *, micro_batch: str | None = None, length: str | None = None
) -> SizeOptions:
    """Find the options that set a program's sizes.

    Args:
        program: the program.
        environment: its environment variables.
        micro_batch: name of the option for the micro-batch; None: one of the usual names.
        length: name of the option for the length; None: one of the usual names, if there is one.

    Raises:
        UsageError: the option is not found, or its value is no whole number from 1.
    """
    found = {**dict(_of_environment(environment)), **dict(_of_words(program.words))}
    batch = _chosen(found, _MICRO_BATCH, micro_batch)
    if batch is None:
        which = f'no option "{micro_batch}" with a value' if micro_batch else "no option that is known to set it"
        raise UsageError(
            f"fit changes the program's micro-batch, and its command line has {which}: write the option with its "
            f"value, for example memscope fit -- {' '.join(program.words)} --batch-size 8. If its name is not a usual "
            "one, add --batch-option NAME before --. A variable of the environment works too, such as BATCH_SIZE=8"
        )
    longer = _chosen(found, _LENGTH, length)
    if longer is None and length is not None:
        raise UsageError(
            f'the command line has no option "{length}" with a value, which --length-option names: add it to the '
            "program's command line"
        )
    return SizeOptions(_numbered(*batch), None if longer is None else _numbered(*longer))


_Found = tuple[str, str, int | None]
"""The name of an option as it is spelled, its value, and the place of its value."""


def _of_words(words: Sequence[str]) -> Iterator[tuple[str, _Found]]:
    """Options by plain name; of one that is given twice, the last one."""
    for place, word in enumerate(words):
        joined = _JOINED.fullmatch(word)
        if joined is not None:
            yield _plain(joined["name"]), (joined["name"], joined["value"], place)
        elif word.startswith("-") and place + 1 < len(words):
            yield _plain(word), (word, words[place + 1], place + 1)


def _of_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, _Found]]:
    for name, value in environment.items():
        if name.isupper():
            yield name.lower(), (name, value, None)


def _plain(name: str) -> str:
    """`--train.batch-size` as `batch_size`."""
    return name.lstrip("-").replace("-", "_").lower().rpartition(".")[2]


def _chosen(found: Mapping[str, _Found], usual: Sequence[str], named: str | None) -> _Found | None:
    names = usual if named is None else [_plain(named)]
    return next((found[name] for name in names if name in found), None)


def _numbered(name: str, value: str, place: int | None) -> SizeOption:
    if not value.isdecimal() or int(value) < 1:
        raise UsageError(f'{name} is "{value}", and fit needs a number to change: give a whole number from 1')
    return SizeOption(name, int(value), place)


def _changed(program: CommandLine, option: SizeOption, value: int) -> CommandLine:
    if option.place is None:
        env = shutil.which("env") or "env"
        return CommandLine(("env", f"{option.name}={value}", *program.words), env, program.name)
    words = list(program.words)
    joined = _JOINED.fullmatch(words[option.place])
    words[option.place] = f"{option.name}={value}" if joined and joined["name"] == option.name else str(value)
    return replace(program, words=tuple(words))

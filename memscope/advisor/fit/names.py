"""The settings of a target that make the size of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from memscope.advisor.fit.fitting import Size
from memscope.errors import UsageError

__all__ = ["SizeNames", "size_names", "sizes_of_target"]

_MICRO_BATCH = ("micro_batch", "micro_batch_size", "per_device_train_batch_size", "train_batch_size", "batch_size")
_SEQ_LEN = ("seq_len", "sequence_len", "sequence_length", "seq_length", "context_length", "block_size", "max_length")


@dataclass(frozen=True)
class SizeNames:
    """The names of two settings."""

    micro_batch: str
    seq_len: str | None
    """None: the target has no setting for the length."""

    def read(self, settings: Mapping[str, Any]) -> Size:
        """The size that a target's settings say.

        Raises:
            UsageError: they do not say the micro-batch.
        """
        micro_batch = settings.get(self.micro_batch)
        length = None if self.seq_len is None else settings.get(self.seq_len)
        if type(micro_batch) is not int or micro_batch < 1:
            raise UsageError(
                f"the target's setting {self.micro_batch} is {micro_batch!r}, and fit needs a number to change: "
                f"--set {self.micro_batch}=1"
            )
        return Size(micro_batch, length if type(length) is int and length > 0 else None)


def size_names(names: Iterable[str], target: str) -> SizeNames:
    """The names of the sizes among the settings of a target.

    Raises:
        UsageError: the target has no setting for the micro-batch.
    """
    given = [*names]
    micro_batch = next((name for name in _MICRO_BATCH if name in given), None)
    if micro_batch is None:
        raise UsageError(
            f'target "{target}" has no setting for the micro-batch, so fit cannot change it: expected a field of its '
            f"Config named {' or '.join(_MICRO_BATCH)}, and for the length one named {' or '.join(_SEQ_LEN)}; it has "
            f"{', '.join(given) or 'no setting'}"
        )
    return SizeNames(micro_batch, next((name for name in _SEQ_LEN if name in given), None))


def sizes_of_target(text: str, preset: str | None, settings: Mapping[str, str]) -> SizeNames:
    """The names of the sizes of a target. It imports the target: call it in a process of its own.

    Raises:
        MemscopeError: the target or its settings cannot be used, or it has no setting for the micro-batch.
    """
    import dataclasses

    from memscope.workload.target import find_target

    config = find_target(text).configure(preset, settings)
    return size_names([field.name for field in dataclasses.fields(config)], text)

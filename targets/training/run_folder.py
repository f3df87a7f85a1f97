"""The folder of a training run: its paths, and the record of its settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from memscope.errors import UsageError
from memscope.targets.training.files import JsonFile
from memscope.trace import write_whole

__all__ = ["RunFolder"]

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths of the files that a run reads and writes."""

    path: Path

    @property
    def job(self) -> Path:
        """The settings of the run."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """Metrics as lines of JSON: one per step, and one per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def board(self) -> Path:
        """The folder for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, one folder each."""
        return self.path / "checkpoints"

    @property
    def results(self) -> tuple[Path, Path]:
        """The folders for LoRA updates and for all weights; a run saves one of them at its end."""
        return self.path / "adapter", self.path / "weights"

    @property
    def finished(self) -> Path | None:
        """The saved result; None until the run is finished."""
        return next((path for path in self.results if path.exists()), None)

    def require_new(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds a run, unless `overwrite` is set.

        Raises:
            UsageError: the folder holds a run, or the path is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: -o takes a folder, for example -o runs/first")
        existing = self._own()
        if existing and not overwrite:
            go_on = "" if self.finished else f"resume that run (--resume {self.path}), "
            raise UsageError(
                f"{existing[0]} already exists: {go_on}choose another folder with -o, or overwrite it with -f"
            )

    def _own(self) -> list[Path]:
        own = (self.job, self.metrics, self.board, self.checkpoints, *self.results)
        return [path for path in own if path.exists()]

    def begin(self, settings: Mapping[str, str]) -> None:
        """Create the folder, remove any run that it holds, and write down the settings. Other files stay.

        Raises:
            UsageError: the folder cannot be created.
        """
        for path in self._own():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path}: the folder cannot be created ({error.strerror}): choose another one with -o"
            ) from error
        self.note(settings)

    def note(self, settings: Mapping[str, str]) -> None:
        """Write down the settings of the run.

        Raises:
            TraceFileError: the file cannot be written.
        """
        document = {"schema_version": _SCHEMA_VERSION, "settings": dict(settings)}
        write_whole(self.job, (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode())

    def read_settings(self) -> dict[str, str]:
        """Read the settings of the run.

        Raises:
            UsageError: the folder holds no run, or its schema version is not the one of this memscope.
        """
        if not self.job.is_file():
            raise UsageError(
                f"{self.path}: no run to resume: the folder has no {self.job.name}, which every run writes first"
            )
        document = JsonFile.read(self.job)
        version, settings = document.values.get("schema_version"), document.values.get("settings")
        if version != _SCHEMA_VERSION or not isinstance(settings, dict):
            raise UsageError(
                f"{self.job}: schema version {json.dumps(version)}, but this memscope reads {_SCHEMA_VERSION}: "
                "resume the run with the version of memscope that started it"
            )
        return {key: str(value) for key, value in settings.items()}

"""The folder of a fine-tuning run: where everything is, and what run it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from memscope.errors import UsageError
from memscope.targets.llama2.files import JsonFile
from memscope.targets.llama2.job import Job
from memscope.trace import write_whole

__all__ = ["RunFolder"]

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Paths of what a run reads and leaves."""

    path: Path

    @property
    def job(self) -> Path:
        """What run it is."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One line of JSON a step."""
        return self.path / "metrics.jsonl"

    @property
    def board(self) -> Path:
        """For TensorBoard."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder each."""
        return self.path / "checkpoints"

    @property
    def results(self) -> tuple[Path, Path]:
        """Where LoRA updates, or all weights, are saved at the end."""
        return self.path / "adapter", self.path / "weights"

    @property
    def finished(self) -> Path | None:
        """What was saved at the end; None as long as the run is not over."""
        return next((path for path in self.results if path.exists()), None)

    def require_new(self, *, overwrite: bool) -> None:
        """Refuse a folder with a run in it, unless that is to be overwritten.

        Raises:
            UsageError: says what is there, or that it is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: -o takes a folder, for example -o runs/first")
        existing = self._own()
        if existing and not overwrite:
            go_on = "" if self.finished else f"go on with that run (--resume {self.path}), "
            raise UsageError(
                f"{existing[0]} exists already: {go_on}choose another folder with -o, or overwrite it with -f"
            )

    def _own(self) -> list[Path]:
        own = (self.job, self.metrics, self.board, self.checkpoints, *self.results)
        return [path for path in own if path.exists()]

    def begin(self, job: Job) -> None:
        """Make the folder without the run that may be in it, and note what run it is; other files stay.

        Raises:
            UsageError: when it cannot be made.
        """
        for path in self._own():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self.path}: the folder cannot be made ({error.strerror}): choose another one with -o"
            ) from error
        self.note(job)

    def note(self, job: Job) -> None:
        """Write down what run it is.

        Raises:
            TraceFileError: when that cannot be written.
        """
        document = {"schema_version": _SCHEMA_VERSION, "settings": job.settings}
        write_whole(self.job, (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode())

    def read_job(self) -> Job:
        """What run it is.

        Raises:
            UsageError: when there is none, or it was written by a newer memscope.
        """
        if not self.job.is_file():
            raise UsageError(
                f"{self.path}: no run to go on with: it has no {self.job.name}, which every run begins with"
            )
        document = JsonFile.read(self.job)
        version, settings = document.values.get("schema_version"), document.values.get("settings")
        if version != _SCHEMA_VERSION or not isinstance(settings, dict):
            raise UsageError(
                f"{self.job}: schema version {json.dumps(version)}, this memscope reads {_SCHEMA_VERSION}: "
                "go on with the version that began the run"
            )
        return Job.of({key: str(value) for key, value in settings.items()})

"""Data loaders of a simulated program load in its own process.

A worker process is a copy of the program, with the simulation half inside; the order of samples is the same without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import dataloader as torch_dataloader
from torch.utils.data._utils import worker as torch_worker

from memscope.simulation.facade.stand_in import replaced

__all__ = ["loaders_stay_here"]


@contextlib.contextmanager
def loaders_stay_here(note: Callable[[str], None]) -> Iterator[None]:
    """Let `DataLoader(num_workers=N)` load its batches itself; `note` is told."""
    begin: Callable[[DataLoader[Any]], Any] = DataLoader._get_iterator

    def get_iterator(loader: DataLoader[Any]) -> Any:
        if not loader.num_workers:
            with replaced(loader, "pin_memory", False):  # it would warn that the machine has no GPU
                return begin(loader)
        note(f"a DataLoader with {loader.num_workers} workers loads its batches in the program's own process")
        return _Here(loader)

    with replaced(DataLoader, "_get_iterator", get_iterator):
        yield


class _Here(torch_dataloader._SingleProcessDataLoaderIter):
    """Iterates over a loader that has workers, without them; the data set sees one worker."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        with replaced(loader, "num_workers", 0), replaced(loader, "timeout", 0), replaced(loader, "pin_memory", False):
            super().__init__(loader)
        seed = int(self._base_seed)
        self._worker = torch_worker.WorkerInfo(id=0, num_workers=1, seed=seed, dataset=loader.dataset)
        if loader.worker_init_fn is not None:
            with self._inside():
                loader.worker_init_fn(0)

    def _reset(self, loader: DataLoader[Any], first_iter: bool = False) -> None:
        """Begin another epoch with persistent workers."""
        self.__init__(loader)  # type: ignore[misc]

    def _next_data(self) -> Any:
        with self._inside():
            return super()._next_data()  # type: ignore[no-untyped-call]

    def _inside(self) -> contextlib.AbstractContextManager[None]:
        """Code that runs in a worker; see `torch.utils.data.get_worker_info`."""
        return replaced(torch_worker, "_worker_info", self._worker)

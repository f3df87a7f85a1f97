"""`torch.distributed` in a simulated program of one process, as `torchrun --nproc-per-node 1` starts it.

A process group of one needs no communication. DistributedDataParallel keeps its buckets: they take memory, as large as
the gradients, in one process too. Sharded training is refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from memscope.simulation.machine.libraries import Changes
from memscope.simulation.machine.places import Places
from memscope.simulation.refusal import NotSimulated

__all__ = ["one_process"]


def one_process(places: Places, note: Callable[[str], None]) -> Changes:
    """The changes that let a program initialize `torch.distributed`; `note` is told what is not counted then."""

    def serving(module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
        """What is made without arguments inside, such as buckets, is where the parameters are."""
        return places.calling(None, "floats" if places.any_on_gpu(module.parameters()) else False)

    def init_process_group(original: Callable[..., None]) -> Callable[..., None]:
        def init(backend: Any = None, init_method: Any = None, *args: Any, **kwargs: Any) -> None:
            asked = kwargs.get("world_size", -1)
            size = asked if asked > 0 else int(os.environ.get("WORLD_SIZE", "1"))
            if size != 1:
                raise NotSimulated(
                    f"torch.distributed.init_process_group was called for {size} processes, which cannot be simulated "
                    "yet: start the program with one, for example torchrun --nproc-per-node 1"
                )
            from torch.testing._internal.distributed.fake_pg import FakeStore

            note("torch.distributed has one process: nothing is communicated, and NCCL's own memory is not counted")
            original("fake", store=FakeStore(), rank=0, world_size=1)

        return init

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        def wrapped(
            model: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            _broadcast(module, kwargs.get("process_group"), with_buffers=kwargs.get("broadcast_buffers", True))
            with serving(module):
                original(model, module, None, None, *args, **{**kwargs, "init_sync": False})
            model._register_builtin_comm_hook = model.register_comm_hook = _refused(
                "DistributedDataParallel.register_comm_hook", "a hook may change what is communicated"
            )
            register = torch.nn.parallel.DistributedDataParallel.register_comm_hook
            register(model, None, lambda state, bucket: _done(bucket.buffer()))

        return wrapped

    def prepare(original: Callable[..., Any]) -> Callable[..., Any]:
        def prepared(model: Any, *args: Any, **kwargs: Any) -> Any:
            with serving(model):  # the second step makes the buckets again
                return original(model, *args, **kwargs)

        return prepared

    def sharded(name: str) -> Callable[[Any], Callable[..., Any]]:
        return lambda original: _refused(name, "sharded training is not simulated yet")

    return {
        "torch.distributed.distributed_c10d": {"init_process_group": init_process_group},
        "torch.nn.parallel.distributed": {
            "DistributedDataParallel.__init__": wrap,
            "DistributedDataParallel._pre_forward": prepare,
        },
        "torch.distributed.fsdp.fully_sharded_data_parallel": {
            "FullyShardedDataParallel.__init__": sharded("FullyShardedDataParallel")
        },
        "torch.distributed.fsdp._fully_shard._fully_shard": {"fully_shard": sharded("fully_shard")},
    }


def _broadcast(module: torch.nn.Module, group: Any, *, with_buffers: bool) -> None:
    """Broadcast the model's state as DistributedDataParallel does first, in copies of up to 250 MiB.

    PyTorch also compares shapes between the processes, in a few bytes, by an operation that reads them. Source:
    `DistributedDataParallel.__init__` in torch/nn/parallel/distributed.py (2.13).
    """
    from torch.distributed import distributed_c10d
    from torch.distributed.utils import _sync_module_states

    group = group or distributed_c10d._get_default_group()
    _sync_module_states(module, group, 250 * 2**20, 0, set(), with_buffers)


def _done(gradients: Any) -> Any:
    """The gradients of one process are their own mean."""
    future: Any = torch.futures.Future()
    future.set_result(gradients)
    return future


def _refused(name: str, why: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotSimulated(f"{name} cannot be simulated: {why}. Record a real run, or leave it out")

    return refuse

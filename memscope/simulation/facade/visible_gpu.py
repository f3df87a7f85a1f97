"""The simulated GPU in PyTorch's API: a target's tensors report `cuda`, and `torch.cuda` describes the device.

PyTorch is restored when the context is left, also by an exception.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from memscope.allocator.settings import AllocatorSettings
from memscope.simulation.cuda.packaged import cudnn_version
from memscope.simulation.devices.catalogue import Device
from memscope.simulation.facade.build import version_says_cuda, version_says_what_is_installed
from memscope.simulation.facade.memory import GpuMemory, total_bytes
from memscope.simulation.facade.stand_in import is_target, replaced, tensors_say_cuda
from memscope.simulation.facade.streams import one_stream
from memscope.simulation.refusal import no_answer

__all__ = ["VisibleGpu"]


class VisibleGpu:
    """Context in which a target's code sees a GPU.

    Attributes:
        memory: its memory.
        notes: texts for the trace, about calls that a simulation answers without following them.
    """

    def __init__(
        self,
        device: Device,
        settings: AllocatorSettings,
        tensors: Callable[[Callable[[], None]], contextlib.AbstractContextManager[None]] = tensors_say_cuda,
        answers: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Prepare to show a device.

        Args:
            device: the device.
            settings: of PyTorch's allocator.
            tensors: makes tensors report where they are, see `tensors_say_cuda`.
            answers: functions and classes of `torch.cuda` in place of those here, by name.
        """
        self._tensors, self._answers = tensors, dict(answers)
        self.memory = GpuMemory(device, settings)
        self.notes: list[str] = []
        self._device = device
        self._scopes = contextlib.ExitStack()
        self._replaced: list[tuple[Any, str, Any]] = []
        """Owner, name and original of everything that has another answer inside."""

    def __enter__(self) -> VisibleGpu:
        answers = self._cuda()
        with contextlib.ExitStack() as scopes:
            for owner, found in (
                (torch.cuda, answers),
                (torch.cuda.memory, answers),
                (torch.accelerator, self._accelerator()),
                *_how_built(),
            ):
                for name in [name for name in found if hasattr(owner, name)]:
                    original = getattr(owner, name)
                    self._replaced.append((owner, name, original))
                    scopes.enter_context(replaced(owner, name, _for_targets(found[name], original)))
            scopes.enter_context(version_says_cuda())
            scopes.enter_context(self._tensors(self._record_stream))
            self._scopes = scopes.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._scopes.__exit__(*exception)

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Let `torch.cuda` answer as the machine is."""
        with contextlib.ExitStack() as scopes:
            scopes.enter_context(version_says_what_is_installed())
            for owner, name, original in self._replaced:
                scopes.enter_context(replaced(owner, name, original))
            yield

    # The answers of torch.cuda and torch.accelerator.

    def _cuda(self) -> dict[str, Callable[..., Any]]:
        device = self._device
        major, minor = device.capability
        properties = SimpleNamespace(
            name=device.vendor_name,
            major=major,
            minor=minor,
            total_memory=total_bytes(device),
            multi_processor_count=device.multiprocessors,
        )
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (major, minor),
            "get_device_properties": lambda device=None: properties,
            "is_bf16_supported": lambda including_emulation=True: including_emulation or major >= 8,
            "is_tf32_supported": lambda: major >= 8,
            "is_current_stream_capturing": lambda: False,
            "device": contextlib.nullcontext,
            "get_rng_state": lambda device=None: torch.get_rng_state(),
            "get_rng_state_all": lambda: [torch.get_rng_state()],
            "initial_seed": torch.initial_seed,
            "get_allocator_backend": lambda: "native",
            "get_sync_debug_mode": lambda: 0,
            **one_stream(self._note),
            **self.memory.answers(),
            **dict.fromkeys(_NOTHING_TO_DO, _nothing),
            **{name: _refused(f"torch.cuda.{name}", why) for name, why in _REFUSED.items()},
            **self._answers,
        }

    def _accelerator(self) -> dict[str, Callable[..., Any]]:
        return {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device_index": lambda: 0,
            "current_accelerator": lambda check_available=False: torch.device("cuda"),
            "synchronize": _nothing,
            **self.memory.answers(),
        }

    def _record_stream(self) -> None:
        self._note(_RECORD_STREAM)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


_NOTHING_TO_DO = (
    "init", "ipc_collect", "manual_seed", "manual_seed_all", "reset_accumulated_memory_stats", "seed", "seed_all",
    "set_device", "set_rng_state", "set_rng_state_all", "set_sync_debug_mode", "synchronize",
)  # fmt: skip
_RECORD_STREAM = (
    "record_stream was called, but everything is simulated on one stream: memory is freed when its tensor dies. On a "
    "GPU, another stream may still use it, and reserved memory is then higher"
)
_MEASURED = "no GPU runs whose state could be read"
_BUILD = "it depends on the build of PyTorch that will run; torch.cuda.get_device_capability() tells what the GPU needs"
_HANDLES = "no CUDA library is loaded"
_TOTALS = "use torch.cuda.memory_allocated(), memory_reserved() or memory_stats(), or read the trace afterwards"
_REFUSED = {
    **dict.fromkeys(("CUDAGraph", "graph", "make_graphed_callables"), "CUDA graphs are not simulated"),
    **dict.fromkeys(("memory_summary", "memory_snapshot", "memory_stats_as_nested_dict"), _TOTALS),
    **dict.fromkeys(("utilization", "temperature", "power_draw", "clock_rate", "list_gpu_processes"), _MEASURED),
    **dict.fromkeys(("memory_usage", "host_memory_stats", "host_memory_stats_as_nested_dict"), _MEASURED),
    **dict.fromkeys(("get_arch_list", "get_gencode_flags"), _BUILD),
    **dict.fromkeys(("cudart", "current_blas_handle", "current_solver_handle"), _HANDLES),
    **dict.fromkeys(("MemPool", "use_mem_pool"), "pools of your own are not simulated"),
    "set_per_process_memory_fraction": "choose a smaller device instead",
}
"""Function of torch.cuda → the reason why it has no answer."""


def _how_built() -> list[tuple[Any, dict[str, Callable[..., Any]]]]:
    """Modules that tell how PyTorch was built, and the answers of each."""
    cudnn = cudnn_version()
    nccl = _refused("torch.cuda.nccl.version", "the GPU is alone, so NCCL is not loaded")
    return [
        (torch.backends.cuda, {"is_built": lambda: True}),
        (torch.backends.cudnn, {"is_available": lambda: True, "version": lambda: cudnn}),
        (torch.cuda.nccl, {"version": nccl}),
    ]


def _refused(name: str, why: str) -> type:
    """Replacement of a function or class that refuses every call."""

    def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
        raise no_answer(name, why)

    return type(name, (), {"__new__": refuse})


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _for_targets(answer: Any, original: Any) -> Any:
    """The answer for targets, and the original for PyTorch's own code. A class is replaced for both."""
    if isinstance(original, type):
        return answer

    def asked(*args: Any, **kwargs: Any) -> Any:
        return (answer if is_target(sys._getframe(1)) else original)(*args, **kwargs)

    return asked

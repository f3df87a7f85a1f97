"""Which module is at work: in the forward pass from module hooks, in the backward pass from the autograd graph.

Autograd numbers its nodes as the forward pass creates them. Noting that number whenever a module begins or ends tells,
later and without any hook on a tensor, whose forward a backward node belongs to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import graph
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["ROOT", "ModuleStack"]

ROOT = "(model)"
"""Name of the model itself; its modules are named as in `named_modules()`."""

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


class ModuleStack:
    """Follows a model's modules while it is entered; leaves no hook behind.

    Attributes:
        names: table of the module names seen; other tables index it.
        current: index of the innermost module at work, 0 (the model itself) when there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_call: Callable[[bool], None],
        on_return: Callable[[bool], None],
    ) -> None:
        """Prepare to follow; the callbacks are for calls that the training loop itself makes.

        Args:
            model: whose modules to follow.
            on_call: the model (True) or a module of it (False) is called, be it by a module that wraps the model.
            on_return: its call has ended.
        """
        self._model = model
        self._on_call, self._on_return = on_call, on_return
        self.names: list[str] = [ROOT]
        self._index: dict[str, int] = {ROOT: 0}
        self._of_module: dict[int, int] = {}
        self._of_parameter: dict[int, int] = {}
        self.refresh()
        self._stack: list[int] = []
        self._of_model_at_work = 0
        self.current = 0
        self._nodes: list[int] = [0]
        self._owners: list[int] = [0]
        self._hooks: list[Any] = []

    def refresh(self) -> None:
        """Learn the names of modules and parameters again, after the model was changed."""
        for name, module in self._model.named_modules():
            code = self._of_module[id(module)] = self.code(name or ROOT)
            for parameter in module.parameters(recurse=False):
                self._of_parameter.setdefault(id(parameter), code)

    def code(self, name: str) -> int:
        """Index of a name in `names`, added when it is new."""
        if name not in self._index:
            self._index[name] = len(self.names)
            self.names.append(name)
        return self._index[name]

    def __enter__(self) -> ModuleStack:
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._stack, self._of_model_at_work, self.current = [], [], 0, 0

    def _enter(self, module: nn.Module, args: Any) -> None:
        code = self._of_module.get(id(module))
        if code is None:
            code = self.code(type(module).__name__)
        else:
            if not self._of_model_at_work and _current_task() < 0:
                self._on_call(module is self._model)
            self._of_model_at_work += 1
        self._stack.append(code)
        self._switch(code)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        left = self._stack.pop() if self._stack else 0
        if self._stack:
            self._switch(self._stack[-1])
        elif _current_task() < 0:
            self._switch(0)
        else:  # recomputation of a checkpointed region: what follows belongs to the region's own module
            self._switch(self.code(self.names[left].rpartition(".")[0] or ROOT))
        if id(module) in self._of_module:
            self._of_model_at_work -= 1
            if not self._of_model_at_work and _current_task() < 0:
                self._on_return(module is self._model)

    def _switch(self, code: int) -> None:
        self.current = code
        number = _sequence_number()
        if number >= self._nodes[-1]:  # another thread (the backward pass on CUDA) counts nodes of its own
            self._nodes.append(number)
            self._owners.append(code)

    @property
    def is_idle(self) -> bool:
        """No module's forward is running."""
        return not self._stack

    def of_node(self, node: graph.Node | None) -> int:
        """Index of the module whose forward created a backward node; of a gradient's accumulation, the parameter's."""
        if node is None:
            return 0
        number = node._sequence_nr()
        if number > self._nodes[-1] and hasattr(node, "variable"):
            return self._of_parameter.get(id(node.variable), 0)
        return self._owners[bisect_right(self._nodes, number) - 1]

    def of_parameter(self, parameter: torch.Tensor) -> int:
        """Index of the module that owns a parameter."""
        return self._of_parameter.get(id(parameter), 0)

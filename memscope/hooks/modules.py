"""Find the running module: in the forward pass from module hooks, in the backward pass from the autograd graph.

Autograd numbers its nodes as the forward pass creates them. The stack notes that number whenever a module begins or
ends. Later, without any hook on a tensor, the number of a backward node identifies the module whose forward created it.
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
"""Name of the model itself; its submodules have their names of `named_modules()`."""

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


class ModuleStack:
    """Follows the running modules of a model while it is entered; removes its hooks on leaving.

    Attributes:
        names: table of the module names seen; other tables index it.
        stack: indices of the running modules, the outermost first; empty if no module's forward is running.
        current: index of the innermost running module; 0 (the model itself) if no module is running.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_call: Callable[[bool], None],
        on_return: Callable[[bool], None],
    ) -> None:
        """Prepare to follow. The callbacks report calls made by the training loop itself.

        Args:
            model: the model whose modules to follow.
            on_call: called when the model (True) or one of its modules (False) is called, also by a wrapper.
            on_return: called when that call has ended.
        """
        self._model = model
        self._on_call, self._on_return = on_call, on_return
        self.names: list[str] = [ROOT]
        self._index: dict[str, int] = {ROOT: 0}
        self._known_built: list[Any] = []
        self._of_module: dict[int, int] = {}
        self._of_parameter: dict[int, int] = {}
        self.refresh()
        self.stack: list[int] = []
        self._of_model_at_work = 0
        self.current = 0
        self._nodes: list[int] = [0]
        self._owners: list[int] = [0]
        self._hooks: list[Any] = []

    def refresh(self) -> None:
        """Read the names of modules and parameters again, if the model has changed."""
        built = self._built()
        if built == self._known_built:
            return
        self._known_built = built
        self._of_module, self._of_parameter = {}, {}
        for name, module in self._model.named_modules():
            code = self._of_module[id(module)] = self.code(name or ROOT)
            for parameter in module.parameters(recurse=False):
                self._of_parameter.setdefault(id(parameter), code)

    def _built(self) -> list[Any]:
        """What names follow from: each module with its children, their keys and its parameters, by id.

        An object at the address of one that died has another key or another place, or the same name.
        """
        built: list[Any] = []
        modules, known = [self._model], {id(self._model)}
        for module in modules:  # grows during the loop
            children = module._modules
            built += [id(module), len(children), *children, *map(id, module._parameters.values())]
            for child in children.values():
                if child is not None and id(child) not in known:
                    known.add(id(child))
                    modules.append(child)
        return built

    def code(self, name: str) -> int:
        """Index of a name in `names`; a new name is added."""
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
        self._hooks, self.stack, self._of_model_at_work, self.current = [], [], 0, 0

    def _enter(self, module: nn.Module, args: Any) -> None:
        code = self._of_module.get(id(module))
        if code is None:
            code = self.code(type(module).__name__)
        else:
            if not self._of_model_at_work and _current_task() < 0:
                self._on_call(module is self._model)
            self._of_model_at_work += 1
        self.stack.append(code)
        self._switch(code)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        left = self.stack.pop() if self.stack else 0
        if self.stack:
            self._switch(self.stack[-1])
        elif _current_task() < 0:
            self._switch(0)
        else:  # recomputation of a checkpointed region: the operators that follow belong to the region's own module
            self._switch(self.code(self.names[left].rpartition(".")[0] or ROOT))
        if id(module) in self._of_module:
            self._of_model_at_work -= 1
            if not self._of_model_at_work and _current_task() < 0:
                self._on_return(module is self._model)

    def _switch(self, code: int) -> None:
        self.current = code
        number = _sequence_number()
        if number >= self._nodes[-1]:  # another thread (the backward pass on CUDA) numbers its own nodes
            self._nodes.append(number)
            self._owners.append(code)

    def of_node(self, node: graph.Node | None) -> int:
        """Index of the module whose forward created a backward node; for a gradient accumulation, its parameter's."""
        if node is None:
            return 0
        number = node._sequence_nr()
        if number > self._nodes[-1] and hasattr(node, "variable"):
            return self._of_parameter.get(id(node.variable), 0)
        return self._owners[bisect_right(self._nodes, number) - 1]

    def of_parameter(self, parameter: torch.Tensor) -> int:
        """Index of the module that owns a parameter."""
        return self._of_parameter.get(id(parameter), 0)

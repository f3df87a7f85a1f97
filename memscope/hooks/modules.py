"""Find the running module: in the forward pass from module hooks, in the backward pass from the autograd graph.

Autograd numbers its nodes as the forward pass creates them. The stack notes that number whenever a module begins or
ends. Later, without any hook on a tensor, the number of a backward node identifies the module whose forward created it.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import graph
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["ROOT", "ModuleStack", "class_of", "original_name"]

ROOT = "(model)"
"""Name of the model itself; its submodules have their names of `named_modules()`."""
_ORIGINAL = "_orig_mod"
"""Where a module that `torch.compile` returned holds the original (torch/_dynamo/eval_frame.py, `OptimizedModule`)."""

_current_task: Callable[[], int] = torch._C._current_graph_task_id
_sequence_number: Callable[[], int] = torch.autograd._get_sequence_nr  # type: ignore[attr-defined]


def original_name(name: str) -> str:
    """A name of `named_modules()` without the levels that `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != _ORIGINAL)


def class_of(model: nn.Module) -> str:
    """The name of a model's class; of a compiled one, that of the original."""
    return type(getattr(model, _ORIGINAL, model)).__name__


class ModuleStack:
    """Follows the running modules of some models while it is entered; removes its hooks on leaving.

    Names of modules are those of `named_modules()`, and the first model is `ROOT`. A further model is named after its
    class; the names of its modules begin with that name.

    Attributes:
        names: table of the module names seen; other tables index it.
        stack: indices of the running modules, the outermost first; empty if no module's forward is running.
        current: index of the innermost running module.
        called_last: index of the model that was called last, to which belongs what runs outside all modules.
    """

    def __init__(
        self,
        *models: nn.Module,
        on_call: Callable[[bool], None],
        on_return: Callable[[bool], None],
        on_unknown: Callable[[nn.Module], None] = lambda module: None,
        name_of: Callable[[str], str] = lambda name: name,
    ) -> None:
        """Prepare to follow. The callbacks report calls made by the training loop itself.

        Args:
            models: the models whose modules to follow.
            on_call: called when a model (True) or one of its modules (False) is called, also by a wrapper.
            on_return: called when that call has ended.
            on_unknown: called before a module of no model is called, which may then be added.
            name_of: the name of a module in the table, from that of `named_modules()`.
        """
        self._models: dict[int, tuple[str, nn.Module]] = {}
        self._on_call, self._on_return, self._on_unknown = on_call, on_return, on_unknown
        self._name_of = name_of
        self.names: list[str] = [ROOT]
        self._index: dict[str, int] = {ROOT: 0}
        self._known_built: list[Any] = []
        self._of_module: dict[int, int] = {}
        self._of_parameter: dict[int, int] = {}
        self._model_of: dict[int, int] = {}
        for model in models:
            self.add(model)
        self.stack: list[int] = []
        self._of_model_at_work = 0
        self.current = self.called_last = 0
        self._nodes: list[int] = [0]
        self._owners: list[int] = [0]
        self._hooks: list[Any] = []

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by their names."""
        return {name or ROOT: model for name, model in self._models.values()}

    def add(self, model: nn.Module) -> None:
        """Follow another model, too. Models that are part of it are followed as such from now on."""
        if self._models:
            known, kind = {name for name, _ in self._models.values()}, class_of(model)
            names = (kind if count == 1 else f"{kind}-{count}" for count in itertools.count(1))
            name = next(name for name in names if name not in known)
        else:
            name = ""
        self._models[id(model)] = name, model
        self.refresh()

    def refresh(self) -> None:
        """Read the names of modules and parameters again, if the model has changed."""
        built = self._built()
        if built == self._known_built:
            return
        self._known_built = built
        self._of_module, self._of_parameter, self._model_of = {}, {}, {}
        for prefix, model in self._models.values():
            whole = self.code(prefix or ROOT)
            for name, module in model.named_modules(prefix=prefix):
                code = self._of_module.setdefault(id(module), self.code(self._name_of(name) or ROOT))
                self._model_of.setdefault(id(module), whole)
                for parameter in module.parameters(recurse=False):
                    self._of_parameter.setdefault(id(parameter), code)

    def _built(self) -> list[Any]:
        """What names follow from: each module with its children, their keys and its parameters, by id.

        An object at the address of one that died has another key or another place, or the same name.
        """
        built: list[Any] = []
        modules, known = [model for _, model in self._models.values()], set(self._models)
        for module in modules:  # grows during the loop
            children = module._modules
            built += [id(module), len(children), *children.keys(), *map(id, module._parameters.values())]
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
            register_module_forward_pre_hook(self.enter_call),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.stack, self._of_model_at_work, self.current, self.called_last = [], [], 0, 0, 0

    def enter_call(self, module: nn.Module, args: Any = ()) -> None:
        """A module is called: its hook says so, or for a call that has already begun, the recorder."""
        code = self._of_module.get(id(module))
        if code is None and not self.stack and _current_task() < 0:
            self._on_unknown(module)
            code = self._of_module.get(id(module))
        if code is None:
            code = self.code(type(module).__name__)
        else:
            if not self._of_model_at_work and _current_task() < 0:
                self._on_call(id(module) in self._models)
            self._of_model_at_work += 1
        self.stack.append(code)
        self._switch(code)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        left = self.stack.pop() if self.stack else 0
        if self.stack:
            self._switch(self.stack[-1])
        elif _current_task() < 0:
            self.called_last = self._model_of.get(id(module), self.called_last)
            self._switch(self.called_last)
        else:  # recomputation of a checkpointed region: the operators that follow belong to the region's own module
            self._switch(self.code(self.names[left].rpartition(".")[0] or ROOT))
        if id(module) in self._of_module:
            self._of_model_at_work -= 1
            if not self._of_model_at_work and _current_task() < 0:
                self._on_return(id(module) in self._models)

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

    def of_module(self, module: nn.Module) -> int:
        """Index of a module of one of the models."""
        return self._of_module[id(module)]

    def of_parameter(self, parameter: torch.Tensor) -> int:
        """Index of the module that owns a parameter."""
        return self._of_parameter.get(id(parameter), 0)

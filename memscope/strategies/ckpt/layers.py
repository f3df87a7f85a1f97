"""The modules that are a model's layers, and the layers that a text chooses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import nn

from memscope.errors import UsageError, nearest

__all__ = ["chosen_layers", "list_of", "named_layers", "planned_layers", "repeated_layers"]

_LISTS = (nn.ModuleList, nn.Sequential)
_STAGE = 2
"""Ratio of parameters from which items of a list that hold lists themselves are stages rather than layers."""


def named_layers(model: nn.Module, layer_list: str = "") -> dict[str, nn.Module]:
    """The model's layers in order, by their names in the model.

    Args:
        model: the model.
        layer_list: names of lists (`nn.ModuleList` or `nn.Sequential`) of layers, joined by +; empty:
            `repeated_layers`.

    Raises:
        UsageError: when the model has no such list.
    """
    if layer_list:
        return {name: layer for word in layer_list.split("+") for name, layer in _named_list(model, word).items()}
    layers = repeated_layers(model)
    if not layers:
        raise UsageError(
            "the model has no list of repeated layers (nn.ModuleList or nn.Sequential of modules with parts of their "
            "own, or of one class) to choose from"
        )
    return layers


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of all lists of repeated layers, by name, in the order of the model; empty if it has none.

    A list is an `nn.ModuleList` or `nn.Sequential` whose items all have parameters and children, be they of one class
    or of several. Lists inside a layer do not count, with two exceptions: the items of a list give way to the lists
    inside them if they are stages, as in a ResNet or a Swin transformer (each holds a list, and their sizes differ by
    `_STAGE` or more), and if they are different parts of a model, each of a class of its own.

    In a model without such lists, those of two or more modules of one class without children count, such as a stack of
    `nn.Linear`.
    """
    return dict(_layers_in("", model, _are_layers, set())) or dict(_layers_in("", model, _are_simple_layers, set()))


def _layers_in(
    name: str, module: nn.Module, are_layers: Callable[[Sequence[nn.Module]], bool], seen: set[int]
) -> Iterator[tuple[str, nn.Module]]:
    """The layers of all lists in a module, itself included; a module with two names is looked at once."""
    if id(module) in seen:
        return
    seen.add(id(module))
    items = _items(name, module)
    inside = {key: dict(_layers_in(key, item, are_layers, seen)) for key, item in items.items()}
    if isinstance(module, _LISTS) and are_layers([*items.values()]) and not _give_way(items, inside):
        yield from items.items()
    else:
        for layers in inside.values():
            yield from layers.items()


def _are_layers(items: Sequence[nn.Module]) -> bool:
    return bool(items) and all(
        _size(item) and not isinstance(item, (nn.ModuleList, nn.ModuleDict)) and any(True for _ in item.children())
        for item in items
    )


def _are_simple_layers(items: Sequence[nn.Module]) -> bool:
    return len(items) > 1 and len({*map(type, items)}) == 1 and _size(items[0]) > 0 and not [*items[0].children()]


def _give_way(items: dict[str, nn.Module], inside: dict[str, dict[str, nn.Module]]) -> bool:
    """Whether the items of a list are larger than layers, and the lists inside them hold the layers."""
    if len({*map(type, items.values())}) == len(items) > 1 and any(inside.values()):
        return True
    sizes = [_size(item) for item in items.values()]
    return all(inside.values()) and max(sizes) >= _STAGE * min(sizes)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _named_list(model: nn.Module, name: str) -> dict[str, nn.Module]:
    lists = {name: _items(name, module) for name, module in model.named_modules() if isinstance(module, _LISTS)}
    lists = {name: layers for name, layers in lists.items() if layers}
    if name not in lists:
        hint = nearest(name, filter(None, lists))
        raise UsageError(f'the model has no nn.ModuleList or nn.Sequential "{name}" with layers in it: {hint}')
    return lists[name]


def _items(name: str, modules: nn.Module) -> dict[str, nn.Module]:
    # Not named_children: it leaves out a layer that is used twice.
    return {f"{name}.{key}" if name else key: child for key, child in modules._modules.items() if child is not None}


def list_of(model: nn.Module, layer: str) -> str:
    """Name of the list that a layer belongs to; its own name if it is in none."""
    parent = layer.rpartition(".")[0]
    return parent if isinstance(model.get_submodule(parent), _LISTS) else layer


def planned_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a plan, by name: of every list that the plan names, all modules, in the order of that list.

    Names outside any list come as they are. Names that the model does not have are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    lists: dict[str, list[tuple[str, nn.Module]]] = {}
    found: dict[str, nn.Module] = {}
    for name in names:
        parent = name.rpartition(".")[0]
        if isinstance(modules.get(parent), _LISTS):
            # The first layer of the plan that belongs to a list stands for the first of that list, and so on.
            left = lists.setdefault(parent, [*_items(parent, modules[parent]).items()])
            found.update([left.pop(0)] if left else [])
        elif name in modules:
            found[name] = modules[name]
    return found | {name: module for left in lists.values() for name, module in left}


def chosen_layers(text: str, count: int) -> list[int]:
    """Indices that `all`, `every-2`, `0-15`, `3+7+11` choose out of `count` layers, in order.

    Raises:
        UsageError: when the text is malformed, or an index is outside the model.
    """
    chosen: set[int] = set()
    for word in text.split("+"):
        every, span = re.fullmatch(r"every-([1-9]\d*)", word), re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if word == "all":
            chosen |= set(range(count))
        elif every:
            chosen |= set(range(0, count, int(every[1])))
        elif span:
            first, last = int(span[1]), int(span[2] or span[1])
            if last < first:
                raise UsageError(f'"{word}" runs backwards: write {last}-{first}')
            if last >= count:
                raise UsageError(f'"{word}" is outside the model: it has layers 0 to {count - 1}')
            chosen |= set(range(first, last + 1))
        else:
            raise UsageError(
                f'"{word}" chooses no layers: expected all, every-2, 0-15, or numbers joined by +, such as 3+7+11'
            )
    return sorted(chosen)

"""The modules that are a model's layers, and the layers that a text chooses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from memscope.errors import UsageError, nearest

__all__ = ["chosen_layers", "find_layers", "named_layers", "planned_layers"]


def find_layers(model: nn.Module, layer_list: str = "") -> list[nn.Module]:
    """The model's layers in order: the modules of `named_layers`."""
    return list(named_layers(model, layer_list).values())


def named_layers(model: nn.Module, layer_list: str = "") -> dict[str, nn.Module]:
    """The model's layers in order, by their names in the model.

    Args:
        model: the model.
        layer_list: name of the list (`nn.ModuleList` or `nn.Sequential`) of layers; empty: the list with the most
            parameters among lists of two or more modules of one class.

    Raises:
        UsageError: when the model has no such list.
    """
    lists = {name: _items(name, module) for name, module in model.named_modules() if isinstance(module, _LISTS)}
    lists = {name: layers for name, layers in lists.items() if layers}
    if layer_list:
        if layer_list not in lists:
            hint = nearest(layer_list, filter(None, lists))
            raise UsageError(
                f'the model has no nn.ModuleList or nn.Sequential "{layer_list}" with layers in it: {hint}'
            )
        return lists[layer_list]
    alike = [layers for layers in lists.values() if len({type(layer) for layer in layers.values()}) == 1]
    layers = max(alike, key=_weight, default={})
    if len(layers) < 2:
        raise UsageError(
            "the model has no list of repeated layers (nn.ModuleList or nn.Sequential of one class) to choose from"
        )
    return layers


def planned_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of a plan, by name: all modules of the list that the names belong to, or else the named modules.

    Names that the model does not have are left out.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parent = next(iter(names)).rpartition(".")[0]
    if isinstance(modules.get(parent), _LISTS):
        return _items(parent, modules[parent])
    return {name: modules[name] for name in names if name in modules}


_LISTS = (nn.ModuleList, nn.Sequential)


def _items(name: str, modules: nn.Module) -> dict[str, nn.Module]:
    # Not named_children: it leaves out a layer that is used twice.
    return {f"{name}.{key}" if name else key: child for key, child in modules._modules.items() if child is not None}


def _weight(layers: dict[str, nn.Module]) -> tuple[bool, int]:
    return len(layers) > 1, sum(p.numel() for layer in layers.values() for p in layer.parameters())


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

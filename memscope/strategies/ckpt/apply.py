"""Apply the options of a checkpoint plan to a model's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from memscope.errors import UsageError, nearest
from memscope.strategies.ckpt.operators import why_not_kept
from memscope.strategies.ckpt.options import Option
from memscope.strategies.ckpt.recompute import Recomputed
from memscope.strategies.ckpt.save import checkpoint_all_but
from memscope.strategies.ckpt.segment import checkpoint_together
from memscope.strategies.offload.activations import Offloaded

__all__ = ["apply_options", "recomputed"]


def apply_options(layers: Mapping[str, nn.Module], options: Mapping[str, Option]) -> None:
    """Wrap the layers' forwards as their options say; modules, names and the state dict stay unchanged.

    Args:
        layers: the model's layers in order, by name.
        options: the option of each of them.

    Raises:
        UsageError: with every problem, before anything is changed.
    """
    wrong = [problem for name, option in options.items() for problem in _problems(name, layers[name], option)]
    wrong += _disagreements(layers, options)
    if wrong:
        raise UsageError("; ".join(wrong))
    names = list(layers)
    done: set[int] = set()
    for index, name in enumerate(names):
        if id(layers[name]) not in done:
            done.add(id(layers[name]))
            covered = names[index : index + options[name].length]
            _apply({name: layers[name] for name in covered}, options[name], done)


def recomputed(layers: Mapping[str, nn.Module], options: Mapping[str, Option]) -> Iterator[nn.Module]:
    """The modules whose forward runs again in the backward pass, wholly or in part."""
    for name, option in options.items():
        if option.kind in ("full", "within", "save"):
            yield layers[name]
        elif option.kind == "recompute":
            yield from (child for key in option.children for child in _callable(layers[name].get_submodule(key)))


def _apply(layers: Mapping[str, nn.Module], option: Option, done: set[int]) -> None:
    """Apply an option to the first layer; its checkpoint also covers the others."""
    name, layer = next(iter(layers.items()))
    if option.kind == "full" and option.length > 1:
        checkpoint_together(layers)
    elif option.kind == "full":
        layer.forward = Recomputed(layer)
    elif option.kind == "recompute":
        for child in {id(m): m for key in option.children for m in _callable(layer.get_submodule(key))}.values():
            if id(child) not in done:
                done.add(id(child))
                child.forward = Recomputed(child)
    elif option.kind == "save":
        checkpoint_all_but(name, layer, frozenset(option.calls))
    elif option.kind == "offload":
        layer.forward = Offloaded(layer, layer.forward)


def _callable(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself, or the modules of a list, which is never called itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            yield from _callable(child)
    else:
        yield module


def _problems(name: str, layer: nn.Module, option: Option) -> Iterator[str]:
    children = dict(layer.named_children())
    for child in option.children:
        if child not in children:
            yield f'{name}: recompute:{child}: the layer has no child "{child}": {nearest(child, children)}'
        elif not list(_callable(children[child])):
            yield f'{name}: recompute:{child}: "{child}" is empty: leave it out'
    inside = {key or ".": module for key, module in layer.named_modules()}
    for module, op in option.calls:
        if module not in inside:
            yield f'{name}: save:{module}/{op}: the layer has no module "{module}": {nearest(module, inside)}'
        why_not = why_not_kept(op)
        if why_not:
            yield f"{name}: save:{module}/{op}: {why_not}"
    if option.head and (layer._forward_hooks or layer._forward_pre_hooks):
        yield f"{name}: within:{option.head}: its forward hooks would see what the last layer returns: use full for it"


def _disagreements(layers: Mapping[str, nn.Module], options: Mapping[str, Option]) -> Iterator[str]:
    """A module that serves as several layers has one forward, and so one option."""
    places: dict[int, list[str]] = {}
    for name, layer in layers.items():
        places.setdefault(id(layer), []).append(name)
    for first, *others in places.values():
        for other in others:
            if options[first] != options[other]:
                yield f"{first} and {other} are the same module: give them the same option"
            elif options[first].kind == "within" or options[first].length > 1:
                yield f"{first} and {other} are the same module, which cannot be in a checkpoint over several layers"

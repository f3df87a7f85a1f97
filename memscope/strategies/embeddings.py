"""The embeddings through which inputs enter a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from memscope.strategies.ckpt.layers import repeated_layers

__all__ = ["embeddings", "input_embedding"]


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """What transformers calls the input embeddings, and every `nn.Embedding` outside the repeated layers, by name."""
    inside: set[int] = {id(part) for layer in repeated_layers(model).values() for part in layer.modules()}
    entry = _told(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (entry is not None and module is entry) or (isinstance(module, nn.Embedding) and id(module) not in inside)
    }


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding of the tokens: what transformers calls so, or else the only one; None: none, or several."""
    entry = _told(model)
    found = [*embeddings(model).values()]
    return entry or (found[0] if len(found) == 1 else None)


def _told(model: nn.Module) -> nn.Module | None:
    """What the outermost transformers model inside a model calls its input embeddings."""
    for module in model.modules():
        ask: Any = getattr(module, "get_input_embeddings", None)
        if callable(ask):
            try:
                found = ask()
            except (NotImplementedError, AttributeError):  # transformers' models without one, such as ResNet's
                continue
            if isinstance(found, nn.Module):
                return found
    return None

"""Which parameters of a model an optimizer of matrices takes."""

from __future__ import annotations

from torch import nn

__all__ = ["embedding_weights", "hidden_matrices"]


def embedding_weights(model: nn.Module) -> set[int]:
    """Ids of the weights of embeddings, those that an output layer shares included."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the matrices between embeddings and output layer.

    The output layer is the linear one with as many outputs as the largest embedding has entries. Source for leaving
    both out: https://kellerjordan.github.io/posts/muon, and the target modules of GaLore's own training script.
    """
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    heads = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == max(sizes, default=-1)
    }
    matrices = {id(parameter) for parameter in model.parameters() if parameter.ndim == 2}
    return matrices - embedding_weights(model) - heads

"""NEFTune: noise on the embeddings of the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memscope.errors import nearest
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.embeddings import embeddings, input_embedding
from memscope.workload.description import Workload

__all__ = ["NEFTune"]


class NEFTune(Strategy):
    """Add uniform noise to the embeddings of the tokens in training (Jain et al., "NEFTune", 2023)."""

    name = "neftune"
    stage = Stage.WRAP
    exact = False
    trains = "the embeddings in training"
    changes = "the embeddings of the inputs, by noise"
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "–",
        "optimizer_state": "–",
    }

    @dataclass(frozen=True)
    class Config:
        """The size of the noise."""

        alpha: float = 5.0
        """The noise is at most alpha / √(tokens · width of the embedding)."""
        embedding: str = "auto"
        """The embedding: its name; auto: what transformers calls the input embeddings, or the only embedding."""

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """None: noise takes memory and saves none."""
        return []

    def check(self, workload: Workload) -> list[Problem]:
        """Report noise that is none, and an embedding that is not found or has noise already."""
        if not (self.config.alpha > 0 and math.isfinite(self.config.alpha)):
            return [Problem(f"alpha={self.config.alpha} is no noise", "choose a number above 0, such as 5")]
        module = self._module(workload.model)
        if module is None:
            names = [*embeddings(workload.model)]
            if self.config.embedding != "auto":
                return [
                    Problem(
                        f'"{workload.name}" has no embedding "{self.config.embedding}"',
                        nearest(self.config.embedding, names),
                    )
                ]
            if names:
                what = f'"{workload.name}" has several embeddings'
                return [Problem(what, f"name that of the tokens: embedding={names[0]}. Valid: {', '.join(names)}")]
            return [Problem(f'"{workload.name}" has no embedding (nn.Embedding)', "remove this strategy")]
        if hasattr(module, "neftune_noise_alpha"):
            return [Problem("the program adds noise to the embeddings already", "remove this strategy")]
        return []

    def apply(self, workload: Workload) -> None:
        """Put a hook on the embedding."""
        module = self._module(workload.model)
        assert module is not None, "check() rejects a model without an embedding"
        module.neftune_noise_alpha = self.config.alpha
        module.register_forward_hook(_with_noise)

    def _module(self, model: nn.Module) -> nn.Module | None:
        if self.config.embedding == "auto":
            return input_embedding(model)
        return embeddings(model).get(self.config.embedding)


def _with_noise(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """The embeddings `[batch, tokens, width]` with noise, in training.

    As `neftune_post_forward_hook` of transformers 5.23 (integrations/neftune.py), whose scalars are on the host too.
    """
    if not module.training:
        return output
    most = module.neftune_noise_alpha / math.sqrt(output.size(1) * output.size(2))
    return output + torch.zeros_like(output).uniform_(-most, most)

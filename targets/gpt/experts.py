"""A feed-forward of experts, of which each token visits a few."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memscope.targets.gpt.config import Config

__all__ = ["RoutedExperts"]


class RoutedExperts(nn.Module):
    """Experts with GELU, each for the same number of tokens: tokens · experts_per_token / experts, rounded up.

    `routing=expert`: each expert takes the tokens with its largest scores (Zhou et al., *Mixture-of-Experts with Expert
    Choice Routing*, arXiv 2202.09368). It compares a token with later ones of the sample, so it suits comparisons of
    cost; a model that generates text needs the other. `routing=token`: each token takes the experts with the largest
    scores; where more come than an expert has room for, those with the smallest scores pass unchanged (Riquelme et al.,
    arXiv 2106.05974), and `balance` rewards equal shares (Fedus et al., *Switch Transformers*, arXiv 2101.03961,
    equation 4).
    """

    balance: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.experts is not None, "a layer without experts has no such module"
        self.experts, self.per_token, self.by_token = (
            config.experts,
            config.experts_per_token,
            config.routing == "token",
        )
        self.router = nn.Linear(config.dim, config.experts, bias=False)
        self.up = nn.Parameter(torch.empty(config.experts, config.dim, 4 * config.dim))
        self.down = nn.Parameter(torch.empty(config.experts, 4 * config.dim, config.dim))
        self.balance = None

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, seq, dim]` to the same."""
        flat = x.reshape(-1, x.size(-1))
        scores = F.softmax(self.router(flat), dim=-1)  # [tokens, experts]
        if self.by_token:
            chosen = scores.topk(self.per_token, dim=-1).indices
            is_chosen = torch.zeros_like(scores).scatter(1, chosen, 1.0)
            self.balance = self.experts * (is_chosen.mean(0) * scores.mean(0)).sum() / self.per_token
            scores = scores * is_chosen
        room = min(math.ceil(len(flat) * self.per_token / self.experts), len(flat))
        gates, tokens = scores.t().topk(room, dim=-1)  # [experts, room]
        taken = flat[tokens]  # [experts, room, dim]
        given = torch.bmm(F.gelu(torch.bmm(taken, self.up)), self.down) * gates.unsqueeze(-1)
        y = torch.zeros_like(flat, dtype=given.dtype).index_add(0, tokens.flatten(), given.flatten(0, 1))
        return y.view_as(x)

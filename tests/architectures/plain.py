"""Models in plain PyTorch: diffusion, graph networks, recurrent networks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.row import Plain, Row, Size

__all__ = ["PLAIN"]


def attention(q: Tensor, k: Tensor, v: Tensor, written_out: bool) -> Tensor:
    """Attention over `[batch, heads, tokens, width]`."""
    if written_out:
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def heads(x: Tensor, count: int) -> Tensor:
    """`[batch, tokens, width]` as `[batch, heads, tokens, width / heads]`."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def wave(steps: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of diffusion steps, `[batch, width]`."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=steps.device) / (width // 2))
    angles = steps[:, None].float() * rates
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


class SelfAttention(nn.Module):
    """Attention with one projection for queries, keys and values."""

    def __init__(self, width: int, count: int, written_out: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.count, self.written_out = count, written_out

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: `[batch, tokens, width]`, both."""
        q, k, v = (heads(part, self.count) for part in self.qkv(x).chunk(3, -1))
        return self.out(attention(q, k, v, self.written_out).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding of the step between them."""

    def __init__(self, inner: int, outer: int, step: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.step = nn.Linear(step, outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Shapes: `[batch, channels, height, width]`."""
        y = self.conv1(F.silu(self.norm1(x))) + self.step(F.silu(step))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y))) + self.skip(x)  # type: ignore[no-any-return]


class UNet(nn.Module):
    """The noise predictor of DDPM (arXiv 2006.11239): residual blocks, attention at the lowest resolution."""

    def __init__(self, channels: list[int], written_out: bool) -> None:
        super().__init__()
        first = channels[0]
        self.first = first
        self.step = nn.Sequential(nn.Linear(first, 4 * first), nn.SiLU(), nn.Linear(4 * first, 4 * first))
        self.begin = nn.Conv2d(3, first, 3, padding=1)
        pairs = list(pairwise(channels))
        self.down = nn.ModuleList(ResidualBlock(a, b, 4 * first) for a, b in pairs)
        self.shrink = nn.ModuleList(nn.Conv2d(b, b, 3, stride=2, padding=1) for _, b in pairs)
        self.middle = ResidualBlock(channels[-1], channels[-1], 4 * first)
        self.attention = SelfAttention(channels[-1], 4, written_out)
        self.up = nn.ModuleList(ResidualBlock(2 * b, a, 4 * first) for a, b in reversed(pairs))
        self.end = nn.Sequential(nn.GroupNorm(8, first), nn.SiLU(), nn.Conv2d(first, 3, 3, padding=1))

    def forward(self, noisy: Tensor, noise: Tensor, steps: Tensor) -> Tensor:
        """The loss: how far the predicted noise is from the noise."""
        step = self.step(wave(steps, self.first, noisy.dtype))
        x = self.begin(noisy)
        kept = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x, step)
            kept.append(x)
            x = shrink(x)
        x = self.middle(x, step)
        x = x + self.attention(x.flatten(2).mT).mT.reshape(x.shape)
        for block in self.up:
            x = block(torch.cat((F.interpolate(x, scale_factor=2, mode="nearest"), kept.pop()), 1), step)
        return F.mse_loss(self.end(x).float(), noise.float())


def unet(size: Size, written_out: bool) -> tuple[nn.Module, dict[str, Any]]:
    """64 × 64 pixels with 128 to 512 channels, or 16 × 16 with 8 to 16."""
    channels, pixels, samples = ([8, 8, 16], 16, 2) if size == "tiny" else ([128, 128, 256, 256, 512], 64, 4)
    images = torch.zeros(samples, 3, pixels, pixels)
    return UNet(channels, written_out), {"noisy": images, "noise": images.clone(), "steps": torch.arange(samples)}


class DiTBlock(nn.Module):
    """A transformer block whose norms are scaled and shifted by the step (adaLN-Zero)."""

    def __init__(self, width: int, count: int, written_out: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = SelfAttention(width, count, written_out)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.change = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        """Shapes: `[batch, tokens, width]` and `[batch, width]`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.change(step)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)  # type: ignore[no-any-return]


class DiT(nn.Module):
    """The diffusion transformer of arXiv 2212.09748, on latents of four channels."""

    def __init__(self, width: int, depth: int, count: int, side: int, written_out: bool) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.positions = nn.Parameter(torch.zeros(1, (side // 2) ** 2, width))
        self.step = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(DiTBlock(width, count, written_out) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.end = nn.Linear(width, 2 * 2 * 8)

    def forward(self, noisy: Tensor, noise: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
        """The loss: how far the predicted noise is from the noise; the predicted variance is not trained here."""
        x = self.patches(noisy).flatten(2).mT + self.positions
        step = self.step(wave(steps, 256, noisy.dtype)) + self.labels(labels)
        for block in self.blocks:
            x = block(x, step)
        side = noisy.shape[-1] // 2
        out = self.end(self.norm(x)).view(len(x), side, side, 2, 2, 8).permute(0, 5, 1, 3, 2, 4)
        predicted, _ = out.reshape(len(x), 8, 2 * side, 2 * side).chunk(2, 1)
        return F.mse_loss(predicted.float(), noise.float())


def dit(size: Size, written_out: bool) -> tuple[nn.Module, dict[str, Any]]:
    """DiT-XL/2 at 256 × 256 pixels, or two blocks of width 32."""
    side, samples = (8, 2) if size == "tiny" else (32, 2)
    model = DiT(*((32, 2, 4) if size == "tiny" else (1152, 28, 16)), side, written_out)
    latents, numbers = torch.zeros(samples, 4, side, side), torch.arange(samples)
    return model, {"noisy": latents, "noise": latents.clone(), "steps": numbers, "labels": numbers}


class GraphConvolution(nn.Module):
    """A layer of a GCN (arXiv 1609.02907): the mean of neighbours, weighed by degrees."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Shapes: `[nodes, width]` and `[2, edges]`."""
        source, target = edges
        degree = torch.bincount(target, minlength=len(x)).clamp(min=1).to(x.dtype)
        weight = (degree[source] * degree[target]).rsqrt()
        y = self.linear(x)
        return torch.zeros_like(y).index_add(0, target, (y[source] * weight[:, None]).to(y.dtype))


class GraphAttention(nn.Module):
    """A layer of a GAT (arXiv 1710.10903): a softmax over each node's neighbours."""

    def __init__(self, inner: int, outer: int, count: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(inner, outer)
        self.count = count
        self.left = nn.Parameter(torch.zeros(count, outer // count))
        self.right = nn.Parameter(torch.zeros(count, outer // count))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Shapes: `[nodes, width]` and `[2, edges]`."""
        source, target = edges
        y = self.linear(x).unflatten(-1, (self.count, -1))
        score = F.leaky_relu((y * self.left).sum(-1)[source] + (y * self.right).sum(-1)[target], 0.2).float()
        index = target[:, None].expand_as(score)
        most = score.new_zeros(len(x), self.count).scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        power = (score - most[target]).exp()
        share = power / score.new_zeros(len(x), self.count).index_add(0, target, power)[target]
        out = torch.zeros_like(y).index_add(0, target, (y[source] * share[:, :, None]).to(y.dtype))
        return out.flatten(1)


class NodeClassifier(nn.Module):
    """Two graph layers; the loss is over the nodes of a mask."""

    def __init__(self, layer: type[nn.Module], widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList((layer(widths[0], widths[1]), layer(widths[1], widths[2])))

    def forward(self, x: Tensor, edges: Tensor, labels: Tensor, train_mask: Tensor) -> Tensor:
        """The loss of the training nodes, without self-loops among the edges."""
        edges = edges[:, edges[0] != edges[1]]
        x = F.dropout(F.relu(self.layers[0](x, edges)), 0.5, self.training)
        return F.cross_entropy(self.layers[1](x, edges)[train_mask].float(), labels[train_mask])


def graph(layer: type[nn.Module], size: Size) -> tuple[nn.Module, dict[str, Any]]:
    """The sizes of ogbn-arxiv (169,343 nodes, 1,166,243 edges, 40 classes), or 12 nodes."""
    nodes, edges, widths = (12, 40, (16, 8, 4)) if size == "tiny" else (169_343, 1_166_243, (128, 256, 40))
    ends = torch.stack((torch.arange(edges) % nodes, torch.arange(edges) * 7 % nodes))
    batch = {"x": torch.zeros(nodes, widths[0]), "edges": ends, "labels": torch.arange(nodes) % widths[2]}
    return NodeClassifier(layer, widths), {**batch, "train_mask": torch.arange(nodes) % 2 == 0}


class RecurrentText(nn.Module):
    """A recurrent language model."""

    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM], vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cells = cell(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of the next token of `[batch, tokens]`."""
        logits = self.head(self.cells(self.embedding(ids))[0])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def recurrent(cell: type[nn.GRU] | type[nn.LSTM], size: Size) -> tuple[nn.Module, dict[str, Any]]:
    """650 cells and 10,000 words, or 16 and 64."""
    vocabulary, width, length = (64, 16, 8) if size == "tiny" else (10_000, 650, 35)
    return RecurrentText(cell, vocabulary, width), {"ids": torch.arange(2 * length).view(2, length) % vocabulary}


_CUDNN = "Refused on a GPU on purpose: how large cuDNN's reserve space for recurrent layers is has no public source."
_ONEDNN = " Refused on a CPU too, as the workspace of oneDNN's layer is not known either."
PLAIN = [
    Row("UNet (DDPM)", "Diffusion", Plain(unet)),
    Row("DiT-XL/2", "Diffusion", Plain(dit)),
    Row("GCN", "Graphs", Plain(lambda size, _: graph(GraphConvolution, size)), ()),
    Row("GAT", "Graphs", Plain(lambda size, _: graph(GraphAttention, size)), ()),
    Row("GRU", "Recurrent", Plain(lambda size, _: recurrent(nn.GRU, size)), (), why=_CUDNN),
    Row("LSTM", "Recurrent", Plain(lambda size, _: recurrent(nn.LSTM, size)), (), why=_CUDNN + _ONEDNN),
]

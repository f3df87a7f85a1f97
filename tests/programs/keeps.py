"""Train with a teacher, sample between steps, and keep every loss with all its values."""

import torch
from torch import nn

device = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, WIDTH, BATCH, PROMPT, NEW = 2, 256, 64, 16, 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, cache=None):
        key, value = self.key(x), self.value(x)
        if cache:
            key, value = torch.cat([cache[0], key], dim=1), torch.cat([cache[1], value], dim=1)
        return x + nn.functional.scaled_dot_product_attention(x, key, value), (key, value)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(LAYERS)])

    def forward(self, x, caches=(None,) * LAYERS):
        kept = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, cache)
            kept.append(cache)
        return x, kept


class Teacher(Decoder):
    pass


model, teacher = Decoder().to(device), Teacher().to(device)
optimizer = torch.optim.AdamW(model.parameters())
losses = []
for step in range(6):
    x = torch.randn(BATCH, PROMPT, WIDTH, device=device)
    with torch.no_grad():
        wanted, _ = teacher(x)
    loss = (model(x)[0] - wanted).square()
    loss.mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss)
    with torch.no_grad():
        last, caches = model(x)
        for _ in range(NEW):
            last, caches = model(last[:, -1:], caches)
    del last, caches

"""A network of blocks, with and without recomputation."""

import torch
from torch import nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from dynlora_fn import init, partition
from dynlora_fn.testing import normal

X = normal(1, 2, 5, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("shift", torch.ones(8))
        self.drop = 0.0

    def forward(self, x, *, scale):
        heads = self.norm(x).unflatten(-1, (2, 4)).transpose(-2, -3)
        mixed = scaled_dot_product_attention(heads, heads, heads).transpose(-2, -3).flatten(-2)
        return x + dropout(self.layer(mixed).tanh() * scale + self.shift, self.drop) if self.drop else (
            x + self.layer(mixed).tanh() * scale + self.shift
        )  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.layers:
            x = block(x, scale=0.5)
        return self.head(x)


def make() -> tuple[nn.Module, dict, dict]:
    torch.manual_seed(0)
    model = Net().double()
    params = init(model, rank=2, seed=0, targets=["*.layer.weight"], dtype=torch.float64)
    return model, *partition(params)

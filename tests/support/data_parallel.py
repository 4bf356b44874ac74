"""A model for tests in several processes, and its low-rank weights."""

import torch
from torch import nn

import dynlora_fn as dl


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(18, 18), nn.GELU()) for _ in range(3)]
    return nn.Sequential(nn.Embedding(11, 18), *layers, nn.Linear(18, 11))


def fresh(net: nn.Module, **options) -> dict:
    return dl.init(net, rank=4, seed=0, targets=["*.0.weight"], **options)

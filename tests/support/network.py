"""A small dense network with low-rank targets, and the tolerance of its outputs."""

import torch
from torch import nn

EPS = torch.finfo(torch.float64).eps


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return three layers, two of them equal, a bias, a norm and a buffer."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)]
    return nn.Sequential(*layers).to(dtype).eval()


TARGETS = ["0.weight", "3.weight", "5.weight"]
# Three layers forward and back, each of at most 2 * 6 + rank + 4 roundings of half an eps, of sums of 6 products whose
# magnitudes add up to less than 16.
TOLERANCE = {"rtol": 0, "atol": 2 * 3 * 18 * 16 / 2 * EPS}

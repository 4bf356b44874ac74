"""A module that passes its weight to a function, and its dense weight.

Both must agree.
"""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor, nn

from dynlora_fn import LowRank, materialize
from dynlora_fn.testing import normal

# Sums of up to 40 products of numbers of about 1 follow each other three at a time, in float64.
TOLERANCE = {"rtol": 0, "atol": 3 * 40 * 64 * torch.finfo(torch.float64).eps}
NUMBERS = normal(7, 700)


class Uses(nn.Module):
    """Passes its weight to a function."""

    def __init__(self, use: Callable[[Tensor], Tensor], shape: tuple[int, ...]):
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self) -> Tensor:
        return self.use(self.weight)


def x(*shape: int) -> Tensor:
    return NUMBERS[: prod(shape)].reshape(shape)


def dense(param: LowRank, shape: tuple[int, ...]) -> Tensor:
    """Return the dense weight in the shape of the module's parameter."""
    weight = materialize(param)
    is_side_by_side = weight.ndim == len(shape) + 1 and weight.shape[-1] != shape[-1]
    return (weight.transpose(-2, -3) if is_side_by_side else weight).reshape(shape)

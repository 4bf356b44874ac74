"""Tensors that are computed one at a time, while a file is written."""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class LazyTensor(NamedTuple):
    """A tensor whose shape and dtype are known before it is computed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # computes it again at each call

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def lazy(tensor: Tensor) -> LazyTensor:
    """Wrap an existing tensor as a `LazyTensor`."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def bytes_of(tensors: Mapping[str, LazyTensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())

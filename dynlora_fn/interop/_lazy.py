"""Tensors that are formed when a file is written, one at a time."""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class LazyTensor(NamedTuple):
    """A tensor whose shape and dtype are known before it is formed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # forms it again at each call

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes."""
        return prod(self.shape) * self.dtype.itemsize


def lazy(tensor: Tensor) -> LazyTensor:
    """Return a tensor that exists already as a lazy one."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def bytes_of(tensors: Mapping[str, LazyTensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())

"""Codes with one float32 scale for each row, for int8 and float8."""

import torch
from torch import Tensor


def empty_scale(weight: Tensor) -> Tensor:
    """Return an uninitialized scale for each row of a weight (out, in)."""
    return weight.new_empty((weight.shape[0], 1), dtype=torch.float32)


def decode_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scale``, computed in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return codes.to(wide, copy=True).mul_(scale).to(dtype)


def decode_rows_into(target: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Write ``codes * scale`` into `target`.

    If `target` is in float32 or wider, this allocates no memory.
    """
    if target.dtype in (torch.float32, torch.float64):
        target.copy_(codes).mul_(scale)
    else:
        target.copy_(decode_rows(codes, scale, target.dtype))


def is_by_row(tensor: Tensor, scale: Tensor) -> bool:
    """Return whether a torchao matrix has one scale for each row."""
    return scale.shape == (tensor.shape[0], 1)

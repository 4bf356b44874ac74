"""int8 and float8 with one scale for each row, in torchao's layout."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor


class Int8Codes(NamedTuple):
    """``codes * scale`` with one scale for each row.

    They are the inner tensors of torchao's symmetric Int8Tensor.
    """

    codes: Int8[Tensor, "*stack out in"]
    scale: Float[Tensor, "*stack out 1"]  # float32


class Float8Codes(NamedTuple):
    """``codes * scale`` with one scale for each row.

    They are the inner tensors of torchao's Float8Tensor.
    """

    codes: Float[Tensor, "*stack out in"]  # float8_e4m3fn or float8_e5m2
    scale: Float[Tensor, "*stack out 1"]  # float32


# The first is torchao's. It rounds rows of very small values to zero, so the residual needs a smaller one.
_LEAST_SCALE = torch.finfo(torch.float32).eps
_LEAST_RESIDUAL_SCALE = torch.finfo(torch.float32).tiny


def int8_residual(weight: Tensor) -> Int8Codes:
    """Encode what codes miss, which may be far smaller than a weight, in int8."""
    return encode_int8(weight, 127, _LEAST_RESIDUAL_SCALE)


def encode_int8(weight: Tensor, steps: float, least_scale: float) -> Int8Codes:
    """Encode a weight (out, in) in int8.

    There are `steps` steps from zero to the largest magnitude of each row.
    """
    largest = weight.abs().amax(-1, keepdim=True)
    scale = (largest / steps).clamp(min=least_scale).to(torch.float32)
    codes = (weight * (1.0 / scale)).round_().clamp_(-128, 127)
    return Int8Codes(codes.to(torch.int8), scale)


def _encode_float8(weight: Tensor, dtype: torch.dtype) -> Float8Codes:
    most = torch.finfo(dtype).max
    scale = (weight.abs().amax(-1, keepdim=True) / most).to(torch.float32)
    codes = (weight / torch.where(scale > 0, scale, 1)).clamp_(-most, most)
    return Float8Codes(codes.to(dtype), scale)

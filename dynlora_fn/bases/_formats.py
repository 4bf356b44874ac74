"""Encode and decode weights in torchao's formats, with plain tensor operations.

The type of the tuple says the format; shapes and dtypes say its details. So codes are tuples that contain only tensors,
which pass through every transform and can be donated. `encode` returns torchao's bits for a weight in float32. The
exception are rows and blocks of zeros, for which torchao returns NaN.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dynlora_fn.bases import _float4, _nf4, _torchao
from dynlora_fn.bases._float4 import MXFP4Codes, NVFP4Codes
from dynlora_fn.bases._nf4 import NF4Codes
from dynlora_fn.bases._rowwise import _LEAST_SCALE, Float8Codes, Int8Codes, _encode_float8, encode_int8, int8_residual

Codes: TypeAlias = Int8Codes | Float8Codes | NF4Codes | NVFP4Codes | MXFP4Codes | Tensor  # a plain tensor: bfloat16
Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a plain tensor: bfloat16; (): no residual, a tree without leaves

STABLE = {"int8": Int8Codes, "float8": Float8Codes, "nf4": NF4Codes}
PROTOTYPES = {"nvfp4": NVFP4Codes, "mxfp4": MXFP4Codes}
KINDS = STABLE | PROTOTYPES
NAMES = (*KINDS, "bfloat16")
_CHOICES = (
    f"{', '.join(STABLE)}, bfloat16, {' or '.join(PROTOTYPES)} (prototypes in torchao), or torchao's "
    "Int8WeightOnlyConfig or Float8WeightOnlyConfig with PerRow or NVFP4WeightOnlyConfig"
)


def kind_of(codes: Codes) -> str:
    """Return the name of the format of codes, or "plain" for a tensor of any dtype."""
    return next((kind for kind, format_type in KINDS.items() if isinstance(codes, format_type)), "plain")


def code_tensors(codes: Codes | Residual) -> list[Tensor]:
    """Return the tensors of codes or of a residual.

    `codes_from_tensors` and `residual_from_tensors` reverse it.
    """
    return [codes] if isinstance(codes, Tensor) else list(codes)


def codes_from_tensors(kind: str, tensors: Sequence[Tensor]) -> Codes:
    """Return the codes that consist of these tensors."""
    return tensors[0] if kind == "plain" else KINDS[kind](*tensors)


def format_of(base: object) -> tuple[str, torch.dtype]:
    """Return the name of a format and the dtype of its float8 codes.

    Args:
        base: The name of a format, or a configuration of torchao.

    Raises:
        ValueError: If the format is unknown.
    """
    if base in NAMES:
        return str(base), torch.float8_e4m3fn
    if not type(base).__module__.startswith("torchao."):
        raise ValueError(f"unknown `base` {base!r}; use one of {_CHOICES}")
    if type(base).__name__ == "NVFP4WeightOnlyConfig" and getattr(base, "use_dynamic_per_tensor_scale", False):
        return "nvfp4", torch.float8_e4m3fn  # by its name, so that no prototype is imported
    if getattr(base, "granularity", None) == _torchao.PerRow():
        if isinstance(base, _torchao.Int8WeightOnlyConfig):
            return "int8", torch.float8_e4m3fn
        if isinstance(base, _torchao.Float8WeightOnlyConfig):
            return "float8", base.weight_dtype
    raise ValueError(f"unknown `base` {base!r}; use one of {_CHOICES}")


def empty_codes(kind: str, name: str, weight: Tensor, *, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> Codes:
    """Return uninitialized codes for one weight (out, in).

    They are the argument `like` of `encode`.

    Args:
        kind: The name of the format.
        name: The name of the weight, for error messages.
        weight: The weight whose shape, device and dtype the codes are for.
        float8_dtype: The dtype of float8 codes.

    Raises:
        ValueError: If the blocks of the format do not divide the weight.
    """
    if kind == "bfloat16":
        return weight.new_empty(weight.shape, dtype=torch.bfloat16)
    scale = weight.new_empty((weight.shape[0], 1), dtype=torch.float32)
    if kind == "int8":
        return Int8Codes(weight.new_empty(weight.shape, dtype=torch.int8), scale)
    if kind == "float8":
        return Float8Codes(weight.new_empty(weight.shape, dtype=float8_dtype), scale)
    return _nf4.empty_codes(name, weight) if kind == "nf4" else _float4.empty_codes(kind, name, weight)


# --- encode


def encode(weight: Tensor, like: Codes, *, again: bool = False) -> Codes:
    """Encode a weight (out, in), in float32 at least, in the format of `like`.

    Args:
        weight: The dense weight.
        like: Codes in that format, such as `empty_codes` returns.
        again: Whether the weight was decoded from codes in `like`. int8 then uses 127 steps on both sides. With
            torchao's 127.5, the most negative value of a row would grow by 128 / 127.5 at each fold, and without a
            residual explode. nf4 then keeps its mean.

    nvfp4 keeps one factor for each row if `like` has them.
    """
    if isinstance(like, Int8Codes):
        return encode_int8(weight, 127 if again else 127.5, _LEAST_SCALE)
    if isinstance(like, Float8Codes):
        return _encode_float8(weight, like.codes.dtype)
    if isinstance(like, NF4Codes):
        return _nf4.encode(weight.to(torch.float32), like, again=again)
    if isinstance(like, NVFP4Codes):
        return _float4.encode_nvfp4(weight.to(torch.float32), like)
    if isinstance(like, MXFP4Codes):
        return _float4.encode_mxfp4(weight.to(torch.float32), like)
    return weight.to(like.dtype)


def encode_residual(weight: Tensor, like: Int8Codes | Tensor) -> Int8Codes | Tensor:
    """Encode what codes miss in the format of `like`.

    It may be far smaller than a weight.
    """
    return int8_residual(weight) if isinstance(like, Int8Codes) else weight.to(like.dtype)


# --- decode


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Decode codes to a dense weight (*stack, out, in).

    The values are those of torchao's ``dequantize``, except for the last rounding.
    """
    if isinstance(codes, Tensor):
        return codes.to(dtype)
    if isinstance(codes, NF4Codes):
        return _nf4.decode(codes).to(dtype)
    if isinstance(codes, NVFP4Codes | MXFP4Codes):
        return _float4.decode(codes).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return codes.codes.to(wide).mul_(codes.scale).to(dtype)


def decode_into(target: Tensor, codes: Codes) -> None:
    """Decode one weight into an existing tensor, such as a view of a larger matrix."""
    if isinstance(codes, Int8Codes | Float8Codes) and target.dtype in (torch.float32, torch.float64):
        target.copy_(codes.codes).mul_(codes.scale)
    else:
        target.copy_(decode(codes, target.dtype))


def shape_of(codes: Codes) -> torch.Size:
    """Return the shape of the weight, (*stack, out, in)."""
    if isinstance(codes, Tensor):
        return codes.shape
    *leading, last = codes.codes.shape
    return torch.Size((*leading, last * (2 if codes.codes.dtype == torch.uint8 else 1)))


def is_tied(codes: Codes) -> bool:
    """Return whether one entry may change the codes of other rows."""
    return isinstance(codes, NF4Codes) or (isinstance(codes, NVFP4Codes) and not _float4.has_factors_by_row(codes))


def residual_from_tensors(tensors: list[Tensor]) -> Residual:
    """Return the residual that consists of these tensors."""
    return () if not tensors else tensors[0] if len(tensors) == 1 else Int8Codes(*tensors)

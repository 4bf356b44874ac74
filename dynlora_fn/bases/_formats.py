"""How codes stand for numbers: torchao's formats in plain tensor operations, one weight (out, in) at a time.

A format is recognized by its tuple's type, and its details by shapes and dtypes: tuples of tensors alone pass through
every transform and can be donated. ``encode`` gives the bits that torchao gives for a weight in float32, except where
torchao's are not numbers: rows and blocks of zeros.
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
Residual: TypeAlias = Int8Codes | Tensor | tuple[()]  # a plain tensor: bfloat16; none is a tree without leaves

STABLE = {"int8": Int8Codes, "float8": Float8Codes, "nf4": NF4Codes}
PROTOTYPES = {"nvfp4": NVFP4Codes, "mxfp4": MXFP4Codes}
KINDS = STABLE | PROTOTYPES
NAMES = (*KINDS, "bfloat16")
_RULE = (
    f"be one of {', '.join(STABLE)}, bfloat16, {' or '.join(PROTOTYPES)} (prototypes in torchao), or torchao's "
    "Int8WeightOnlyConfig or Float8WeightOnlyConfig with PerRow or NVFP4WeightOnlyConfig"
)


def kind_of(codes: Codes) -> str:
    """The name of its format; "plain" for a tensor in whichever dtype."""
    return next((kind for kind, made in KINDS.items() if isinstance(codes, made)), "plain")


def code_tensors(codes: Codes | Residual) -> list[Tensor]:
    """The tensors of codes or of a residual; `built` and `residual_of` put them together again."""
    return [codes] if isinstance(codes, Tensor) else list(codes)


def codes_from_tensors(kind: str, tensors: Sequence[Tensor]) -> Codes:
    return tensors[0] if kind == "plain" else KINDS[kind](*tensors)


def format_of(base: object) -> tuple[str, torch.dtype]:
    """The name of a format that is given by its name or as torchao's configuration, and the dtype of its float8.

    Raises:
        ValueError: if there is no such base.
    """
    if base in NAMES:
        return str(base), torch.float8_e4m3fn
    if not type(base).__module__.startswith("torchao."):
        raise ValueError(f"`base` must {_RULE}, got {base!r}")
    if type(base).__name__ == "NVFP4WeightOnlyConfig" and getattr(base, "use_dynamic_per_tensor_scale", False):
        return "nvfp4", torch.float8_e4m3fn  # by its name: a prototype is not imported to be told apart from
    if getattr(base, "granularity", None) == _torchao.PerRow():
        if isinstance(base, _torchao.Int8WeightOnlyConfig):
            return "int8", torch.float8_e4m3fn
        if isinstance(base, _torchao.Float8WeightOnlyConfig):
            return "float8", base.weight_dtype
    raise ValueError(f"`base` must {_RULE}, got {base!r}")


def empty_codes(kind: str, name: str, weight: Tensor, *, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> Codes:
    """Codes of the format for one weight (out, in) like `weight`, without values: what `encode` takes for a model.

    Raises:
        ValueError: if the format's blocks do not divide the weight called `name`.
    """
    if kind == "bfloat16":
        return weight.new_empty(weight.shape, dtype=torch.bfloat16)
    scale = weight.new_empty((weight.shape[0], 1), dtype=torch.float32)
    if kind == "int8":
        return Int8Codes(weight.new_empty(weight.shape, dtype=torch.int8), scale)
    if kind == "float8":
        return Float8Codes(weight.new_empty(weight.shape, dtype=float8_dtype), scale)
    return _nf4.empty_codes(name, weight) if kind == "nf4" else _float4.empty_codes(kind, name, weight)


# --- numbers into codes


def encode(weight: Tensor, like: Codes, *, again: bool = False) -> Codes:
    """A weight (out, in), in float32 at least, in the format of `like`.

    What was codes before is encoded `again`, with as many steps on both sides: by torchao's int8, which has 127.5, the
    most negative number of a row would become 128 / 127.5 of itself each time, and without a residual explode. nf4
    keeps its mean, and nvfp4 factors by row where there are any.
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
    """The same for what codes miss, which may be far smaller than a weight."""
    return int8_residual(weight) if isinstance(like, Int8Codes) else weight.to(like.dtype)


# --- codes into numbers


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The numbers that the codes stand for, (*stack, out, in): torchao's ``dequantize`` but for the last rounding."""
    if isinstance(codes, Tensor):
        return codes.to(dtype)
    if isinstance(codes, NF4Codes):
        return _nf4.decode(codes).to(dtype)
    if isinstance(codes, NVFP4Codes | MXFP4Codes):
        return _float4.decode(codes).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return codes.codes.to(wide).mul_(codes.scale).to(dtype)


def decode_into(target: Tensor, codes: Codes) -> None:
    """`decode` of one weight, written over the target, which may be part of another matrix."""
    if isinstance(codes, Int8Codes | Float8Codes) and target.dtype in (torch.float32, torch.float64):
        target.copy_(codes.codes).mul_(codes.scale)
    else:
        target.copy_(decode(codes, target.dtype))


def shape_of(codes: Codes) -> torch.Size:
    """Of the weight, (*stack, out, in)."""
    if isinstance(codes, Tensor):
        return codes.shape
    *leading, last = codes.codes.shape
    return torch.Size((*leading, last * (2 if codes.codes.dtype == torch.uint8 else 1)))


def is_tied(codes: Codes) -> bool:
    """Whether a number anywhere in the weight may change the codes of all of it, instead of its row's."""
    return isinstance(codes, NF4Codes) or (isinstance(codes, NVFP4Codes) and not _float4.has_factors_by_row(codes))


def residual_from_tensors(tensors: list[Tensor]) -> Residual:
    return () if not tensors else tensors[0] if len(tensors) == 1 else Int8Codes(*tensors)

"""How codes stand for numbers: torchao's formats in plain tensor operations, one weight (out, in) at a time.

A format is recognized by its tuple's type, and its details by shapes and dtypes: tuples of tensors alone pass through
every transform and can be donated. ``encode`` gives the bits that torchao gives for a weight in float32, except where
torchao's are not numbers: rows and blocks of zeros.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import torch
from torch import Tensor

from dynlora_fn.types import Codes, Float8Codes, Int8Codes, NF4Codes, Residual

KINDS = {"int8": Int8Codes, "float8": Float8Codes, "nf4": NF4Codes}
NAMES = (*KINDS, "bfloat16")
_RULE = f"be one of {', '.join(NAMES)}, or torchao's Int8WeightOnlyConfig or Float8WeightOnlyConfig with PerRow"
_NF4_BLOCK, _NF4_SCALE_BLOCK = 64, 256
# Quantiles of a normal distribution, as torchao rounds them.
_BELOW = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 = (*_BELOW, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
# Of torchao. What is below a row of such scales is zero; the residual of small weights needs smaller ones.
_LEAST_SCALE = torch.finfo(torch.float32).eps
_LEAST_RESIDUAL_SCALE = torch.finfo(torch.float32).tiny


def kind_of(codes: Codes) -> str:
    """The name of its format; "plain" for a tensor in whichever dtype."""
    return next((kind for kind, made in KINDS.items() if isinstance(codes, made)), "plain")


def flat(codes: Codes | Residual) -> list[Tensor]:
    """The tensors of codes or of a residual; `built` and `residual_of` put them together again."""
    return [codes] if isinstance(codes, Tensor) else list(codes)


def built(kind: str, tensors: Sequence[Tensor]) -> Codes:
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
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow  # noqa: PLC0415 (a second)

    if getattr(base, "granularity", None) == PerRow():
        if isinstance(base, Int8WeightOnlyConfig):
            return "int8", torch.float8_e4m3fn
        if isinstance(base, Float8WeightOnlyConfig):
            return "float8", base.weight_dtype
    raise ValueError(f"`base` must {_RULE}, got {base!r}")


def blank(kind: str, name: str, weight: Tensor, *, float8_dtype: torch.dtype = torch.float8_e4m3fn) -> Codes:
    """Codes of the format for one weight (out, in) like `weight`, without values: what `encode` takes for a model.

    NF4 has blocks of 64 numbers, and the most blocks up to 256 that divide their number share a factor.

    Raises:
        ValueError: if the format's blocks do not divide the weight called `name`.
    """
    out_features, in_features = weight.shape
    if kind == "bfloat16":
        return weight.new_empty(weight.shape, dtype=torch.bfloat16)
    scale = weight.new_empty((out_features, 1), dtype=torch.float32)
    if kind == "int8":
        return Int8Codes(weight.new_empty(weight.shape, dtype=torch.int8), scale)
    if kind == "float8":
        return Float8Codes(weight.new_empty(weight.shape, dtype=float8_dtype), scale)
    if weight.numel() % _NF4_BLOCK or in_features % 2:
        rule = f"have a multiple of {_NF4_BLOCK} numbers and an even `in` to be held in blocks of {_NF4_BLOCK} in nf4"
        raise ValueError(f"weight {name!r} must {rule}, got {tuple(weight.shape)}")
    blocks = weight.numel() // _NF4_BLOCK
    dtype = torch.promote_types(weight.dtype, torch.bfloat16) if weight.dtype != torch.float64 else torch.float32
    return NF4Codes(
        codes=weight.new_empty((out_features, in_features // 2), dtype=torch.uint8),
        scales=weight.new_empty(blocks, dtype=torch.int8),
        factor=weight.new_empty(blocks // gcd(blocks, _NF4_SCALE_BLOCK), dtype=dtype),
        mean=weight.new_empty((), dtype=dtype),
    )


# --- numbers into codes


def encode(weight: Tensor, like: Codes, *, again: bool = False) -> Codes:
    """A weight (out, in), in float32 at least, in the format of `like`.

    What was codes before is encoded `again`, with as many steps on both sides: by torchao's int8, which has 127.5, the
    most negative number of a row would become 128 / 127.5 of itself each time, and without a residual explode.
    """
    if isinstance(like, Int8Codes):
        return encode_int8(weight, 127 if again else 127.5, _LEAST_SCALE)
    if isinstance(like, Float8Codes):
        return _encode_float8(weight, like.codes.dtype)
    if isinstance(like, NF4Codes):
        return _encode_nf4(weight.to(torch.float32), like)
    return weight.to(like.dtype)


def encode_residual(weight: Tensor, like: Int8Codes | Tensor) -> Int8Codes | Tensor:
    """The same for what codes miss, which may be far smaller than a weight."""
    return encode_int8(weight, 127, _LEAST_RESIDUAL_SCALE) if isinstance(like, Int8Codes) else weight.to(like.dtype)


def encode_int8(weight: Tensor, steps: float, least_scale: float) -> Int8Codes:
    largest = weight.abs().amax(-1, keepdim=True)
    scale = (largest / steps).clamp(min=least_scale).to(torch.float32)
    codes = (weight * (1.0 / scale)).round_().clamp_(-128, 127)
    return Int8Codes(codes.to(torch.int8), scale)


def _encode_float8(weight: Tensor, dtype: torch.dtype) -> Float8Codes:
    most = torch.finfo(dtype).max
    scale = (weight.abs().amax(-1, keepdim=True) / most).to(torch.float32)
    codes = (weight / torch.where(scale > 0, scale, 1)).clamp_(-most, most)
    return Float8Codes(codes.to(dtype), scale)


def _encode_nf4(weight: Tensor, like: NF4Codes) -> NF4Codes:
    blocks = weight.reshape(like.scales.shape[-1], -1)
    largest = blocks.abs().amax(-1)
    mean = largest.mean()
    differences = (largest - mean).reshape(like.factor.shape[-1], -1)
    factor = 256 / (2 * differences.abs().amax(-1))
    # Where all blocks of a factor are alike it is infinite, and their scales' differences are no numbers but zero.
    scales = (differences * factor[:, None]).nan_to_num_(0).round_().clamp_(-128, 127)
    units = blocks / torch.where(largest > 0, largest, 1)[:, None]
    numbers = torch.bucketize(units, _nf4_limits().to(units.device)).to(torch.uint8).reshape(-1, 2)
    codes = (numbers[:, 0] << 4) | numbers[:, 1]
    dtype = like.mean.dtype
    return NF4Codes(codes.reshape(like.codes.shape), scales.flatten().to(torch.int8), factor.to(dtype), mean.to(dtype))


@lru_cache(maxsize=1)
def _nf4_limits() -> Tensor:
    """Up to which number in float32 each of the values but the last is the nearest, of equally near ones the first:
    the middle between two, where the distances are equal once they are rounded."""
    values = torch.tensor(NF4)
    below, above = values[:-1], values[1:]
    limits = (below + above) / 2
    infinity = torch.tensor(torch.inf)
    for _ in range(4):
        further = torch.nextafter(limits, infinity)
        limits = torch.where((further - below).abs() <= (further - above).abs(), further, limits)
    for _ in range(8):
        is_too_far = (limits - below).abs() > (limits - above).abs()
        limits = torch.where(is_too_far, torch.nextafter(limits, -infinity), limits)
    return limits


# --- codes into numbers


def decode(codes: Codes, dtype: torch.dtype) -> Tensor:
    """The numbers that the codes stand for, (*stack, out, in): torchao's ``dequantize`` but for the last rounding."""
    if isinstance(codes, Tensor):
        return codes.to(dtype)
    if isinstance(codes, NF4Codes):
        return _decode_nf4(codes).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return codes.codes.to(wide).mul_(codes.scale).to(dtype)


def decode_into(target: Tensor, codes: Codes) -> None:
    """`decode` of one weight, written over the target, which may be part of another matrix."""
    if isinstance(codes, Int8Codes | Float8Codes) and target.dtype in (torch.float32, torch.float64):
        target.copy_(codes.codes).mul_(codes.scale)
    else:
        target.copy_(decode(codes, target.dtype))


def _decode_nf4(codes: NF4Codes) -> Tensor:
    *stack, out_features, half = codes.codes.shape
    dtype, (blocks, factors) = codes.mean.dtype, (codes.scales.shape[-1], codes.factor.shape[-1])
    differences = codes.scales.reshape(*stack, factors, -1) / codes.factor[..., None]
    scales = differences.reshape(*stack, blocks).to(dtype) + codes.mean[..., None]
    numbers = torch.stack([codes.codes >> 4, codes.codes & 0b1111], dim=-1)
    units = torch.tensor(NF4, dtype=dtype, device=codes.codes.device)[numbers.int()]
    values = units.reshape(*stack, blocks, -1) * scales[..., None]
    return values.reshape(*stack, out_features, 2 * half)


def shape_of(codes: Codes) -> torch.Size:
    """Of the weight, (*stack, out, in)."""
    if isinstance(codes, Tensor):
        return codes.shape
    *leading, last = codes.codes.shape
    return torch.Size((*leading, last * (2 if isinstance(codes, NF4Codes) else 1)))

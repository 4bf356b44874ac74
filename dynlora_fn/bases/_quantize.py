"""Bases in low precision that survive ten thousand switches: quantized, dequantized, folded into, and how far off."""

from collections.abc import Mapping
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import dequantize
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._formats import code_tensors, decode, empty_codes, encode, format_of
from dynlora_fn.bases._ops import check_finite, decode_exact
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._quantized import Device, ResidualKind, base_shape, make_residual, stack_bases, stack_members
from dynlora_fn.bases._sharded import gather_base
from dynlora_fn.bases._types import Deferred, LocalBase, Quantized, Sharded


@overload
def quantize(
    params: LowRank, base: object, *, residual: ResidualKind = ..., residual_device: Device = ...
) -> LowRank: ...
@overload
def quantize(
    params: Params, base: object, *, residual: ResidualKind = ..., residual_device: Device = ...
) -> dict[str, Param]: ...
def quantize(
    params: LowRank | Params,
    base: object,
    *,
    residual: ResidualKind = "bfloat16",
    residual_device: Device = None,
) -> LowRank | dict[str, Param]:
    """The same weights with their bases in low precision: off by one quantization error, however often they are folded.

    Products see ``dequantize(codes) + b @ a / rank``. What the codes miss is kept as the residual, which `switch` and
    `merge` fold into as well: ``target = codes + residual + difference``, quantized anew, and the residual is what the
    new codes miss. Without a residual the errors of all folds add up: int8 has lost 45 % of the weights' standard
    deviation after 8,000 steps.

    Args:
        params: one weight, or weights by name; tensors stay as they are. A base that is in low precision already goes
            over to the other format, its residual included.
        base: "int8" and "float8" with a scale for each row, "nf4" in blocks of 64, "bfloat16"; "nvfp4" in blocks of 16
            and "mxfp4" in blocks of 32, which are prototypes in torchao and may change with it; or torchao's
            Int8WeightOnlyConfig or Float8WeightOnlyConfig with PerRow, or its prototype NVFP4WeightOnlyConfig.
        residual: "bfloat16" (2 bytes for each number), "int8" with a scale for each row (1 byte) or None.
        residual_device: where the residuals lie, "cpu" for host memory; with the codes unless given. Folds alone touch
            them.

    Raises:
        ValueError: if the format is unknown or does not fit the shape of a weight, or a weight is not finite; it names
            the weight.

    Numerics: the codes are torchao's for the base in float32, bit for bit, except that rows or blocks of zeros stay
    zeros. An entry is off by at most half a step: int8 ``scale / 2``, float8 e4m3 ``2**-4`` of it or ``scale / 2**10``,
    bfloat16 ``2**-9`` of it; nf4 0.152 of its block's largest entry, and 1/128 of what the largest entries of blocks
    that share a factor are off from the mean of all when the base was quantized first; nvfp4 a fifth of its block's
    largest entry or ``2**-19`` of the weight's; mxfp4 a fifth of its block's largest entry.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32, bias=False), rank=4, seed=0, targets=["weight"])
        >>> base = dl.bases.quantize(params, "int8")["weight"].base
        >>> base.codes.codes.dtype, base.codes.scale.shape, base.residual.dtype
        (torch.int8, torch.Size([32, 1]), torch.bfloat16)
    """
    if residual not in (None, "int8", "bfloat16"):
        raise ValueError(f"`residual` must be 'int8', 'bfloat16' or None, got {residual!r}")
    if isinstance(params, LowRank):
        return _quantize("param", params, base, residual, residual_device)
    return {
        name: _quantize(name, param, base, residual, residual_device) if isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def _quantize(name: str, param: LowRank, base: object, residual: ResidualKind, residual_device: Device) -> LowRank:
    old = param.base
    if isinstance(old, Deferred):
        raise ValueError(f"`params` must be folded and no longer deferred to be quantized, got {name!r}, which is")
    if isinstance(old, Sharded):
        raise ValueError(f"`params` must be quantized before they are sharded, got {name!r}, which is")
    dtype = old.dtype if isinstance(old, Tensor) else old.like.dtype
    return param._replace(base=quantize_base(name, old, base, residual, residual_device, dtype))


def quantize_base(
    name: str,
    old: LocalBase,
    base: object,
    residual: ResidualKind,
    residual_device: Device,
    dtype: torch.dtype,
) -> LocalBase:
    """`quantize` of a base alone, of a weight in `dtype`: a plain tensor for bfloat16 without a residual."""
    kind, float8_dtype = format_of(base)
    # nf4's scales are in float32, and torchao knows no int8 for float64.
    keeps = kind != "nf4" and dtype in (torch.bfloat16, torch.float16)
    made = []
    for member in stack_members(old):
        weight = _exact(member, torch.float32)
        check_finite(weight, name)
        codes = encode(weight, empty_codes(kind, name, weight, float8_dtype=float8_dtype))
        rest = weight.sub_(decode(codes, weight.dtype))
        check_finite(rest, name)  # the largest numbers may round to infinity
        like = rest.new_empty(0, dtype=dtype if keeps else torch.float32)
        made.append(Quantized(codes, make_residual(rest, residual, residual_device), like))
    stack = stack_bases(made, base_shape(old)[:-2])
    return stack.codes if isinstance(stack.codes, Tensor) and residual is None else stack


def _exact(base: LocalBase, dtype: torch.dtype) -> Tensor:
    """One member with its residual, in `dtype` or a wider one: memory of its own."""
    if isinstance(base, Tensor):
        return decode_exact(base, (), widest(base.dtype, dtype))
    return decode_exact(base.codes, base.residual, dtype)


# --- how far off


@overload
def drift(params: LowRank, exact: Tensor | None = ...) -> Float[Tensor, ""]: ...
@overload
def drift(params: Params, exact: Mapping[str, Tensor] | None = ...) -> dict[str, Float[Tensor, ""]]: ...
def drift(
    params: LowRank | Params, exact: Tensor | Mapping[str, Tensor] | None = None
) -> Float[Tensor, ""] | dict[str, Float[Tensor, ""]]:
    """How far the weight that products see is from the exact one, ``|weight - exact| / |exact|`` in Frobenius norms.

    Exact is codes and residual and factors together, or what is given. Without a residual nobody knows what was lost:
    NaN. A stack counts as one weight. It takes about the time of a fold.

    Args:
        params: one weight, or weights by name.
        exact: dense weights to compare with instead, one or by name.

    Returns:
        A 0-d tensor in float32, or one for each low-rank weight by name.
    """
    if isinstance(params, LowRank):
        assert exact is None or isinstance(exact, Tensor)
        return _drift(params, exact)
    assert exact is None or isinstance(exact, Mapping)
    low_rank = {name: param for name, param in params.items() if isinstance(param, LowRank)}
    return {name: _drift(param, exact[name] if exact else None) for name, param in low_rank.items()}


def _drift(param: LowRank, wanted: Tensor | None) -> Tensor:
    standing, (b, a) = with_pending(param)
    base = gather_base(standing)
    if wanted is None and (isinstance(base, Tensor) or not code_tensors(base.residual)):
        return torch.full((), torch.nan, device=b.device)
    stack, wide = param.shape[:-2].numel(), widest(b.dtype)
    b, a = b.reshape(stack, *b.shape[-2:]), a.reshape(stack, *a.shape[-2:])
    targets = [None] * stack if wanted is None else wanted.reshape(stack, *wanted.shape[-2:])
    squares = []
    for number, (member, target) in enumerate(zip(stack_members(base), targets, strict=True)):
        seen = fold(dequantize(member, wide), b[number], a[number], rank=a.shape[-2])
        if target is None:
            missed = decode(member.residual, seen.dtype).to(seen.device)  # type: ignore
            target = seen + missed  # noqa: PLW2901
        else:
            missed = target - seen
        squares.append(torch.stack([missed.square().sum(), target.square().sum()]))
    off, size = torch.stack(squares).sum(0)
    relative: Tensor = (off / size).sqrt()
    return relative.float()

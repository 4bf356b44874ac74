"""One weight: its vectors, merged, made dense. ``weight = base + b @ a / rank``."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import map_low_rank
from dynlora_fn._core._types import Factors, LowRank, Param, Params
from dynlora_fn.bases._base import dequantize, fold_base, plain_dtype
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._types import Base, Deferred, Sharded
from dynlora_fn.switching._basis import Bounds, Request, basis_bounds, uniform

Start: TypeAlias = Literal["switchlora", "lora"]


class BasisSlice(NamedTuple):
    """Vectors of both sides of a weight's basis. Without stack axes, the same ones for the whole stack."""

    seed: Int[Tensor, "*stack"]
    b_indices: Int[Tensor, "*#stack b_count"]
    a_indices: Int[Tensor, "*#stack a_count"]
    shape: Sequence[int]  # of the weight, (out, in); it sets the bounds together with the rank and the start
    rank: int
    start: Start
    dtype: torch.dtype


def basis_vectors(slices: Sequence[BasisSlice]) -> list[Factors]:
    """The vectors of each slice, laid out as factors: `b` (*stack, out, b_count) and `a` (*stack, a_count, in)."""
    requests = [
        request
        for wanted in slices
        for request in (
            Request(wanted.seed, "b", wanted.b_indices, wanted.shape[-2]),
            Request(wanted.seed, "a", wanted.a_indices, wanted.shape[-1]),
        )
    ]
    units = uniform(requests)
    return [_scale(wanted, b, a) for wanted, b, a in zip(slices, units[::2], units[1::2], strict=True)]


def _scale(wanted: BasisSlice, b: Tensor, a: Tensor) -> Factors:
    if wanted.start not in ("switchlora", "lora"):
        raise ValueError(f"`start` must be 'switchlora' or 'lora', got {wanted.start!r}")
    out_features, in_features = wanted.shape[-2:]
    is_lora = wanted.start == "lora"
    bound = Bounds(b=0.0, a=in_features**-0.5) if is_lora else basis_bounds(out_features, in_features, wanted.rank)
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    b, a = b.to(dtype) * bound.b, a.to(dtype) * bound.a
    return Factors(b=b.to(wanted.dtype).mT.contiguous(), a=a.to(wanted.dtype))


@overload
def materialize(params: LowRank | Tensor) -> Tensor: ...
@overload
def materialize(params: Params) -> dict[str, Tensor]: ...
def materialize(params: Param | Params) -> Tensor | dict[str, Tensor]:
    """The dense weight, ``base + b @ a / rank``, of one parameter or of each in a dict.

    Numerics: in the wider dtype of base and factors, float32 at least. Of a quantized base it is what products see, not
    the residual.
    """
    return map_low_rank(_dense, params)  # type: ignore[return-value]


def _dense(param: LowRank) -> Tensor:
    base, (b, a) = with_pending(param)
    wide = widest(b.dtype, plain_dtype(base))
    return fold(dequantize(base, wide), b, a, rank=b.shape[-1])


@overload
def merge(params: LowRank) -> LowRank: ...
@overload
def merge(params: Params) -> dict[str, Param]: ...
def merge(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """The same weight with the product of the factors folded into the base, and ``b = 0``; `a` and the seed stay.

    Merging twice is merging once.

    Raises:
        ValueError: if a quantized weight is not finite; it names the weight.

    Numerics: the base is rounded once to its dtype, or quantized once (see `quantize`).
    """
    if isinstance(params, LowRank):
        return _merge("param", params)
    return {name: _merge(name, param) if isinstance(param, LowRank) else param for name, param in params.items()}


def _merge(name: str, param: LowRank) -> LowRank:
    held, (b, a) = with_pending(param)
    base: Base = fold_base(held, b, a, rank=b.shape[-1], name=name)
    if isinstance(param.base, Sharded):
        assert isinstance(base, Sharded)
        base = base._replace(sharding=param.base.sharding)
    if isinstance(param.base, Deferred):
        base = Deferred(base, tree_map(torch.zeros_like, param.base.pending))  # type: ignore[arg-type]
    return LowRank(base, param.factors._replace(b=torch.zeros_like(param.factors.b)), param.seed)

"""Generate the basis vectors of a weight, and `materialize` and `merge` weights.

A weight is ``base + alpha / rank * b @ a``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from jaxtyping import Int
from torch import Tensor

from dynlora_fn._core._check import check_choice, check_dtype, check_integer, described
from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._tree import tensor_of, whole_factors
from dynlora_fn._core._types import Alpha, Factors, LowRank, Param, Params, Side
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.switching._basis import Request, basis_bounds, uniform
from dynlora_fn.switching._orthonormal import orthonormal_rows, request_signs, row_length

Start: TypeAlias = Literal["switchlora", "lora"]
Vectors: TypeAlias = Literal["switchlora", "lora", "orthonormal"]


class BasisSlice(NamedTuple):
    """Vectors of both sides of a weight's basis, named by their indices.

    Indices without stack axes apply to all members of the stack.
    """

    seed: Int[Tensor, "*stack"]
    b_indices: Int[Tensor, "*#stack b_count"]
    a_indices: Int[Tensor, "*#stack a_count"]
    shape: Sequence[int]  # (out, in) of the weight; with `rank`, `start` and `alpha` it sets the bounds
    rank: int
    start: Vectors
    dtype: torch.dtype
    alpha: float = 1.0


def basis_vectors(slices: Sequence[BasisSlice]) -> list[Factors]:
    """Generate the vectors of each slice of a basis.

    Their bits depend only on seed, side and index, and on the scale that shape, rank, start and alpha set. They are the
    same on every device, eager and compiled. All slices are generated together.

    Args:
        slices: The slices. A `start` of "switchlora" draws both sides with the bounds of `basis_bounds`. "lora" means
            zeros on side b and a bound of ``1 / sqrt(in)`` on side a. "orthonormal" means zeros on side b, and on side
            a orthogonal rows of length ``sqrt(rank / abs(alpha))``, with the indices modulo `in`.

    Returns:
        For each slice the vectors, laid out as factors: `b` (*stack, out, b_count) and `a` (*stack, a_count, in).

    Raises:
        TypeError: If a value is not a `BasisSlice`, or a field has a wrong type or dtype.
        ValueError: If a `start` is unknown, or a size, rank or alpha is out of range.

    Numerics: Vectors are scaled in float32, or in the slice's dtype if that is wider, and rounded once to the dtype.
    Orthonormal vectors are computed in float64 first.

    Example:
        >>> import torch
        >>> seed, indices = torch.tensor(0), torch.arange(3)
        >>> part = BasisSlice(seed, indices, indices, (6, 4), 2, "switchlora", torch.float32)
        >>> (factors,) = basis_vectors([part])
        >>> factors.b.shape, factors.a.shape
        (torch.Size([6, 3]), torch.Size([3, 4]))
        >>> (again,) = basis_vectors([part._replace(a_indices=indices[2:])])  # only the index of a vector matters
        >>> torch.equal(again.a[0], factors.a[2])
        True
    """
    slices = list(slices)
    for basis_slice in slices:
        _check_slice(basis_slice)
    return vectors_of(slices) if slices else []


def vectors_of(slices: Sequence[BasisSlice]) -> list[Factors]:
    """Generate the vectors of `basis_vectors`, for slices that were checked before."""
    return _vectors_in_graph(slices) if torch.compiler.is_dynamo_compiling() else _vectors(slices)


# Dynamo does not trace into it, because tracing an operation takes longer than running it. AOTAutograd does.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _vectors_in_graph(slices: Sequence[BasisSlice]) -> list[Factors]:
    # Under `dynamic=True` sizes may be symbols. `int` makes constants of them.
    return _vectors([each._replace(shape=[*map(int, each.shape)], rank=int(each.rank)) for each in slices])


def _vectors(slices: Sequence[BasisSlice]) -> list[Factors]:
    requests = [
        request
        for basis_slice in slices
        for request in (
            *([_request(basis_slice, "b")] if basis_slice.start == "switchlora" else []),
            _request(basis_slice, "a"),
        )
    ]
    units = iter(uniform(requests))
    return [
        _scale(basis_slice, next(units) if basis_slice.start == "switchlora" else None, next(units))
        for basis_slice in slices
    ]


def _request(basis_slice: BasisSlice, side: Side) -> Request:
    if side == "b":
        return Request(basis_slice.seed, side, basis_slice.b_indices, basis_slice.shape[-2])
    if basis_slice.start == "orthonormal":
        return request_signs(basis_slice.seed, basis_slice.shape[-1])
    return Request(basis_slice.seed, side, basis_slice.a_indices, basis_slice.shape[-1])


def _check_slice(basis_slice: Any) -> None:
    if not isinstance(basis_slice, BasisSlice):
        raise TypeError(f"`slices` contains {described(basis_slice)}; pass a list of BasisSlice")
    for field in ("seed", "b_indices", "a_indices"):
        tensor = getattr(basis_slice, field)
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim < (field != "seed"):
            raise TypeError(f"`slices` has {described(tensor)} as `{field}`; use an int64 tensor")
    if not isinstance(basis_slice.shape, Sequence) or len(basis_slice.shape) < 2:
        raise TypeError(f"`slices` has {described(basis_slice.shape)} as `shape`; use (out, in)")
    for size in basis_slice.shape:
        check_integer("shape` of `slices", size, least=1)
    check_integer("rank` of `slices", basis_slice.rank, least=1)
    check_choice("start", basis_slice.start, get_args(Vectors))
    check_dtype("dtype` of `slices", basis_slice.dtype)
    Alpha(basis_slice.alpha)


def first_vectors(
    seed: Int[Tensor, "*stack"],
    shape: Sequence[int],
    rank: int,
    start: Vectors,
    dtype: torch.dtype,
    *,
    from_slot: int = 0,
    alpha: float = 1.0,
) -> Factors:
    """Return the vectors that a weight starts with, from `from_slot` on."""
    return vectors_of([first_slice(seed, shape, rank, start, dtype, from_slot=from_slot, alpha=alpha)])[0]


def first_slice(
    seed: Int[Tensor, "*stack"],
    shape: Sequence[int],
    rank: int,
    start: Vectors,
    dtype: torch.dtype,
    *,
    from_slot: int = 0,
    alpha: float = 1.0,
) -> BasisSlice:
    """Name the vectors that a weight starts with, from `from_slot` on."""
    slots = torch.arange(from_slot, max(rank, from_slot), device=seed.device)
    # Side b is switched half a cycle after side a, so that its vector 0 is in slot rank // 2 (see `Schedule`).
    b_indices = (slots - rank // 2) % rank
    return BasisSlice(seed, b_indices, slots, shape, rank, start, dtype, alpha)


def _scale(basis_slice: BasisSlice, b: Tensor | None, a: Tensor) -> Factors:
    """Scale numbers in [-1, 1) to the vectors of a slice. None means zeros on side b."""
    out_features, in_features = basis_slice.shape[-2:]
    dtype = torch.promote_types(basis_slice.dtype, torch.float32)
    if b is None:
        shape = torch.broadcast_shapes(basis_slice.seed.shape, basis_slice.b_indices.shape[:-1])  # type: ignore[no-untyped-call]
        zeros = a.new_zeros((*shape, out_features, basis_slice.b_indices.shape[-1]), dtype=basis_slice.dtype)
        if basis_slice.start == "orthonormal":
            a = orthonormal_rows(a, basis_slice.a_indices) * row_length(basis_slice.rank, basis_slice.alpha)
            return Factors(b=zeros, a=a.to(basis_slice.dtype))
        return Factors(b=zeros, a=(a.to(dtype) * in_features**-0.5).to(basis_slice.dtype))
    bound = basis_bounds(out_features, in_features, basis_slice.rank, alpha=abs(basis_slice.alpha))
    b, a = b.to(dtype) * bound.b, a.to(dtype) * bound.a
    return Factors(b=b.to(basis_slice.dtype).mT.contiguous(), a=a.to(basis_slice.dtype))


@overload
def materialize(params: Param) -> Tensor: ...
@overload
def materialize(params: Params) -> dict[str, Tensor]: ...
def materialize(params: Param | Params) -> Tensor | dict[str, Tensor]:
    """Return the dense weight, ``base + alpha / rank * b @ a``.

    The parameters do not change. A sharded base is all-gathered: call the function on every process then.

    Args:
        params: One parameter, or a dict of parameters by name. Full-rank parameters are returned unchanged.

    Returns:
        The dense weight (*stack, out, in), or a dict of dense weights by name.

    Raises:
        TypeError: If `params` has a value that is not a parameter.
        ValueError: If factors are sharded. Gather them with `unshard`.
        NotImplementedError: If codes or a sharded base require a gradient or have a tangent, or if `torch.vmap` maps
            over a sharded base.

    Numerics: The weight has the wider dtype of base and factors, at least float32. A quantized base is decoded without
    its residual, as products read it.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> torch.allclose(materialize(params["w"]), torch.ones(6, 4))
        True
    """
    check_one_or_more("params", params, or_tensor=True)
    if isinstance(params, Mapping):
        return {name: _dense(param) for name, param in params.items()}
    return _dense(params)


def _dense(param: Param) -> Tensor:
    if not isinstance(param, LowRank):
        return tensor_of(param)
    joined = with_pending(param, _sum_dtype(param))
    base, (b, a) = as_base(joined.base), whole_factors(joined)
    return fold(base.dequantize(widest(b.dtype, a.dtype, base.sum_dtype)), b, a, divisor=joined.divisor)


@overload
def merge(params: LowRank) -> LowRank: ...
@overload
def merge(params: Params) -> dict[str, Param]: ...
def merge(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """Fold the product of the factors into the base.

    The weight does not change, except for one rounding of the base. Merging twice equals merging once::

        base += alpha / rank * b @ a,     b = 0

    `a` and the seed stay the same.

    Args:
        params: One weight, or a dict of parameters by name. Full-rank parameters are returned unchanged.

    Returns:
        The new weight, or the new parameters by name.

    Raises:
        TypeError: If `params` has a value that is not a parameter.
        ValueError: If factors are sharded, or a quantized weight is not finite. The message names the weight.
        NotImplementedError: If a base is quantized, and it or its factors require a gradient or have a tangent.

    Numerics: The base is rounded once to its dtype, or quantized once (see `quantize`). Derivatives pass through a
    plain base, in reverse and in forward mode.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = merge(init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"]))
        >>> bool(params["w"].factors.b.any()), torch.allclose(params["w"].base, torch.ones(6, 4))
        (False, True)
    """
    check_one_or_more("params", params)
    if isinstance(params, LowRank):
        return _merge("param", params)
    return {name: _merge(name, param) if isinstance(param, LowRank) else param for name, param in params.items()}


def _sum_dtype(param: LowRank) -> torch.dtype:
    """Return the dtype in which factors and pending folds are added to the base."""
    b, a, *_ = param.factors
    return widest(b.dtype, a.dtype, as_base(as_base(param.base).folded).sum_dtype)


def _merge(name: str, param: LowRank) -> LowRank:
    joined = with_pending(param, _sum_dtype(param))
    new = as_base(joined.base).fold(*whole_factors(joined), divisor=joined.divisor, name=name)
    base = as_base(param.base).with_folded(new, divisor=param.divisor)
    return LowRank(base, param.factors._replace(b=torch.zeros_like(param.factors.b)), param.seed)

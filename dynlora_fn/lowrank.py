"""One weight: made, merged, made dense. ``weight = base + b @ a / rank``."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dynlora_fn.base import fold, widest
from dynlora_fn.basis import Bounds, Request, basis_bounds, uniform
from dynlora_fn.quantized import dequantize, fold_base
from dynlora_fn.stacking import Stack, find_stacks
from dynlora_fn.tree import map_low_rank, match
from dynlora_fn.types import Factors, LowRank, Param, Params

Start: TypeAlias = Literal["switchlora", "lora"]


def init(
    model: nn.Module | Mapping[str, Tensor],
    *,
    rank: int,
    seed: int,
    targets: Sequence[str],
    start: Start = "switchlora",
    base_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
) -> dict[str, Param]:
    """Parameters whose weights equal the model's to the precision of the base.

    ``base = weight - b @ a / rank`` with both factors drawn from the basis, as in arXiv:2406.06564, section 3.

    Args:
        model: a module, or its parameters by name. It is neither changed nor kept: everything is copied.
        rank: of the factors, at least 1 and at most min(out, in) of every target.
        seed: names the bases. Each weight gets its own, from this seed and the weight's name.
        targets: names or globs of the 2-D weights that become low-rank; all else is trained full-rank.
        start: "switchlora" draws both factors, with the bounds of `basis_bounds`; "lora" draws `a` as `nn.Linear` would
            and starts from ``b = 0`` (arXiv:2106.09685).
        base_dtype: of the bases; the weight's own unless given.
        dtype: of the factors.
        stack: whether weights that repeat over layers become one parameter, such as ``layers.*.q.weight``.

    Returns:
        By name a `LowRank` for each target and a tensor for everything else, none of which requires a gradient.

    Raises:
        ValueError: if a pattern matches nothing, a target is not a matrix, or the rank does not fit.

    Example:
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> params["weight"].factors.b.shape, params["weight"].factors.a.shape, params["bias"].shape
        (torch.Size([4, 2]), torch.Size([2, 6]), torch.Size([4]))
    """
    tensors = _own_tensors(model)
    is_target = set(match(tensors, targets, "targets"))
    for name in is_target:
        _check_target(name, tensors[name], rank)
    keys = {name: (name in is_target, t.shape, t.dtype, t.device) for name, t in tensors.items()}
    groups = find_stacks(keys) if stack else {name: Stack([name], ()) for name in tensors}
    params: dict[str, Param] = {}
    for pattern, group in groups.items():
        members = torch.stack([tensors[name] for name in group.members])
        weight = members.reshape(*group.shape, *members.shape[1:])
        if group.members[0] in is_target:
            seeds = torch.tensor([_weight_seed(seed, name) for name in group.members], device=weight.device)
            params[pattern] = _split(
                weight,
                seeds.reshape(group.shape),
                rank=rank,
                start=start,
                base_dtype=base_dtype or weight.dtype,
                dtype=dtype,
            )
        else:
            params[pattern] = weight
    return params


def _own_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, detached; of tied ones the first name, as `nn.Module.named_parameters` does it."""
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`model` must hold floating-point parameters alone, got {tensor.dtype} for {name!r}")
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0 or tensor.device.type == "meta" or identity not in seen:
            tensors[name] = tensor.detach()
        seen.add(identity)
    return tensors


def _check_target(name: str, weight: Tensor, rank: int) -> None:
    if weight.ndim != 2:
        raise ValueError(f"`targets` must match matrices (out, in), got {name!r} of shape {tuple(weight.shape)}")
    if not 1 <= rank <= min(weight.shape):
        limits = f"at least 1 and at most min(out, in) = {min(weight.shape)} for {name!r}"
        raise ValueError(f"`rank` must be {limits} of shape {tuple(weight.shape)}, got {rank}")


def _weight_seed(seed: int, name: str) -> int:
    """63 bits that depend on the name and not on what else is a target or how it is stacked."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _split(
    weight: Tensor, seed: Tensor, *, rank: int, start: Start, base_dtype: torch.dtype, dtype: torch.dtype
) -> LowRank:
    slots = torch.arange(rank, device=weight.device)
    # Side b is switched half a turn behind side a, so that its vector number 0 is in slot rank // 2 (see `Schedule`).
    behind = (slots - rank // 2) % rank
    (factors,) = basis_vectors([BasisSlice(seed, behind, slots, weight.shape[-2:], rank, start, dtype)])
    return LowRank(fold(weight, -factors.b, factors.a, rank=rank, dtype=base_dtype), factors, seed)


class BasisSlice(NamedTuple):
    """Vectors of both sides of a weight's basis. Without stack axes, the same ones for the whole stack."""

    seed: Int[Tensor, "*stack"]
    b_indices: Int[Tensor, "*stack b_count"]
    a_indices: Int[Tensor, "*stack a_count"]
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
    b, a = param.factors
    wide = widest(b.dtype, param.base.dtype if isinstance(param.base, Tensor) else torch.float32)
    return fold(dequantize(param.base, wide), b, a, rank=b.shape[-1])


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
    b, a = param.factors
    base = fold_base(param.base, b, a, rank=b.shape[-1], name=name)
    return LowRank(base, Factors(torch.zeros_like(b), a), param.seed)

"""One weight: made, merged, made dense. ``weight = base + b @ a / rank``."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dynlora_fn.base import fold, widest
from dynlora_fn.basis import Bounds, Request, basis_bounds, uniform
from dynlora_fn.stacking import Stack, find_stacks
from dynlora_fn.targets import Target, Targets, select
from dynlora_fn.tree import map_low_rank
from dynlora_fn.types import Factors, LowRank, Param, Params

Start: TypeAlias = Literal["switchlora", "lora"]


def init(
    model: nn.Module | Mapping[str, Tensor],
    *,
    rank: int | Mapping[str, int],
    seed: int,
    targets: Targets,
    start: Start = "switchlora",
    fused: Mapping[str, int | tuple[int, int]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    base_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
) -> dict[str, Param]:
    """Parameters whose weights equal the model's to the precision of the base.

    ``base = weight - b @ a / rank`` with both factors drawn from the basis, as in arXiv:2406.06564, section 3.

    A target is a matrix (out, in); of more axes, a stack of them (experts), or the weight of a convolution, which is
    taken for a matrix (out, in * prod(kernel)).

    Args:
        model: a module, or its parameters by name. It is neither changed nor kept: everything is copied.
        rank: of the factors, at least 1 and at most min(out, in) of every target; or by name or glob, of which the
            first that matches counts.
        seed: names the bases. Each weight gets its own, from this seed and the weight's name.
        targets: what becomes low-rank; all else is trained full-rank. Names, globs or types of modules, whose own
            matrices are meant; or a predicate of the name and the tensor.
        start: "switchlora" draws both factors, with the bounds of `basis_bounds`; "lora" draws `a` as `nn.Linear` would
            and starts from ``b = 0`` (arXiv:2106.09685).
        fused: by name or glob, of how many equal parts a target is made that become a stack, each with factors of its
            own: 3 for queries, keys and values above each other (3 * out, in), ``(3, -1)`` for columns side by side.
        weights: by name, instead of the module's own, which may then be on the meta device. They are asked for one
            stack at a time.
        base_dtype: of the bases; the weight's own unless given.
        dtype: of the factors.
        stack: whether weights that repeat over layers become one parameter, such as ``layers.*.q.weight``.

    Returns:
        By name a `LowRank` for each target and a tensor for everything else, none of which requires a gradient.

    Raises:
        ValueError: if a pattern matches nothing, a target is not a matrix, a rank does not fit, or one of `weights` is
            missing or of another shape.

    Example:
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> params["weight"].factors.b.shape, params["weight"].factors.a.shape, params["bias"].shape
        (torch.Size([4, 2]), torch.Size([2, 6]), torch.Size([4]))
    """
    module = model if isinstance(model, nn.Module) else None
    tensors = _own_tensors(model)
    found = select(module, tensors, targets, rank, fused or {})
    read = tensors.__getitem__ if weights is None else partial(_given, weights, module, tensors)
    keys = {name: (found.get(name), t.shape, t.dtype, t.device) for name, t in tensors.items()}
    groups = find_stacks(keys) if stack else {name: Stack([name], ()) for name in tensors}
    params: dict[str, Param] = {}
    for pattern, group in groups.items():
        members = torch.stack([read(name) for name in group.members])
        weight = members.reshape(*group.shape, *members.shape[1:])
        target = found.get(group.members[0])
        if target is not None:
            matrices = as_matrices(weight, target, len(group.shape))
            params[pattern] = _split(
                matrices,
                _seeds(seed, group.members, matrices),
                rank=target.rank,
                start=start,
                base_dtype=base_dtype or weight.dtype,
                dtype=dtype,
            )
        else:
            params[pattern] = weight
    return params


def as_matrices(weight: Tensor, target: Target, stack_axes: int) -> Tensor:
    """Parameters behind `stack_axes` as (*stack, out, in), in which a fused one has an axis for its parts."""
    if target.is_spatial:
        return weight.flatten(stack_axes + 1)
    if target.parts == 1:
        return weight
    axis, shape = target.axis % weight.ndim, weight.shape
    parts = weight.reshape(*shape[:axis], target.parts, -1, *shape[axis + 1 :])
    return parts.movedim(axis, -3).contiguous()


def _given(weights: Mapping[str, Tensor], module: nn.Module | None, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """One of `weights`, by whichever of its names it has there."""
    own = dict(module.named_parameters(remove_duplicate=False)) if module is not None else {}
    names = [name, *(other for other, tensor in own.items() if other != name and tensor is own[name])]
    for one in names:
        if one in weights:
            weight, shape = weights[one].detach(), tuple(tensors[name].shape)
            if tuple(weight.shape) != shape:
                raise ValueError(
                    f"`weights` must fit the model, got {one!r} of shape {tuple(weight.shape)} for {shape}"
                )
            return weight
    shape = tuple(tensors[name].shape)
    raise ValueError(f"`weights` must hold every parameter of the model, got none for {name!r} of shape {shape}")


def _seeds(seed: int, names: list[str], matrices: Tensor) -> Tensor:
    """One for each matrix of the stack: by the weight's name, and within a weight by the number as well."""
    stack = matrices.shape[:-2]
    within = stack.numel() // len(names)
    seeds = [
        _weight_seed(seed, name if within == 1 else f"{name}[{number}]") for name in names for number in range(within)
    ]
    return torch.tensor(seeds, device=matrices.device).reshape(stack)


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

    Numerics: in the wider dtype of base and factors, float32 at least.
    """
    return map_low_rank(_dense, params)  # type: ignore[return-value]


def _dense(param: LowRank) -> Tensor:
    b, a = param.factors
    return fold(param.base, b, a, rank=b.shape[-1], dtype=widest(param.base.dtype, b.dtype))


@overload
def merge(params: LowRank) -> LowRank: ...
@overload
def merge(params: Params) -> dict[str, Param]: ...
def merge(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """The same weight with the product of the factors folded into the base, and ``b = 0``; `a` and the seed stay.

    Merging twice is merging once.

    Numerics: the base is rounded once to its dtype.
    """
    return map_low_rank(_merge, params)  # type: ignore[return-value]


def _merge(param: LowRank) -> LowRank:
    b, a = param.factors
    return LowRank(fold(param.base, b, a, rank=b.shape[-1]), Factors(torch.zeros_like(b), a), param.seed)

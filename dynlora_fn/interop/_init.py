"""Parameters made from a model: `init`."""

import hashlib
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import Stack, find_stacks
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn._core._types import LowRank, Param
from dynlora_fn.bases._base import dequantize, fold_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._quantize import quantize_base
from dynlora_fn.bases._quantized import Device, ResidualKind, base_shape, stack_bases
from dynlora_fn.bases._sharded import gather_base
from dynlora_fn.bases._torchao_tensors import from_torchao, is_torchao
from dynlora_fn.bases._types import LocalBase
from dynlora_fn.interop._targets import Target, Targets, as_matrices, select
from dynlora_fn.parallel._shard import Group, shard
from dynlora_fn.switching._weight import BasisSlice, Start, basis_vectors


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
    base: object = None,
    residual: ResidualKind = "bfloat16",
    residual_device: Device = None,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
    group: "Group | None" = None,
) -> dict[str, Param]:
    """Parameters whose weights equal the model's to the precision of the base.

    ``base = weight - b @ a / rank`` with both factors drawn from the basis, as in arXiv:2406.06564, section 3.

    A target is a matrix (out, in); of more axes, a stack of them (experts), or the weight of a convolution, which is
    taken for a matrix (out, in * prod(kernel)).

    Args:
        model: a module, or its parameters by name. It is neither changed nor kept: everything is copied. Targets may be
            torchao's tensors, as its ``quantize_`` makes them, and stay in their format; with ``start="lora"`` their
            very codes. Others of them become dense, to be trained.
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
        base, residual, residual_device: of bases in low precision, as in `quantize`.
        dtype: of the factors.
        stack: whether weights that repeat over layers become one parameter, such as ``layers.*.q.weight``.
        group: of processes that share the bases, as by `shard`: each weight is cut before the next one is read, so that
            beside its own rows a process never holds more than one base.

    Returns:
        By name a `LowRank` for each target and a tensor for everything else, none of which requires a gradient.

    Raises:
        ValueError: if a pattern matches nothing, a target is not a matrix or not finite in low precision, a rank or a
            format does not fit, one of `weights` is missing or of another shape, or both `base` and `base_dtype` are
            given.

    Example:
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> params["weight"].factors.b.shape, params["weight"].factors.a.shape, params["bias"].shape
        (torch.Size([4, 2]), torch.Size([2, 6]), torch.Size([4]))
    """
    if base is not None and base_dtype is not None:
        raise ValueError(f"`base` and `base_dtype` must not both be given, got {base!r} and {base_dtype}")
    module = model if isinstance(model, nn.Module) else None
    tensors = _own_tensors(model)
    found = select(module, tensors, targets, rank, fused or {})
    read = tensors.__getitem__ if weights is None else partial(_given, weights, module, tensors)
    groups = {name: Stack([name], ()) for name in tensors}
    if stack:
        groups = find_stacks({name: (found.get(name), *_kind(tensor)) for name, tensor in tensors.items()})
    params: dict[str, Param] = {}

    def made(pattern: str, own: Stack) -> Param:
        target, dtypes = found.get(own.members[0]), tensors[own.members[0]].dtype
        held = [_as_base(name, read(name), target is not None, residual, residual_device) for name in own.members]
        stacked = stack_bases(held, own.shape)
        if target is None:
            assert isinstance(stacked, Tensor)
            return stacked
        matrices = _as_matrices(pattern, stacked, target, len(own.shape))
        seeds = _seeds(seed, own.members, base_shape(matrices)[:-2], held[0])
        # Rounded once: what is to be quantized is not rounded before.
        plain_dtype = base_dtype or (dtypes if base is None else widest(dtypes))
        param = _split(pattern, matrices, seeds, rank=target.rank, start=start, base_dtype=plain_dtype, dtype=dtype)
        if base is not None:
            quantized = quantize_base(
                pattern, gather_base(with_pending(param).base), base, residual, residual_device, dtypes
            )
            param = param._replace(base=quantized)
        return param

    for pattern, own in groups.items():
        if group is None or own.members[0] not in found:
            params[pattern] = made(pattern, own)
        else:  # each is cut before the next is read
            parts = [shard({pattern: made(pattern, Stack([name], ()))}, group)[pattern] for name in own.members]
            params[pattern] = stack_bases(parts, own.shape)  # type: ignore[type-var]
    return params


def _as_matrices(name: str, weight: LocalBase, target: Target, stack_axes: int) -> LocalBase:
    if isinstance(weight, Tensor):
        return as_matrices(weight, target, stack_axes)
    if target.parts > 1 or target.is_spatial:
        rule = "match matrices alone among torchao's tensors, neither fused ones nor those of convolutions"
        raise ValueError(f"`targets` must {rule}, got {name!r}")
    return weight


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


def _seeds(seed: int, names: list[str], stack: torch.Size, like: LocalBase) -> Tensor:
    """One for each matrix of the stack: by the weight's name, and within a weight by the number as well."""
    within = stack.numel() // len(names)
    seeds = [
        _weight_seed(seed, name if within == 1 else f"{name}[{number}]") for name in names for number in range(within)
    ]
    return torch.tensor(seeds, device=tree_leaves(like)[0].device).reshape(stack)


def _own_tensors(model: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, detached; of tied ones the first name, as `nn.Module.named_parameters` does it."""
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise ValueError(f"`model` must hold floating-point parameters alone, got {tensor.dtype} for {name!r}")
        memory = inner_tensors(tensor)[0]  # torchao's tensor has none itself
        identity = (memory.data_ptr(), memory.stride(), tensor.shape, tensor.device)
        if tensor.numel() == 0 or tensor.device.type == "meta" or identity not in seen:
            tensors[name] = tensor.detach()
        seen.add(identity)
    return tensors


def _as_base(name: str, tensor: Tensor, is_target: bool, residual: ResidualKind, residual_device: Device) -> LocalBase:
    """A tensor, copied later, or the codes of one of torchao's; dense where it is to be trained full-rank."""
    if not is_torchao(tensor):
        return tensor
    held = from_torchao(tensor, residual=residual, residual_device=residual_device, name=name)
    return held if is_target else dequantize(held, tensor.dtype)


def _kind(tensor: Tensor) -> list[object]:
    """What members of a stack have in common."""
    inner = [(leaf.shape, leaf.dtype, leaf.device) for leaf in inner_tensors(tensor)]
    return [type(tensor).__name__ if is_torchao(tensor) else "", tensor.shape, tensor.dtype, *inner]


def _weight_seed(seed: int, name: str) -> int:
    """63 bits that depend on the name and not on what else is a target or how it is stacked."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _split(
    name: str,
    weight: LocalBase,
    seed: Tensor,
    *,
    rank: int,
    start: Start,
    base_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> LowRank:
    slots = torch.arange(rank, device=seed.device)
    # Side b is switched half a turn behind side a, so that its vector number 0 is in slot rank // 2 (see `Schedule`).
    behind = (slots - rank // 2) % rank
    shape = base_shape(weight)[-2:]
    (factors,) = basis_vectors([BasisSlice(seed, behind, slots, shape, rank, start, dtype)])
    if isinstance(weight, Tensor):
        return LowRank(fold(weight, -factors.b, factors.a, rank=rank, dtype=base_dtype), factors, seed)
    return LowRank(fold_base(weight, -factors.b, factors.a, rank=rank, name=name), factors, seed)

"""Parameters made from a model: `init`."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dynlora_fn.base import fold, widest
from dynlora_fn.bases import Device, ResidualKind, base_shape, dequantize, fold_base, restack, settled
from dynlora_fn.lowrank import BasisSlice, Start, basis_vectors
from dynlora_fn.quantized import quantize_base
from dynlora_fn.stacking import Stack, find_stacks
from dynlora_fn.torchao_tensors import from_torchao, inner_tensors, is_torchao
from dynlora_fn.tree import match
from dynlora_fn.types import Held, LowRank, Param


def init(
    model: nn.Module | Mapping[str, Tensor],
    *,
    rank: int,
    seed: int,
    targets: Sequence[str],
    start: Start = "switchlora",
    base_dtype: torch.dtype | None = None,
    base: object = None,
    residual: ResidualKind = "bfloat16",
    residual_device: Device = None,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
) -> dict[str, Param]:
    """Parameters whose weights equal the model's to the precision of the base.

    ``base = weight - b @ a / rank`` with both factors drawn from the basis, as in arXiv:2406.06564, section 3.

    Args:
        model: a module, or its parameters by name. It is neither changed nor kept: everything is copied. Targets may be
            torchao's tensors, as its ``quantize_`` makes them, and stay in their format; with ``start="lora"`` their
            very codes. Others of them become dense, to be trained.
        rank: of the factors, at least 1 and at most min(out, in) of every target.
        seed: names the bases. Each weight gets its own, from this seed and the weight's name.
        targets: names or globs of the 2-D weights that become low-rank; all else is trained full-rank.
        start: "switchlora" draws both factors, with the bounds of `basis_bounds`; "lora" draws `a` as `nn.Linear` would
            and starts from ``b = 0`` (arXiv:2106.09685).
        base_dtype: of the bases; the weight's own unless given.
        base, residual, residual_device: of bases in low precision, as in `quantize`.
        dtype: of the factors.
        stack: whether weights that repeat over layers become one parameter, such as ``layers.*.q.weight``.

    Returns:
        By name a `LowRank` for each target and a tensor for everything else, none of which requires a gradient.

    Raises:
        ValueError: if a pattern matches nothing, a target is not a matrix or not finite in low precision, the rank or a
            format does not fit, or both `base` and `base_dtype` are given.

    Example:
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> params["weight"].factors.b.shape, params["weight"].factors.a.shape, params["bias"].shape
        (torch.Size([4, 2]), torch.Size([2, 6]), torch.Size([4]))
    """
    if base is not None and base_dtype is not None:
        raise ValueError(f"`base` and `base_dtype` must not both be given, got {base!r} and {base_dtype}")
    tensors = _own_tensors(model)
    is_target = set(match(tensors, targets, "targets"))
    bases: dict[str, Held] = {}
    for name, tensor in tensors.items():
        if name in is_target:
            _check_target(name, tensor, rank)
        bases[name] = _as_base(name, tensor, name in is_target, residual, residual_device)
    keys = {name: (name in is_target, *_kinds(one)) for name, one in bases.items()}
    groups = find_stacks(keys) if stack else {name: Stack([name], ()) for name in tensors}
    params: dict[str, Param] = {}
    for pattern, group in groups.items():
        whole, own = restack([bases[name] for name in group.members], group.shape), tensors[group.members[0]]
        if group.members[0] not in is_target:
            params[pattern] = whole  # type: ignore[assignment]
            continue
        seeds = torch.tensor([_weight_seed(seed, name) for name in group.members], device=own.device)
        seeds = seeds.reshape(group.shape)
        # Rounded once: what is to be quantized is not rounded before.
        plain_dtype = base_dtype or (own.dtype if base is None else widest(own.dtype))
        param = _split(pattern, whole, seeds, rank=rank, start=start, base_dtype=plain_dtype, dtype=dtype)
        if base is not None:
            held = quantize_base(pattern, settled(param).base, base, residual, residual_device, own.dtype)
            param = param._replace(base=held)
        params[pattern] = param
    return params


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


def _as_base(name: str, tensor: Tensor, is_target: bool, residual: ResidualKind, residual_device: Device) -> Held:
    """A tensor, copied later, or the codes of one of torchao's; dense where it is to be trained full-rank."""
    if not is_torchao(tensor):
        return tensor
    held = from_torchao(tensor, residual=residual, residual_device=residual_device, name=name)
    return held if is_target else dequantize(held, tensor.dtype)


def _kinds(base: Held) -> list[object]:
    """What members of a stack have in common."""
    return [type(base).__name__, *((leaf.shape, leaf.dtype, leaf.device) for leaf in tree_leaves(base))]


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
    name: str,
    weight: Held,
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

"""Which parameters become low-rank, at which rank, and as which matrices."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from dynlora_fn._core._torch import ConvNd
from dynlora_fn._core._tree import match, matches

Targets: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, Tensor], bool]


class Target(NamedTuple):
    """How one parameter becomes low-rank."""

    rank: int
    parts: int = 1  # that it is fused of
    axis: int = -2  # that they lie along
    is_spatial: bool = False  # the weight of a convolution


def select(
    model: nn.Module | None,
    tensors: Mapping[str, Tensor],
    targets: Targets,
    rank: int | Mapping[str, int],
    fused: Mapping[str, int | tuple[int, int]],
) -> dict[str, Target]:
    """The targets by name; see `init` for the arguments.

    Args:
        model: whose parameters they are; None if there are but tensors.
        tensors: looked at for shapes alone.

    Raises:
        ValueError: if a pattern matches nothing, or a target is no matrix or has no rank that fits it.
    """
    found = {}
    names = _chosen(model, tensors, targets)
    for pattern in (*fused, *(rank if isinstance(rank, Mapping) else ())):
        match(names, [pattern], "fused" if pattern in fused else "rank")
    for name in names:
        parts = next((parts for pattern, parts in fused.items() if matches(name, pattern)), 1)
        number, axis = (parts, -2) if isinstance(parts, int) else parts
        found[name] = Target(_rank_of(name, rank), number, axis, _is_spatial(model, name))
        _check(name, tuple(tensors[name].shape), found[name])
    return found


def _chosen(model: nn.Module | None, tensors: Mapping[str, Tensor], targets: Targets) -> list[str]:
    if isinstance(targets, str | type):
        targets = [targets]
    if not isinstance(targets, Sequence):
        return [name for name, tensor in tensors.items() if targets(name, tensor)]
    by_name = match(tensors, [one for one in targets if isinstance(one, str)], "targets")
    chosen = set(by_name)
    for one in targets:
        if not isinstance(one, str):
            chosen |= _of_type(model, tensors, one)
    return [name for name in tensors if name in chosen]


def _of_type(model: nn.Module | None, tensors: Mapping[str, Tensor], kind: type[nn.Module]) -> set[str]:
    """Matrices, and stacks of them, that modules of a type hold themselves."""
    if model is None:
        raise ValueError(f"`targets` must be names or a predicate for a dict of tensors, got {kind.__name__}")
    modules = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(f"`targets` must be types of the model's modules, got {kind.__name__}, of which it has none")
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    return names & tensors.keys()


def _rank_of(name: str, rank: int | Mapping[str, int]) -> int:
    if isinstance(rank, int):
        return rank
    for pattern, own in rank.items():
        if matches(name, pattern):
            return own
    raise ValueError(f"`rank` must say the rank of every target, got none for {name!r} in {dict(rank)}")


def _is_spatial(model: nn.Module | None, name: str) -> bool:
    return model is not None and isinstance(model.get_submodule(name.rpartition(".")[0]), ConvNd)


def _check(name: str, shape: tuple[int, ...], target: Target) -> None:
    if len(shape) < 2:
        raise ValueError(f"`targets` must match matrices (out, in) or stacks of them, got {name!r} of shape {shape}")
    if target.axis not in (-1, -2) or shape[target.axis] % target.parts or (target.is_spatial and target.parts > 1):
        rule = "be a number of parts, or one and the axis -1 or -2, that divide the weight"
        raise ValueError(f"`fused` must {rule}, got {target.parts} and {target.axis} for {name!r} of shape {shape}")
    matrix = list(shape[-2:])
    matrix[target.axis] //= target.parts
    if target.is_spatial:
        matrix = [shape[0], prod(shape[1:])]
    if not 1 <= target.rank <= min(matrix):
        limits = f"at least 1 and at most min(out, in) = {min(matrix)} for {name!r}"
        raise ValueError(f"`rank` must be {limits} of shape {shape}, got {target.rank}")


def as_matrices(weight: Tensor, target: Target, stack_axes: int) -> Tensor:
    """Parameters behind `stack_axes` as (*stack, out, in), in which a fused one has an axis for its parts."""
    if target.is_spatial:
        return weight.flatten(stack_axes + 1)
    if target.parts == 1:
        return weight
    axis, shape = target.axis % weight.ndim, weight.shape
    parts = weight.reshape(*shape[:axis], target.parts, -1, *shape[axis + 1 :])
    return parts.movedim(axis, -3).contiguous()

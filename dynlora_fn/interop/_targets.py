"""Select the parameters that become low-rank, their ranks, and the matrices that they consist of."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from dynlora_fn._core._check import check_integer
from dynlora_fn._core._torch import ConvNd
from dynlora_fn._core._tree import match, matches

Targets: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | Callable[[str, Tensor], bool]


class Target(NamedTuple):
    """How one parameter becomes low-rank."""

    rank: int
    parts: int = 1  # number of fused parts
    axis: int = -2  # along which the parts are adjacent
    is_spatial: bool = False  # the weight of a convolution


def select(
    model: nn.Module | None,
    tensors: Mapping[str, Tensor],
    targets: Targets,
    rank: int | Mapping[str, int],
    fused: Mapping[str, int | tuple[int, int]],
) -> dict[str, Target]:
    """Return the targets by name.

    Args:
        model: The module that has the parameters. None if only tensors are known.
        tensors: The parameters by name. Only shapes are read.
        targets: As in `init`.
        rank: As in `init`.
        fused: As in `init`.

    Raises:
        ValueError: If a pattern matches nothing, a target is not a matrix, or its rank is missing or does not fit.
    """
    selected = {}
    names = _target_names(model, tensors, targets)
    for pattern in (*fused, *(rank if isinstance(rank, Mapping) else ())):
        match(names, [pattern], "fused" if pattern in fused else "rank")
    for name in names:
        parts = next((parts for pattern, parts in fused.items() if matches(name, pattern)), 1)
        count, axis = (parts, -2) if isinstance(parts, int) else parts
        selected[name] = Target(_rank_of(name, rank), count, axis, _is_spatial(model, name))
        _check(name, tuple(tensors[name].shape), selected[name])
    return selected


def _target_names(model: nn.Module | None, tensors: Mapping[str, Tensor], targets: Targets) -> list[str]:
    if isinstance(targets, str | type):
        targets = [targets]
    if not isinstance(targets, Sequence):
        return [name for name, tensor in tensors.items() if targets(name, tensor)]
    by_name = match(tensors, [pattern for pattern in targets if isinstance(pattern, str)], "targets")
    names = set(by_name)
    for target in targets:
        if not isinstance(target, str):
            names |= _names_by_type(model, tensors, target)
    return [name for name in tensors if name in names]


def _names_by_type(model: nn.Module | None, tensors: Mapping[str, Tensor], kind: type[nn.Module]) -> set[str]:
    """Return the names of matrices, and of stacks of them, that modules of a type have themselves."""
    if model is None:
        raise ValueError(
            f"`targets` has the type {kind.__name__}, but `model` is a dict of tensors; use names, globs or a predicate"
        )
    modules = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(
            f"`targets` has the type {kind.__name__}, but `model` has no such module; use a type that occurs in it"
        )
    names = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    return names & tensors.keys()


def _rank_of(name: str, rank: int | Mapping[str, int]) -> int:
    if not isinstance(rank, Mapping):
        return check_integer("rank", rank)
    for pattern, matching_rank in rank.items():
        if matches(name, pattern):
            return check_integer("rank", matching_rank, of=pattern)
    raise ValueError(f"`rank` has no rank for target {name!r} in {dict(rank)}; add a pattern that matches it, or '*'")


def _is_spatial(model: nn.Module | None, name: str) -> bool:
    return model is not None and isinstance(model.get_submodule(name.rpartition(".")[0]), ConvNd)


def _check(name: str, shape: tuple[int, ...], target: Target) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"`targets` matches {name!r} of shape {shape}; match only matrices (out, in) or stacks of them"
        )
    if target.axis not in (-1, -2) or shape[target.axis] % target.parts or (target.is_spatial and target.parts > 1):
        raise ValueError(
            f"`fused` is {target.parts} along axis {target.axis} for {name!r} of shape {shape}; use a number of parts "
            "that divides axis -2, or (parts, axis) with axis -1 or -2, and no convolution"
        )
    matrix = list(shape[-2:])
    matrix[target.axis] //= target.parts
    if target.is_spatial:
        matrix = [shape[0], prod(shape[1:])]
    if not 1 <= target.rank <= min(matrix):
        raise ValueError(
            f"`rank` is {target.rank} for {name!r} of shape {shape}; "
            f"use at least 1 and at most min(out, in) = {min(matrix)}"
        )


def as_matrices(weight: Tensor, target: Target, stack_axes: int) -> Tensor:
    """Return a weight with `stack_axes` leading axes as (*stack, out, in), with a stack axis for fused parts."""
    if target.is_spatial:
        return weight.flatten(stack_axes + 1)
    if target.parts == 1:
        return weight
    axis, shape = target.axis % weight.ndim, weight.shape
    parts = weight.reshape(*shape[:axis], target.parts, -1, *shape[axis + 1 :])
    return parts.movedim(axis, -3).contiguous()

"""Check that the state of an optimizer fits the parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._check_trees import check_alpha, check_names
from dynlora_fn._core._distinct import distinct_names
from dynlora_fn._core._types import Trainable, alpha_of, is_factors, sides_of
from dynlora_fn.optim._eight_bit import is_eight_bit, moment_shape
from dynlora_fn.optim._roles import Role, declared_roles

_PER_VECTOR = ("count", "frozen_for")


def check_state(opt_state: Any, kind: type, trainable: Trainable, *, eight_bit: bool = False) -> None:
    """Raise if a state has another type, or fields that do not mirror the parameters.

    Without this check, a moment of a wrong shape could be broadcast silently. Only types, names, shapes, dtypes and
    devices are read.

    Args:
        opt_state: The state.
        kind: The type that the state must have. It declares the roles of its fields.
        trainable: The trainable parameters by name.
        eight_bit: Whether moments may be in 8 bits.

    Raises:
        TypeError: If a type or dtype is wrong.
        ValueError: If names, shapes or devices differ, or if a moment is in 8 bits and `eight_bit` is False.
    """
    if not isinstance(opt_state, kind):
        raise TypeError(f"`opt_state` is {described(opt_state)}; pass the {kind.__name__} that `init` returned")
    if torch.compiler.is_dynamo_compiling():
        return  # tracing a check takes as long as tracing an operation, and `compile_step` compares the new state
    roles = declared_roles(opt_state)
    trees = {field: getattr(opt_state, field) for field in roles}
    mirrors = [tree for tree in trees.values() if isinstance(tree, Mapping) and set(tree) == set(trainable)]
    names = distinct_names(trainable, *mirrors) if mirrors else ()  # one pass for all fields
    for field, role in roles.items():
        argument, tree, like = f"opt_state.{field}", trees[field], trainable
        if role == "frozen_for":
            like = {name: leaf for name, leaf in trainable.items() if is_factors(leaf)}
        check_by_name(argument, tree, of="the names of `trainable`")
        check_names(argument, tree, "trainable", like)
        to_check = names if len(like) == len(trainable) else distinct_names(like, tree)
        _check_leaves(argument, tree, role, {name: like[name] for name in to_check}, eight_bit)


def _check_leaves(argument: str, tree: Any, role: Role, like: Trainable, eight_bit: bool) -> None:
    for name, leaf in like.items():
        if role not in _PER_VECTOR and _is_moment(tree[name], leaf):
            continue
        sides = _sides(argument, name, tree[name], leaf)
        if role not in _PER_VECTOR and is_factors(leaf):
            check_alpha(argument, name, tree[name], "trainable", leaf)
        for side, shape in zip(sides, _shapes(leaf, role), strict=True):
            _check_side(argument, name, side, leaf.b if is_factors(leaf) else leaf, role, eight_bit)
            if moment_shape(side) != shape:
                raise ValueError(
                    f"`{argument}` has {name!r} of shape {moment_shape(side)}, where these parameters need {shape}; "
                    "pass the state of the same parameters"
                )


def _is_moment(state: Any, leaf: Any) -> bool:
    """Return whether a state is a valid moment of a parameter.

    This is a fast check. If it fails, slower checks raise the error.
    """
    if is_factors(leaf):
        is_alike = is_factors(state) and alpha_of(state) == alpha_of(leaf)
        if not is_alike or len(sides_of(state)) != len(sides_of(leaf)):
            return False
        return all(_is_moment(side, like) for side, like in zip(sides_of(state), sides_of(leaf), strict=True))
    return (
        isinstance(state, Tensor)
        and state.shape == leaf.shape
        and state.is_floating_point()
        and leaf.is_floating_point()
        and state.device == leaf.device
    )


def _sides(argument: str, name: str, state: Any, leaf: Any) -> tuple[Any, ...]:
    if is_factors(state) != is_factors(leaf):
        raise ValueError(
            f"`{argument}` has {described(state)} for {name!r}, which is a {type(leaf).__name__} in `trainable`; "
            "pass the state of the same parameters"
        )
    if not is_factors(state):
        return (state,)
    if len(sides_of(state)) != len(sides_of(leaf)):
        raise ValueError(
            f"`{argument}` has {len(sides_of(state))} sides of {name!r}, but {len(sides_of(leaf))} are trained in"
            " `trainable`; pass the state of the same parameters"
        )
    return sides_of(state)


def _shapes(leaf: Any, role: Role) -> list[tuple[int, ...]]:
    """Return the shapes that the state of a parameter must have, one for each side."""
    if not is_factors(leaf):
        return [() if role in _PER_VECTOR else tuple(leaf.shape)]
    b, *others = (tuple(side.shape) for side in sides_of(leaf))
    return [(*b[:-2], 1, b[-1]), *((*a[:-1], 1) for a in others)] if role in _PER_VECTOR else [b, *others]


def _check_side(argument: str, name: str, side: Any, like: Any, role: Role, eight_bit: bool) -> None:
    """Raise if the state of one side does not fit `like` in type, dtype and device."""
    if is_eight_bit(side) and not eight_bit:
        raise ValueError(f"`{argument}` has {name!r} in 8 bits; use the optimizer that created this state")
    tensor = side.codes if is_eight_bit(side) else side
    if not isinstance(tensor, Tensor) or not (is_eight_bit(side) or _is_right_dtype(tensor, like, role)):
        raise TypeError(f"`{argument}` has {described(side)} for {name!r}; pass the state that `init` returned")
    if tensor.device != like.device:
        raise ValueError(f"`{argument}` has {name!r} on {tensor.device}, but the weight is on {like.device}; move it")


def _is_right_dtype(tensor: Tensor, like: Tensor, role: Role) -> bool:
    if role in _PER_VECTOR:
        return tensor.dtype in (torch.int32, torch.int64)
    return tensor.is_complex() == like.is_complex() and (tensor.is_floating_point() or tensor.is_complex())

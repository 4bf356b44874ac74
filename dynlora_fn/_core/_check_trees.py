"""Check weights and trees that mirror the trainable parameters, such as gradients.

Without these checks, a tensor of a wrong shape could be broadcast silently. Checks read only types, shapes, dtypes and
devices, so they add nothing to a compiled step.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._distinct import distinct_names
from dynlora_fn._core._types import (
    Alpha,
    AnyFactors,
    Factors,
    FixedSide,
    FrozenTensor,
    LowRank,
    OneSidedFactors,
    ScaledFactors,
    ShardedFactors,
    alpha_of,
    is_factors,
    sides_of,
)


def check_param(argument: str, name: str, param: Any) -> None:
    """Raise if a value is neither a tensor nor a consistent low-rank weight.

    Args:
        argument: The name of the argument, for the error message.
        name: The name of the weight, for the error message.
        param: The weight or tensor.

    Raises:
        TypeError: If the value or one of its tensors has a wrong type or dtype.
        ValueError: If the shapes or devices of the tensors do not fit together.
    """
    if not isinstance(param, LowRank):
        if not isinstance(param.tensor if isinstance(param, FrozenTensor) else param, Tensor):
            raise TypeError(f"`{argument}` has {described(param)} for {name!r}; use a LowRank or a tensor")
        return
    # The fast path has few operations: Dynamo takes time to trace each, and an eager step checks every weight.
    if _fits(param) if torch.compiler.is_dynamo_compiling() else _is_plain(param) and _fits(param):
        return
    check_factors(argument, name, param.factors)
    if len(sides_of(param.factors)) == 1:
        raise ValueError(f"`{argument}` has no `a` for {name!r}, which is in the frozen tree; use `combine`")
    b, seed, stack = param.factors.b, param.seed, tuple(param.shape[:-2])
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"`{argument}` has {described(seed)} as seed of {name!r}; use an int64 tensor")
    if not (isinstance(param.base, Tensor) or hasattr(param.base, "dequantize")):
        raise TypeError(f"`{argument}` has {described(param.base)} as base of {name!r}; use a tensor or a base")
    if isinstance(param.base, Tensor):
        _check_is_real(argument, f"the base of {name!r}", param.base)
    elif wrong := getattr(param.base, "wrong_dtype", None):
        raise TypeError(
            f"`{argument}` has {wrong} in the base of {name!r}; convert only factors and full-rank tensors to other"
            " dtypes, because the format of a base determines the dtypes of its codes"
        )
    if tuple(param.base.shape) != tuple(param.shape):
        raise ValueError(
            f"`{argument}` has a base of shape {tuple(param.base.shape)} for {name!r}, but its factors are of a weight "
            f"of shape {tuple(param.shape)}; pass factors and base of one weight"
        )
    if tuple(seed.shape) != stack:
        raise ValueError(
            f"`{argument}` has a seed of shape {tuple(seed.shape)} for {name!r} of shape {tuple(param.shape)}; "
            f"use one of shape {stack}"
        )
    for what, tensor in (("seed", seed), *([("base", param.base)] if isinstance(param.base, Tensor) else [])):
        _check_device(argument, f"the {what} of {name!r}", tensor, b)


def _is_plain(param: LowRank) -> bool:
    """Return whether a weight has only plain floating tensors on one device.

    A weight with a tensor subclass or an empty factor is not plain, so it takes the slower checks.
    """
    factors, base, seed = param.factors, param.base, param.seed
    if type(factors) is not Factors or not type(factors.b) is type(factors.a) is type(base) is type(seed) is Tensor:
        return False
    (b, a), device = factors, seed.device
    return (
        b.is_floating_point()
        and a.is_floating_point()
        and base.is_floating_point()
        and seed.dtype == torch.int64
        and b.device == a.device == base.device == device
        and b.ndim == a.ndim == seed.ndim + 2
        and b.numel() > 0
        and a.numel() > 0
    )


def _fits(param: LowRank) -> bool:
    b, a = param.factors.b, param.factors.a
    is_pair = b.shape[-1] == a.shape[-2] and b.shape[:-2] == a.shape[:-2]
    return is_pair and param.base.shape == param.shape and param.seed.shape == b.shape[:-2]


def check_params(argument: str, params: Any) -> None:
    """Raise if a value is not a dict of parameters by name.

    `check_param` checks each parameter, except while Dynamo traces: tracing a check takes as long as tracing an
    operation. In a compiled step only `combine` checks each weight.
    """
    check_by_name(argument, params, of="parameters")
    if not torch.compiler.is_dynamo_compiling():
        for name in distinct_names(params):
            check_param(argument, name, params[name])


def check_one_or_more(argument: str, params: Any, *, or_tensor: bool = False) -> None:
    """Raise if a value is neither one weight nor a dict of parameters by name.

    `check_param` checks each parameter. With `or_tensor`, a single full-rank tensor is accepted too.
    """
    if isinstance(params, Mapping):
        check_params(argument, params)
    elif isinstance(params, LowRank) or (or_tensor and isinstance(params, Tensor | FrozenTensor)):
        check_param(argument, "param", params)
    else:
        raise TypeError(f"`{argument}` is {described(params)}; pass a LowRank or a dict of parameters by name")


def check_factors(argument: str, name: str, factors: Any) -> None:
    """Raise if a value is not the factors of a weight.

    Factors are floating tensors `b` (*stack, out, rank) and `a` (*stack, rank, in).
    """
    if not is_factors(factors):
        raise TypeError(f"`{argument}` has {described(factors)} in place of the factors of {name!r}; use Factors")
    _check_is_alpha(argument, name, factors)
    for side, tensor in zip("ba", sides_of(factors), strict=False):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{argument}` has {described(tensor)} as `{side}` of {name!r}; use a tensor")
        _check_is_real(argument, f"`{side}` of {name!r}", tensor)
    b, a = tuple(factors.b.shape), _shape_of_a(factors)
    if min(len(b), len(a)) < 2 or b[:-2] != a[:-2] or b[-1] != a[-2] or 0 in (b[-1], *_sizes(factors)):
        raise ValueError(
            f"`{argument}` has factors of {name!r} of shapes {b} and {a}; use (*stack, out, rank) "
            "and (*stack, rank, in)"
        )
    if isinstance(factors, OneSidedFactors) and factors.fixed.columns != a[-1]:
        raise ValueError(
            f"`{argument}` has `fixed.columns` {factors.fixed.columns} for {name!r} with `a` of shape {a}; use {a[-1]}"
        )
    _check_device(argument, f"`a` of {name!r}", sides_of(factors)[-1], factors.b)


def _sizes(factors: AnyFactors) -> tuple[int, ...]:
    """Return the sizes that must not be 0: `out` and `in`, or none for shards."""
    return () if isinstance(factors, ShardedFactors) else (factors.b.shape[-2], _shape_of_a(factors)[-1])


def _shape_of_a(factors: AnyFactors) -> tuple[int, ...]:
    """Return the shape of `a`, also if `a` is not trained and is in the frozen tree."""
    if isinstance(factors, OneSidedFactors) and len(sides_of(factors)) == 1:
        return (*factors.b.shape[:-2], factors.b.shape[-1:].numel(), factors.fixed.columns)
    return tuple(factors.a.shape)


def check_trainable(argument: str, trainable: Any, *, names: Iterable[str] | None = None) -> None:
    """Raise if a value is not a dict of factors and floating tensors by name.

    While Dynamo traces, the leaves are not checked here; `combine` checks them.

    Args:
        argument: The name of the argument, for error messages.
        trainable: The value.
        names: The names of the leaves to check. Default None takes one name for each kind of leaf.
    """
    check_by_name(argument, trainable, of="factors and tensors, such as `partition(params).trainable`")
    if torch.compiler.is_dynamo_compiling():
        return
    for name in distinct_names(trainable) if names is None else names:
        leaf = trainable[name]
        if is_factors(leaf):
            check_factors(argument, name, leaf)
        elif not isinstance(leaf, Tensor):
            raise TypeError(
                f"`{argument}` has {described(leaf)} for {name!r}; use factors or a tensor, such as of "
                "`partition(params).trainable`"
            )
        else:
            _check_is_floating(argument, repr(name), leaf)


def check_names(argument: str, names: Iterable[str], like_argument: str, like: Iterable[str]) -> None:
    """Raise ValueError if two trees have different names."""
    if differing := sorted(set(names) ^ set(like)):
        raise ValueError(
            f"`{argument}` must have the names of `{like_argument}`, but only one of them has {differing}; "
            f"pass `{argument}` of the same parameters"
        )


def check_trainable_with(argument: str, tree: Any, trainable: Any) -> None:
    """Raise as `check_trainable`, and as `check_mirrors` for gradients or updates.

    One pass over both trees finds the leaves to check.
    """
    names = None
    if not torch.compiler.is_dynamo_compiling() and isinstance(tree, Mapping) and isinstance(trainable, Mapping):
        names = distinct_names(trainable, tree) if set(tree) == set(trainable) else None
    check_trainable("trainable", trainable, names=names)
    check_mirrors(argument, tree, "trainable", trainable, names=names)


def check_mirrors(
    argument: str,
    tree: Any,
    like_argument: str,
    like: Mapping[str, Any],
    *,
    names: Iterable[str] | None = None,
) -> None:
    """Raise if a tree differs from the parameters in names, types or shapes.

    Devices must be equal too. Dtypes may differ, but a real parameter needs a real leaf, and a complex one a complex
    leaf.

    Args:
        argument: The name of the argument `tree`, for error messages.
        tree: The tree, such as gradients.
        like_argument: The name of the argument `like`, for error messages.
        like: The trainable parameters by name.
        names: The names of the leaves to check. Default None takes one name for each kind of leaf.

    Raises:
        TypeError: If a side of factors is not a tensor, a leaf has an integer dtype, or one of leaf and parameter is
            complex and the other is real.
        ValueError: If names, types, shapes or devices differ.
    """
    check_by_name(argument, tree, of=f"the names of `{like_argument}`")
    check_names(argument, tree, like_argument, like)
    for name in distinct_names(like, tree) if names is None else names:
        check_mirrors_one(argument, name, tree[name], like_argument, like[name])


def check_mirrors_one(argument: str, name: str, leaf: Any, like_argument: str, like: Any) -> None:
    """Raise if one leaf does not have the type, shape and device of a parameter."""
    if torch.compiler.is_dynamo_compiling() and _is_like(leaf, like):
        return  # the fast path has few operations, because Dynamo takes time to trace each
    if is_factors(leaf) and is_factors(like):
        check_alpha(argument, name, leaf, like_argument, like)
    is_alike = type(leaf) is type(like) if is_factors(like) else isinstance(leaf, Tensor)
    if not is_alike:
        found = f"a {type(leaf).__name__}" if hasattr(leaf, "shape") or is_factors(leaf) else described(leaf)
        raise ValueError(
            f"`{argument}` has {found} for {name!r}, which is a {type(like).__name__} in `{like_argument}`; "
            "pass the tree of the same parameters"
        )
    sides = sides_of(leaf) if is_factors(leaf) else (leaf,)
    wanted = sides_of(like) if is_factors(like) else (like,)
    for side in sides:
        if not isinstance(side, Tensor):
            raise TypeError(f"`{argument}` has {described(side)} in {name!r}; use a tensor")
    if [side.shape for side in sides] != [side.shape for side in wanted]:
        got, right = (", ".join(str(tuple(side.shape)) for side in group) for group in (sides, wanted))
        raise ValueError(
            f"`{argument}` has {name!r} of shape {got} for a parameter of shape {right}; pass one of that shape"
        )
    for side, other in zip(sides, wanted, strict=True):
        _check_is_floating(argument, repr(name), side)
        if side.is_complex() != other.is_complex():
            raise TypeError(
                f"`{argument}` has dtype {side.dtype} for {name!r} of dtype {other.dtype}; convert it first"
            )
        _check_device(argument, repr(name), side, other)


def check_alpha(argument: str, name: str, leaf: AnyFactors, like_argument: str, like: AnyFactors) -> None:
    """Raise if factors, or gradients of factors, differ from a parameter in alpha."""
    _check_is_alpha(argument, name, leaf)
    if alpha_of(leaf) != alpha_of(like):
        raise ValueError(
            f"`{argument}` has alpha {alpha_of(leaf)} for {name!r}, which has alpha {alpha_of(like)} in"
            f" `{like_argument}`; pass the same parameters' tree, with the type that `_replace` and `tree_map` keep"
        )


def _check_is_alpha(argument: str, name: str, factors: AnyFactors) -> None:
    if isinstance(factors, ScaledFactors) and not isinstance(factors.alpha, Alpha):
        raise TypeError(f"`{argument}` has {described(factors.alpha)} as `alpha` of {name!r}; use an Alpha")
    if isinstance(factors, OneSidedFactors) and not isinstance(factors.fixed, FixedSide):
        raise TypeError(f"`{argument}` has {described(factors.fixed)} as `fixed` of {name!r}; use a FixedSide")


def _is_like(leaf: Any, like: Any) -> bool:
    if not is_factors(like):
        return isinstance(leaf, Tensor) and leaf.shape == like.shape
    if type(leaf) is not type(like) or len(sides_of(leaf)) != len(sides_of(like)):
        return False
    if any(side.shape != other.shape for side, other in zip(sides_of(leaf), sides_of(like), strict=True)):
        return False
    return isinstance(like, Factors) or alpha_of(leaf) == alpha_of(like)


def _check_is_floating(argument: str, what: str, tensor: Tensor) -> None:
    """Raise TypeError for integers and booleans, whose updates would be rounded."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(f"`{argument}` has dtype {tensor.dtype} for {what}; use a floating dtype")


def _check_is_real(argument: str, what: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"`{argument}` has dtype {tensor.dtype} for {what}; use a real floating dtype")


def _check_device(argument: str, what: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"`{argument}` has {what} on {tensor.device}, but the weight is on {like.device}; move one of them"
        )

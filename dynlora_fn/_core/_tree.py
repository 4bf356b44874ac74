"""Split dicts of parameters into trainable and frozen trees, and map over them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_patterns, first_names
from dynlora_fn._core._check_trees import check_one_or_more, check_param, check_params
from dynlora_fn._core._patterns import Patterns, match
from dynlora_fn._core._stacking import member_names
from dynlora_fn._core._torch import is_traceable_wrapper_subclass
from dynlora_fn._core._types import (
    Alpha,
    AnyFactors,
    Frozen,
    FrozenLeaf,
    FrozenTensor,
    LowRank,
    OneSidedFactors,
    Param,
    Params,
    ScaledFactors,
    ShardedFactors,
    Trainable,
    alpha_of,
    is_factors,
    sides_of,
    with_sides,
)

Value = TypeVar("Value")


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that store the values of a tensor.

    For a plain tensor this is the tensor. For a subclass, such as torchao's, these are the inner tensors.
    """
    if type(tensor) is Tensor or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


class Partition(NamedTuple):
    """The trainable and the frozen tree of the same parameters.

    Differentiate with respect to `trainable` and close over `frozen`. `torch.func.grad` refuses the integer tensors in
    `frozen`.
    """

    trainable: dict[str, AnyFactors | Tensor]
    frozen: dict[str, FrozenLeaf]


def partition(params: Params, *, frozen: Sequence[str] = ()) -> Partition:
    """Split parameters into a trainable and a frozen tree.

    `combine` reverses this exactly, and nothing is copied. Factors are always trainable, except `a` of
    `OneSidedFactors`. Bases, seeds and each `FrozenTensor` are always frozen.

    Args:
        params: The parameters by name.
        frozen: Names or globs of the full-rank tensors to freeze. Write them as in `params` or as in the model. Names
            of the model must match all members of a stack. Default ``()`` freezes no full-rank tensor. ``["*"]`` trains
            only the factors.

    Returns:
        The trees `trainable` and `frozen`, each a dict by name. A low-rank weight is in both, and a full-rank tensor in
        one of them.

    Raises:
        TypeError: If a parameter has a wrong type or dtype, or if `frozen` is not a list of strings.
        ValueError: If a pattern matches no parameter, or if the patterns match only some members of a stack. Also if
            the tensors of a weight do not fit together.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(8, 8), rank=2, seed=0, targets=["weight"])
        >>> trainable, frozen = dl.partition(params, frozen=["bias"])
        >>> list(trainable), list(frozen)
        (['weight'], ['weight', 'bias'])
    """
    check_params("params", params)
    check_patterns("frozen", frozen)
    frozen_names: dict[str, None] = {}
    if frozen:
        shapes = {name: tuple(param.shape) for name, param in params.items()}
        full_rank = [name for name, param in params.items() if isinstance(param, Tensor)]
        frozen_names = dict.fromkeys(_names_to_freeze(shapes, full_rank, frozen))
    parts = Partition({}, {})
    for name, param in params.items():
        if isinstance(param, LowRank):
            parts.trainable[name] = trained_factors(param.factors)
            parts.frozen[name] = _frozen(param)
        elif isinstance(param, FrozenTensor):
            parts.frozen[name] = param
        else:
            parts[int(name in frozen_names)][name] = param
    return parts


def trained_factors(factors: AnyFactors) -> AnyFactors:
    """Return factors as the trainable tree contains them.

    `a` is replaced by ``()`` if only `b` is trained.
    """
    return factors._replace(a=()) if isinstance(factors, OneSidedFactors) else factors


def _frozen(param: LowRank) -> Frozen:
    factors = param.factors
    if isinstance(factors, OneSidedFactors):
        alpha = factors.fixed.alpha
        return Frozen(param.base, param.seed, () if alpha == 1 else Alpha(alpha), factors.a)
    if isinstance(factors, ScaledFactors):
        return Frozen(param.base, param.seed, factors.alpha)
    return Frozen(param.base, param.seed)  # alpha is 1, or part of the sharding of sharded factors


# Dynamo cannot trace globs.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _names_to_freeze(shapes: Mapping[str, Sequence[int]], trained: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of `trained` that the patterns match.

    `shapes` has the shape of every parameter by name.
    """
    members = {name: member_names(name, shape) for name, shape in shapes.items()}
    match(dict.fromkeys([*members, *(member for names in members.values() for member in names)]), patterns, "frozen")
    exact, globs = ([pattern for pattern in patterns if (pattern in members) is is_name] for is_name in (True, False))
    selected, prepared = Patterns(exact), Patterns(globs)
    return [name for name in trained if selected.matching([name]) or _covers(prepared, name, members[name])]


def _covers(globs: Patterns, name: str, members: Sequence[str]) -> bool:
    """Return whether globs match a parameter, or all members of a stack.

    Globs are compared with the names of the members first. So ``[!0]`` does not match the star in the name of a stack.

    Raises:
        ValueError: If the globs match only some members.
    """
    others = [member for member in members if not globs.matching([member])]
    if others and len(others) < len(members):
        raise ValueError(
            f"`frozen` matches {len(members) - len(others)} of {len(members)} members of the stack {name!r}, but not "
            f"{others[0]!r}; match all of them, or make the parameters with `init(..., stack=False)`"
        )
    return not others if len(others) < len(members) else bool(globs.matching([name]))


def combine(trainable: Trainable, frozen: Mapping[str, FrozenLeaf]) -> dict[str, Param]:
    """Join a trainable and a frozen tree into parameters.

    This reverses `partition`: ``partition(combine(trainable, frozen))`` returns both trees, with their names in the
    same order. Nothing is copied.

    Args:
        trainable: The factors and trainable full-rank tensors by name.
        frozen: The bases with their seeds, and the frozen full-rank tensors, by name.

    Returns:
        The parameters by name.

    Raises:
        TypeError: If a leaf has a wrong type or dtype.
        ValueError: If factors have no base, a base has no factors, or a tensor is in both trees. Also if factors differ
            from `frozen` in alpha, if `a` of a weight is in both trees or in neither, or if shapes or devices do not
            fit.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(8, 8), rank=2, seed=0, targets=["weight"])
        >>> trainable, frozen = dl.partition(params)
        >>> combined = dl.combine(trainable, frozen)
        >>> list(combined) == list(params), combined["weight"].base is params["weight"].base
        (True, True)
    """
    check_by_name("trainable", trainable, of="factors and tensors, such as `partition(params).trainable`")
    check_by_name("frozen", frozen, of="`partition`'s frozen leaves")
    params: dict[str, Param] = {}
    for name, leaf in trainable.items():
        frozen_leaf = frozen.get(name)
        if is_factors(leaf) != isinstance(frozen_leaf, Frozen):
            raise ValueError(
                f"`frozen` does not fit `trainable` at {name!r}: factors need a base, and a tensor must not have one;"
                " pass both trees of one `partition`"
            )
        params[name] = _low_rank(name, leaf, frozen_leaf) if isinstance(frozen_leaf, Frozen) else leaf  # type: ignore
        check_param("trainable", name, params[name])
    for name, frozen_leaf in frozen.items():
        if isinstance(frozen_leaf, Frozen) and name not in trainable:
            raise ValueError(f"`trainable` has no factors for the base {name!r}; pass both trees of one `partition`")
        if not isinstance(frozen_leaf, Frozen):
            if name in params:
                raise ValueError(
                    f"`frozen` and `trainable` both contain the tensor {name!r}; remove it from one of them"
                )
            check_param("frozen", name, frozen_leaf)
            params[name] = frozen_leaf
    if len(params) > len(trainable):
        return {name: params[name] for name in _in_order(trainable, frozen)}
    return params


def _low_rank(name: str, factors: AnyFactors, frozen: Frozen) -> LowRank:
    """Join the factors and the frozen leaves of one weight.

    Raises:
        ValueError: If the alphas differ, or if `a` is in both trees or in neither.
    """
    found, wanted = alpha_of(factors), 1.0 if isinstance(frozen.alpha, tuple) else frozen.alpha.value
    if found != wanted and not isinstance(factors, ShardedFactors):
        raise ValueError(
            f"`trainable` has factors of alpha {found} for {name!r}, but the weight in `frozen` has alpha {wanted}; "
            "keep the type of the factors, as `_replace` and `tree_map` do"
        )
    is_one_sided = isinstance(factors, OneSidedFactors)
    if is_one_sided == isinstance(frozen.a, tuple) or (is_one_sided and not isinstance(factors.a, tuple)):
        raise ValueError(
            f"`trainable` and `frozen` do not fit each other at {name!r}: exactly one of them must have `a`, and"
            " `frozen` only where only `b` is trained; pass both trees of one `partition`"
        )
    if isinstance(factors, OneSidedFactors):
        factors = factors._replace(a=frozen.a)
    return LowRank(frozen.base, factors, frozen.seed)


def _in_order(trainable: Iterable[str], frozen: Mapping[str, FrozenLeaf]) -> list[str]:
    """Merge the names so that each tree keeps its order in a later `partition`.

    The order of a dict is part of the structure of a state, which a step must not change.
    """
    names: dict[str, None] = {}
    remaining = iter(list(frozen))
    for name in trainable:
        if isinstance(frozen.get(name), Frozen):
            for other in remaining:
                if other == name:
                    break
                if not isinstance(frozen[other], Frozen):
                    names[other] = None
        names[name] = None
    return [*names, *(other for other in remaining if not isinstance(frozen[other], Frozen))]


def map_leaf(function: Callable[..., Any], leaf: Any, *others: Any) -> Any:
    """Apply a function to a full-rank tensor, or to each side of factors.

    The result has the type of `leaf`. The sides of `others` may have other shapes and types. For example, the counts of
    sharded factors are not sharded.
    """
    if not is_factors(leaf):
        return function(leaf, *others)
    sides = zip(*map(sides_of, (leaf, *others)), strict=True)
    return with_sides(leaf, [function(*side) for side in sides])


def by_name(value: Value | Mapping[str, Value], names: Iterable[str], argument: str) -> dict[str, Value]:
    """Return values by name, from a dict or from one value for all names.

    Keys are names and not globs: a star in a key is part of the name of a stack.

    Args:
        value: One value for all names, or a dict of values by name.
        names: The names that may have a value. A dict may leave out some of them.
        argument: The name of the caller's argument, for the error message.

    Raises:
        ValueError: If the dict has a key that is not in `names`.
    """
    names = dict.fromkeys(names)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    for name in value:
        if name not in names:
            raise ValueError(
                f"`{argument}` contains {name!r}, which is not one of the names {first_names(names)}; remove it"
            )
    return dict(value)


def whole_factors(param: LowRank) -> tuple[Tensor, Tensor]:
    """Return `b` and `a` of a weight whose factors are not sharded.

    The weight is ``base + b @ a / param.divisor``.

    Raises:
        ValueError: If the factors are sharded.
    """
    if param.factor_sharding is None:
        return param.factors.b, param.factors.a
    raise ValueError(f"the factors of a weight of shape {tuple(param.shape)} are sharded; gather them with `unshard`")


def tensor_of(param: Tensor | FrozenTensor) -> Tensor:
    """Return the tensor of a full-rank parameter, trainable or frozen."""
    return param.tensor if isinstance(param, FrozenTensor) else param


def map_low_rank(transform: Callable[[LowRank], Param], params: Param | Params) -> Param | dict[str, Param]:
    """Apply `transform` to one LowRank, or to each LowRank in a dict.

    Full-rank parameters are returned unchanged.
    """
    check_one_or_more("params", params, or_tensor=True)
    if isinstance(params, Mapping):
        return {name: transform(param) if isinstance(param, LowRank) else param for name, param in params.items()}
    return transform(params) if isinstance(params, LowRank) else params

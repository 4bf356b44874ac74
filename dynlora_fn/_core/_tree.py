"""Dicts of parameters: trainable and frozen parts, names and globs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from dynlora_fn._core._torch import is_traceable_wrapper_subclass
from dynlora_fn._core._types import Factors, Frozen, LowRank, Param, Params, Trainable


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Those that hold its memory: itself, or what is inside of a subclass such as torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in inner_tensors(getattr(tensor, name))]


class Partition(NamedTuple):
    """Gradients are taken of `trainable`; `frozen` is closed over, since `torch.func.grad` takes no integers."""

    trainable: dict[str, Factors | Tensor]
    frozen: dict[str, Frozen | Tensor]


def partition(params: Params, *, frozen: Sequence[str] = ()) -> Partition:
    """Separates what is trained from what is not; `combine` puts it together again.

    Args:
        params: by name.
        frozen: names or globs of full-rank tensors that are not trained (none unless asked for: the factors alone
            are trained by `frozen=["*"]`). Bases and seeds are frozen always, factors never.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    is_frozen = set(match(params, frozen, "frozen"))
    parts = Partition({}, {})
    for name, param in params.items():
        if isinstance(param, LowRank):
            parts.trainable[name] = param.factors
            parts.frozen[name] = Frozen(param.base, param.seed)
        else:
            parts[name in is_frozen][name] = param
    return parts


def combine(trainable: Trainable, frozen: Mapping[str, Frozen | Tensor]) -> dict[str, Param]:
    """The parameters that `partition` took apart.

    Raises:
        ValueError: if factors lack their base, a base its factors, or a tensor is in both.
    """
    params: dict[str, Param] = {}
    for name, leaf in trainable.items():
        rest = frozen.get(name)
        if isinstance(leaf, Factors) != isinstance(rest, Frozen):
            raise ValueError(f"`frozen` must hold the base of every factor set and of nothing else, got {name!r}")
        params[name] = LowRank(rest.base, leaf, rest.seed) if isinstance(rest, Frozen) else leaf  # type: ignore
    for name, rest in frozen.items():
        if isinstance(rest, Frozen) and name not in trainable:
            raise ValueError(f"`trainable` must hold the factors of every base, got none for {name!r}")
        if not isinstance(rest, Frozen):
            if name in params:
                raise ValueError(f"`frozen` must not hold what is trained, got {name!r} twice")
            params[name] = rest
    return params


def match(names: Iterable[str], patterns: Sequence[str], argument: str) -> list[str]:
    """The names that match any of the globs, in their order.

    Raises:
        ValueError: if a pattern matches none of the names.
    """
    names = list(names)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            known = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise ValueError(
                f"`{argument}` must match parameter names, got {pattern!r}, which matches none of: {known}"
            )
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def matches(name: str, pattern: str) -> bool:
    """Whether it is that name or that glob's."""
    return name == pattern or fnmatchcase(name, pattern)


def map_low_rank(transform: Callable[[LowRank], Param], params: Param | Params) -> Param | dict[str, Param]:
    """`transform` of one LowRank, or of each in a dict; tensors stay as they are."""
    if isinstance(params, Mapping):
        return {name: transform(param) if isinstance(param, LowRank) else param for name, param in params.items()}
    return transform(params) if isinstance(params, LowRank) else params

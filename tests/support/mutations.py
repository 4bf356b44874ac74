"""Kinds of arguments, with wrong and equal values drawn at random.

They start from a valid value of each.
"""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Mutation(NamedTuple):
    """A changed value of an argument.

    It must be refused, or mean the same as the valid value.
    """

    story: str
    value: Any
    is_wrong: bool = True
    names: tuple[str, ...] = ()  # what an error may name in place of the argument


Kind = Callable[[Random, Any], Mutation]
_KEYS = ("missing", "further", "renamed")  # stories of changed keys

_OTHERS: list[Any] = [None, "text", b"bytes", 2.5, 1j, [], {}, (), object(), torch.float32, np.zeros(2), len, nn.Linear]


def among(wrong: Sequence[Any], same: Sequence[Any] = ()) -> Kind:
    """Return the kind with these wrong values, and these that mean the same."""

    def draw(random: Random, valid: Any) -> Mutation:
        is_wrong = not same or random.random() < 0.8
        value = random.choice([*wrong] if is_wrong else [*same])
        return Mutation(_text(value), value, is_wrong)

    return draw


def integer(least: int | None = None, *, none: bool = False, also: Sequence[Any] = ()) -> Kind:
    """Return the kind of an integer of at least `least`.

    `also` are further values that are not wrong.
    """

    def draw(random: Random, valid: Any) -> Mutation:
        too_small = [] if least is None else [least - 1, -7, np.int64(least - 1)]
        wrong = [float(valid), str(valid), True, math.nan, torch.tensor(2), np.float64(valid), *too_small, *_OTHERS]
        return among(_without(wrong, none, also), [np.int64(valid), np.int32(valid)])(random, valid)

    return draw


def number(
    low: float = -math.inf, high: float = math.inf, *, ends: str = "[]", infinite: bool = False, none: bool = False
) -> Kind:
    """Return the kind of a real number in an interval."""

    def draw(random: Random, valid: Any) -> Mutation:
        outside = [value for value in (low - 1, high + 1) if math.isfinite(value)]
        outside += [end for end, mark in ((low, ends[0]), (high, ends[1])) if mark in "()" and math.isfinite(end)]
        outside += [math.nan, np.float64(math.nan), -math.inf] + ([] if infinite else [math.inf])
        wrong = [*outside, str(valid), True, complex(valid), torch.ones(2), *_without(_OTHERS, none, [2.5])]
        return among(wrong, [np.float64(valid), float(valid)])(random, valid)

    return draw


def rate(high: float = math.inf, *, none: bool = False) -> Kind:
    """Return the kind of a learning rate: a number, or a 0-d tensor."""

    def draw(random: Random, valid: Any) -> Mutation:
        tensors = [torch.full((1,), valid), torch.ones(2, 2), torch.tensor(True), torch.tensor(1j)]
        wrong = [
            -0.1,
            math.nan,
            math.inf,
            cmath.nan,
            "0.1",
            True,
            *([high + 1] if math.isfinite(high) else []),
            *tensors,
        ]
        same = [np.float64(valid), torch.tensor(valid, dtype=torch.float64)]
        return among([*wrong, *_without(_OTHERS, none, [2.5, {}])], same)(random, valid)

    return draw


def choice(options: Sequence[str], *, none: bool = False) -> Kind:
    """Return the kind of a word."""
    wrong = ["", "none", "int4", "bf16", False, 0, options[0].upper(), options[-1] + " ", [options[0]], *_OTHERS]
    return among(_without(wrong, none, options))


def flag() -> Kind:
    return among([0, 1, "yes", "False", *_OTHERS])


def dtype(*, none: bool = False) -> Kind:
    wrong = ["float32", np.float32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, 32, float, *_OTHERS]
    return among([value for value in _without(wrong, none, ()) if value is not torch.float32])


def device(*, none: bool = False) -> Kind:
    return among(_without(["processor", "cpu:x", 3.5, *_OTHERS], none, ()), ["cpu", torch.device("cpu")])


def other(*, except_for: Sequence[Any] = ()) -> Kind:
    """Return the kind of an argument whose type only is changed."""
    return among(_without([3, True, torch.ones(2), *_OTHERS], False, except_for))


def patterns() -> Kind:
    """Return the kind of a list of names or globs."""
    return among([["no such name"], [3], [None], "*", "w", {"w": 1}, None, 3, True, [["w"]], torch.ones(2)])


def columns() -> Kind:
    """Return the kind of an input with any batch axes."""

    def draw(random: Random, valid: Any) -> Mutation:
        wrong = [
            valid[..., :1],
            valid.sum(),
            valid[..., :0],
            valid.int(),
            valid.bool(),
            valid.to("meta"),
            valid.tolist(),
        ]
        return among([*wrong, valid.numpy(), [valid], *_OTHERS], [nn.Parameter(valid)])(random, valid)

    return draw


# --- trees


def tree(
    *,
    free: Sequence[str] = (),
    optional: bool = False,
    dtypes: Sequence[torch.dtype] = (),
    axes: bool = True,
    none: bool = False,
) -> Kind:
    """Return the kind of a tree of tensors in which one node or leaf is changed.

    Args:
        free: Top keys of tensors of any shape and dtype.
        optional: Whether missing and further keys are not wrong.
        dtypes: The dtypes that are not wrong, beside the dtype of each leaf.
        axes: Whether a further leading axis is wrong.
        none: Whether None may be in place of the tree.
    """

    def draw(random: Random, valid: Any) -> Mutation:
        path = random.choice(list(_paths(valid)))
        node = _at(valid, path)
        names = tuple(repr(key) for key in path if isinstance(key, str))
        if isinstance(node, Tensor):
            story, value = random.choice(
                _tensors(node, is_free=bool(path) and path[0] in free, dtypes=dtypes, axes=axes)
            )
        else:
            story, value = random.choice(_nodes(random, node, optional, with_tensor=not free, none=none and not path))
            names += (
                ("'other'", *(repr(key) for key in (node if isinstance(node, Mapping) else ())))
                if story in _KEYS
                else ()
            )
        return Mutation(f"{path}: {story}", _replaced(valid, path, value), names=names)

    return draw


def _tensors(leaf: Tensor, *, is_free: bool, dtypes: Sequence[torch.dtype], axes: bool) -> list[tuple[str, Any]]:
    others = [None, 1.0, "t", leaf.tolist(), leaf.detach().numpy(), [leaf], (leaf,), {"t": leaf}]
    changed = [(_text(value), value) for value in others]
    if is_free:
        return changed
    shapes = [leaf.sum(dtype=leaf.dtype), leaf[..., None], *([leaf[None]] if axes else [])]
    shapes += [leaf[..., :1], leaf[..., :0]] if leaf.ndim else []
    shapes += [leaf.flatten(), leaf[..., :1, :]] if leaf.ndim > 1 else []
    changed += [(f"shape {tuple(value.shape)}", value) for value in shapes if value.shape != leaf.shape]
    kinds = [torch.bool, torch.int16, torch.int64, torch.float32, torch.complex64]
    wrong = [kind for kind in kinds if kind not in (leaf.dtype, *dtypes)]
    return changed + [(str(kind), leaf.to(kind)) for kind in wrong] + [("meta", leaf.to("meta"))]


def _nodes(random: Random, node: Any, optional: bool, *, with_tensor: bool, none: bool) -> list[tuple[str, Any]]:
    changed = [(_text(value), value) for value in (3, "node", [node], 1.5, *([] if none else [None]))]
    changed += [("a tensor", torch.ones(()))] if with_tensor else []
    if hasattr(node, "_fields"):
        return [*changed, ("a plain tuple", tuple(node)), ("a list", list(node)), ("a dict", node._asdict())]
    if not node:
        return changed
    changed += [("a key that is no text", {**node, 0: next(iter(node.values()))}), ("values", list(node.values()))]
    if optional:
        return changed
    key = random.choice(list(node))
    missing = {name: value for name, value in node.items() if name != key}
    renamed = {("other" if name == key else name): value for name, value in node.items()}
    return [*changed, ("missing", missing), ("further", {**node, "other": node[key]}), ("renamed", renamed)]


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all nodes and leaves."""
    found = [path]
    for key, child in _children(node):
        if isinstance(child, Tensor | Mapping) or hasattr(child, "_fields"):
            found += _paths(child, (*path, key))
    return found


def _children(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, tuple) else []


def _at(node: Any, path: Sequence[Any]) -> Any:
    for key in path:
        node = node[key]
    return node


def _replaced(node: Any, path: Sequence[Any], value: Any) -> Any:
    if not path:
        return value
    key, *rest = path
    child = _replaced(node[key], rest, value)
    if isinstance(node, Mapping):
        return {**node, key: child}
    return type(node)(*(child if at == key else other for at, other in enumerate(node)))


def _without(values: Sequence[Any], none: bool, valid: Sequence[Any]) -> list[Any]:
    """Return the values that are not valid."""

    def is_valid(value: Any) -> bool:
        alike = [each for each in valid if type(value) is type(each)]
        return (value is None and none) or any(
            isinstance(value, Tensor | np.ndarray) or value == each for each in alike
        )

    return [value for value in values if not is_valid(value)]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype} {value.device}"
    return f"{type(value).__name__} {value!r:.40}"

"""Describe the structure of a state, so that processes can compare their states."""

from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._torch import is_traceable_wrapper_subclass, tree_flatten_with_path, tree_map_with_path
from dynlora_fn._core._types import Alpha, Sharding
from dynlora_fn.bases._deferred import Divisor
from dynlora_fn.parallel._shards import full_shape, is_sharded, map_shards, name_of

# These are compared by type and text. `Sharding` is not among them, because it differs between processes.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.Size, Alpha, Divisor)


# Fields of `Sharding` that differ between processes, or that shapes and the number of processes show.
_NOT_SETTINGS = {"group", "world_size", "process", "rows", "columns", "weight"}


class Description(NamedTuple):
    """The structure of a state as text, and the tensors to compare by value."""

    lines: tuple[str, ...]  # for each leaf its path, its constant or dtype and shape, and the types of its parents
    tensors: dict[str, Tensor]  # by path, without shards
    refused: tuple[str, ...]  # the reason for each leaf that cannot be compared


def describe(state: Any) -> Description:
    """Describe a state, with shards by the shape of the unsharded tensor.

    The lines have types, keys, shapes, dtypes and constants, so processes with equal lines have equal structures.
    """
    lines, tensors, refused = [], {}, []
    whole = tree_map_with_path(_whole, state, is_leaf=is_sharded)
    for path, leaf in tree_flatten_with_path(whole, is_leaf=_is_leaf)[0]:
        name, text, parents = name_of(path), _text(leaf), _parents(whole, path)
        kind = "no shards" if isinstance(leaf, _NoShard) else type(leaf).__name__
        kinds = ", ".join(map(_kind, parents)) or "no node"
        # A meta tensor has no values to compare, so the other processes must also have a meta tensor there.
        device = " on meta" if isinstance(leaf, Tensor) and leaf.is_meta and not any(map(is_sharded, parents)) else ""
        lines.append(f"{name}: {text or kind}{device} in {kinds}")
        if text is None:
            refused.append(leaf if isinstance(leaf, _NoShard) else f"it has a {kind} at {name}")
        elif isinstance(leaf, Tensor) and not leaf.is_meta:
            tensors[name] = leaf
    return Description(tuple(lines), tensors, tuple(refused))


class _NoShard(str):
    """Why the shards of a node cannot be described."""

    __slots__ = ()


def _whole(path: Any, node: Any) -> Any:
    """Replace the shards of a node by meta tensors of the unsharded shape."""
    try:
        return map_shards(_unsharded, node, name_of(path)) if is_sharded(node) else node
    except ValueError as error:
        return _NoShard(error)  # refused on every process, and not only on this one


def _unsharded(shard: Tensor, sharding: Sharding, axis: int) -> Tensor:
    return torch.empty(full_shape(shard, sharding, axis), dtype=shard.dtype, device="meta")


def _is_leaf(node: Any) -> bool:
    """Return whether a node counts as a leaf: a constant or an empty container."""
    return isinstance(node, Alpha | Divisor) or _is_empty(node)


def _is_empty(node: Any) -> bool:
    return isinstance(node, dict | list | tuple) and not node


def _text(leaf: Any) -> str | None:
    """Return a text for a constant, an empty container or a plain tensor.

    Equal constants have equal texts, and so do tensors of equal dtype and shape. Return None for anything else.
    """
    if _is_empty(leaf):
        return f"empty {type(leaf).__name__}"
    if type(leaf) in _CONSTANTS:
        return f"{type(leaf).__name__} {leaf!r}"
    is_plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_quantized
    if is_plain and not is_traceable_wrapper_subclass(leaf):
        return f"{leaf.dtype} {tuple(leaf.shape)}"
    return None


def _parents(state: Any, path: Any) -> list[Any]:
    """Return all nodes on a path."""
    nodes, node = [], state
    for key in path:
        nodes.append(node)
        node = key.get(node)
    return nodes


def _kind(node: Any) -> str:
    """Return the type of a node as text.

    For shards it includes the number of processes, and every setting of the sharding that is not the default.
    """
    sharding, kind = getattr(node, "sharding", None), type(node).__name__
    if not isinstance(sharding, Sharding):
        return kind
    settings = {field.name: field.default for field in fields(sharding) if field.name not in _NOT_SETTINGS}
    found = {name: getattr(sharding, name) for name in settings}
    others = "".join(f" of {name} {value}" for name, value in found.items() if value != settings[name])
    return f"{kind} over {sharding.world_size}{others}"

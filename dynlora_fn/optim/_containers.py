"""Walk through the containers of a state and rebuild them with their types."""

from collections import OrderedDict, defaultdict, deque
from collections.abc import MutableMapping
from copy import copy, deepcopy
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor


class Step(NamedTuple):
    """One step of a path: a field of a record, or a key or index of a container."""

    is_field: bool
    key: Any


Path: TypeAlias = tuple[Step, ...]


def render(path: Path) -> str:
    """Return a path as Python writes it, such as ``.inner.mu['w']``."""
    return "".join(f".{step.key}" if step.is_field else f"[{step.key!r}]" for step in path)


def children(node: Any) -> list[tuple[Step, Any]] | None:
    """Return the children of a container with their steps, or None for other objects."""
    if isinstance(node, MutableMapping):
        return [(Step(False, key), child) for key, child in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(Step(True, field), child) for field, child in zip(node._fields, node, strict=True)]
    if isinstance(node, tuple | list | deque):
        return [(Step(False, index), child) for index, child in enumerate(node)]
    if is_dataclass(node) and not isinstance(node, type):
        return [(Step(True, field.name), getattr(node, field.name)) for field in fields(node)]
    return None


def rebuild(node: Any, values: list[Any]) -> Any:
    """Return a container like `node` with other children, in the order of `children`."""
    if isinstance(node, MutableMapping):
        return _rebuild_mapping(node, dict(zip(node, values, strict=True)))
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*values)
    if isinstance(node, deque):
        return type(node)(values, node.maxlen)
    if isinstance(node, tuple | list):
        return type(node)(values)
    new = copy(node)
    for field, value in zip(fields(node), values, strict=True):
        object.__setattr__(new, field.name, value)  # also if the dataclass is frozen
    return new


def _rebuild_mapping(node: MutableMapping[Any, Any], entries: dict[Any, Any]) -> Any:
    if type(node) is dict:
        return entries
    if type(node) is OrderedDict:
        return OrderedDict(entries)
    if type(node) is defaultdict:
        return defaultdict(node.default_factory, entries)
    # A shallow copy of a mapping may share the memory of its entries, so `update` would change both. The leaves are in
    # `memo`, so they are not copied.
    new = copy(node) if isinstance(node, dict) else deepcopy(node, {id(child): child for child in node.values()})
    new.update(entries)
    return new


def hidden_attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of a container that are none of its children.

    A subclass of dict may have them, and a dataclass that sets more than its fields.
    """
    attributes = dict(getattr(node, "__dict__", {}))
    if is_dataclass(node):
        return {name: value for name, value in attributes.items() if name not in {field.name for field in fields(node)}}
    return attributes if isinstance(node, dict | tuple | list | deque) else {}


def contains_tensors(node: Any) -> bool:
    """Return whether tensors can be reached through attributes and containers."""
    queue, visited = [node], set()
    while queue:
        item = queue.pop()
        if isinstance(item, Tensor):
            return True
        if id(item) not in visited and not isinstance(item, str | bytes | type):
            visited.add(id(item))
            queue += _reachable(item)
    return False


def _reachable(item: Any) -> list[Any]:
    inside = [child for _, child in children(item) or []]
    if isinstance(item, set | frozenset):
        inside += item
    elif hasattr(item, "keys") and hasattr(item, "values") and not inside:  # an immutable mapping
        inside += item.values()
    slots = [name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ())]
    inside += [getattr(item, name) for name in slots if isinstance(name, str) and hasattr(item, name)]
    return inside + list(getattr(item, "__dict__", {}).values())

"""Checks of donated states, and errors for states that were written over."""

from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Parameter

from dynlora_fn._core._torch import keystr, tree_flatten_with_path, tree_leaves, tree_unflatten
from dynlora_fn._core._tree import inner_tensors


class Consumed(Tensor):
    """A tensor of a consumed state, whose memory now contains the new state.

    Every operation on it raises an error.
    """

    _name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        consumed = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Consumed))
        name, operation = consumed.__dict__["_name"], getattr(func, "__name__", repr(func))
        raise RuntimeError(
            f"state tensor at {name} was written over by a step, and `{operation}` uses it; use the state that the step"
            " returned"
        )


class Donated:
    """The donated state of a compiled step, which the next call writes over.

    A call usually gets the tensors that the last call returned. They are recognized and not checked again.
    """

    def __init__(self) -> None:
        self._known: list[tuple[ref[Tensor], Any]] = []
        self._owners: dict[int, str] = {}  # names of tensors by the address of their storage

    def check(self, state: Any, arguments: Any) -> Tensor | None:
        """Check a state. Return a tensor in `arguments` that is a view of it, or None.

        Raises:
            ValueError: If the state cannot be written over: two of its tensors share memory, a tensor is expanded,
                requires a gradient, was written over by an earlier step or made in inference mode, or a leaf is not a
                tensor.
        """
        leaves = fast_leaves(state)
        if not self._is_known(leaves):
            self._known = []
            self._owners = _check_leaves(state)
            self._known = [(ref(leaf), _fingerprint(leaf)) for leaf in leaves]
        return next((leaf for leaf in fast_leaves(arguments) if isinstance(leaf, Tensor) and self.owner(leaf)), None)

    def owner(self, tensor: Tensor) -> str | None:
        """Return the name of the state tensor that `tensor` is a view of, or None."""
        owner = next((self._owners[start] for start in _starts(tensor) if start in self._owners), None)
        return None if owner is None or any(leaf() is tensor for leaf, _ in self._known) else owner

    def _is_known(self, leaves: list[Any]) -> bool:
        if len(leaves) != len(self._known):
            return False
        pairs: Any = zip(leaves, self._known, strict=True)
        return all(known() is leaf and _fingerprint(leaf) == fingerprint for leaf, (known, fingerprint) in pairs)


def fast_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree, as `tree_leaves` does, but faster.

    `tree_leaves` is called only for nodes other than dicts, lists, tuples and plain tensors.
    """
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(node: Any, found: list[Any]) -> None:
    kind = type(node)
    if kind is dict:
        node = node.values()
    elif kind is not tuple and kind is not list and not (isinstance(node, tuple) and hasattr(kind, "_fields")):
        found += tree_leaves(node)
        return
    for child in node:
        if type(child) is Tensor:
            found.append(child)
        else:
            _collect(child, found)


def consume(state: Any) -> Any:
    """Return new tensors in the memory of the state, and make the old ones `Consumed`."""
    leaves, structure = tree_flatten_with_path(state)
    new_leaves = [leaf.detach() for _, leaf in leaves]
    for path, leaf in leaves:
        leaf.__dict__["_name"] = keystr(path) or "its root"
        leaf.__class__ = Consumed
    return tree_unflatten(new_leaves, structure)


def _fingerprint(leaf: Tensor) -> Any:
    """Return a value that changes if a tensor has to be checked again.

    `leaf.data = other`, `leaf.requires_grad_()` and `consume` change it.
    """
    kind = type(leaf)
    return (leaf.data_ptr(), leaf.requires_grad) if kind is Tensor or kind is Parameter else kind


def _check_leaves(state: Any) -> dict[int, str]:
    """Check each tensor of a state. Return its name by the address of its storage."""
    spans: list[tuple[int, int, str]] = []
    for path, leaf in tree_flatten_with_path(state)[0]:
        name = keystr(path)
        if isinstance(leaf, Consumed):
            problem = f"`state` tensor at {name} was written over by an earlier step"
            raise ValueError(f"{problem}; pass the state that the last step returned")
        if not isinstance(leaf, Tensor):
            problem = f"`state` at {name} is of type {type(leaf).__name__}"
            raise ValueError(f"{problem}, which cannot be donated; make it a tensor, or pass it as another argument")
        if leaf.requires_grad:
            raise ValueError(f"`state` tensor at {name} has requires_grad=True; detach it, or pass donate=False")
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            problem = f"`state` tensor at {name} was made in inference mode and cannot be written over outside of it"
            raise ValueError(f"{problem}; clone it, or pass donate=False")
        if any(_is_expanded(tensor) for tensor in inner_tensors(leaf)):
            problem = f"`state` tensor at {name} is expanded: several of its elements are stored in one place"
            raise ValueError(f"{problem}; clone it, or pass donate=False")
        spans += [(start, stop, name) for start, stop in _spans(leaf)]
    _check_disjoint(spans)
    return {start: name for start, _, name in spans}


def _check_disjoint(spans: Iterable[tuple[int, int, str]]) -> None:
    end, owner = 0, ""
    for start, stop, name in sorted(spans):
        if start < end and name != owner:
            raise ValueError(f"`state` tensors at {owner} and {name} share memory; clone one, or pass donate=False")
        if stop > end:
            end, owner = stop, name


def _starts(tensor: Tensor) -> list[int]:
    if type(tensor) is Tensor:  # a fast path, since `inner_tensors` takes longer
        return [tensor.untyped_storage().data_ptr()] if tensor.numel() else []
    return [start for start, _ in _spans(tensor)]


def _spans(leaf: Tensor) -> list[tuple[int, int]]:
    """Return the addresses at which each storage of a tensor starts and ends.

    Empty tensors and tensors on the meta device have no entry.
    """
    storages = [tensor.untyped_storage() for tensor in inner_tensors(leaf) if tensor.numel()]
    spans = [(storage.data_ptr(), storage.nbytes()) for storage in storages]
    return [(start, start + size) for start, size in spans if start and size]


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )

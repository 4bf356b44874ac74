"""Donated states: after the step has written over one, any use of it raises."""

from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten_with_path, tree_unflatten
from dynlora_fn._core._tree import inner_tensors


def memory_of(leaf: Any) -> list[int]:
    """Return the address of each storage of the leaf: one for each of its `inner_tensors` that is not empty."""
    inner = inner_tensors(leaf) if isinstance(leaf, Tensor) else []
    return [tensor.untyped_storage().data_ptr() for tensor in inner if tensor.numel()]


class Consumed(Tensor):
    """A tensor of a consumed state: its memory contains the values of the new state."""

    _name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        consumed = next(leaf for leaf in (*args, *(kwargs or {}).values()) if isinstance(leaf, Consumed))
        operation = getattr(func, "__name__", repr(func))
        problem = f"state tensor at {consumed.__dict__['_name']} was written over by a step, and `{operation}` uses it"
        raise RuntimeError(f"{problem}; use the state that the step returned")


def consume(state: Any, aux: Any) -> Any:
    """Return new tensors in the memory of the state, and turn the old tensors into `Consumed` ones.

    Raises:
        ValueError: If `aux` shares memory with the state.
    """
    leaves, structure = tree_flatten_with_path(state)
    owners = {memory: keystr(path) for path, leaf in leaves for memory in memory_of(leaf)}
    for path, leaf in tree_flatten_with_path(aux)[0]:
        owner = next((owners[memory] for memory in memory_of(leaf) if memory in owners), None)
        if owner:
            problem = f"`aux{keystr(path)}` shares memory with the donated state at {owner}"
            raise ValueError(f"{problem}, which the next step writes over; return a clone of it")
    new_leaves = [leaf.detach() for _, leaf in leaves]
    for path, leaf in leaves:
        leaf.__dict__["_name"] = keystr(path)
        leaf.__class__ = Consumed
    return tree_unflatten(new_leaves, structure)

"""States that a step has written over: any use of them raises."""

from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten_with_path, tree_unflatten
from dynlora_fn._core._tree import inner_tensors


def memory_of(leaf: Any) -> list[int]:
    """Where its memory starts, of each of its `inner_tensors`; none of what holds no memory."""
    inner = inner_tensors(leaf) if isinstance(leaf, Tensor) else []
    return [tensor.untyped_storage().data_ptr() for tensor in inner if tensor.numel()]


class Consumed(Tensor):
    """A tensor whose memory holds another state's values by now."""

    _name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(leaf for leaf in (*args, *(kwargs or {}).values()) if isinstance(leaf, Consumed))
        operation = getattr(func, "__name__", repr(func))
        rule = "must not be used after a step has written over it: take the state that the step returned"
        raise RuntimeError(f"the state's tensor at {found.__dict__['_name']} {rule}, got `{operation}`")


def consume(state: Any, aux: Any) -> Any:
    """The state in the same memory, by tensors of its own; those that were given are consumed.

    Raises:
        ValueError: if `aux` holds memory of the state.
    """
    leaves, structure = tree_flatten_with_path(state)
    owners = {memory: keystr(path) for path, leaf in leaves for memory in memory_of(leaf)}
    for path, leaf in tree_flatten_with_path(aux)[0]:
        owner = next((owners[memory] for memory in memory_of(leaf) if memory in owners), None)
        if owner:
            rule = "must hold no memory of a donated state, which the next step writes over"
            raise ValueError(f"`aux` {rule}, got that of {owner} at {keystr(path)}")
    fresh = [leaf.detach() for _, leaf in leaves]
    for path, leaf in leaves:
        leaf.__dict__["_name"] = keystr(path)
        leaf.__class__ = Consumed
    return tree_unflatten(fresh, structure)

"""The contents of a state that a checkpoint stores, by path.

They are tensors, numbers, texts, and nodes without leaves such as the divisor of a deferred base.
"""

from dataclasses import fields, is_dataclass
from enum import Enum
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._check import described
from dynlora_fn._core._torch import (
    is_constant_class,
    is_traceable_wrapper_subclass,
    keystr,
    tree_flatten_with_path,
    tree_map,
    tree_map_with_path,
)
from dynlora_fn._core._types import Sharding
from dynlora_fn.interop._agree import Members
from dynlora_fn.parallel._dtensors import as_dtensors
from dynlora_fn.parallel._shards import name_of

Value: TypeAlias = bool | int | float | str | None

# Names in the header of a safetensors file.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Piece(NamedTuple):
    """A tensor of a state, or the shard of one that this process stores."""

    tensor: Tensor
    shape: tuple[int, ...]  # of the unsharded tensor
    offsets: tuple[int, ...]  # of the shard in the unsharded tensor
    is_shard: bool


class Contents(NamedTuple):
    """A state by the paths of its leaves."""

    pieces: dict[str, Piece]
    values: dict[str, Value]
    constants: dict[str, str]  # texts of nodes without leaves, such as the divisor of a deferred base

    def described(self) -> dict[str, str]:
        """Return a text for each leaf, equal for leaves that can replace each other."""
        tensors = {path: describe_tensor(piece.shape, piece.tensor.dtype) for path, piece in self.pieces.items()}
        return tensors | {path: describe_value(value) for path, value in self.values.items()} | self.constants


def describe_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Return the shape and dtype of a tensor as a text."""
    return f"{shape} {dtype}"


def describe_value(value: Value) -> str:
    """Return the kind of a value as a text."""
    if isinstance(value, bool):
        return "a flag"
    return "None" if value is None else "a text" if isinstance(value, str) else "a number"


@torch.no_grad()
def contents_of(argument: str, state: Any, members: Members) -> Contents:
    """Return the contents of a state, whose tensors share the memory of the state.

    Raises:
        TypeError: If a leaf cannot be stored. The message names the argument and the path.
        ValueError: If two leaves have the same path, or shards are from another group.
    """
    values: dict[str, Value] = {}
    constants: dict[str, str] = {}
    leaves = tree_flatten_with_path(state, is_leaf=_is_constant)[0]
    for path, leaf in leaves:
        if isinstance(leaf, Tensor):
            _check_tensor(argument, name_of(path), leaf)
        elif _is_constant(leaf):
            constants[keystr(path)] = _text_of_constant(leaf)
        else:
            values[keystr(path)] = _value(argument, name_of(path), leaf)
    tensors = as_dtensors(tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else None, state))
    pieces = {path: _piece(argument, path, tensor, members) for path, tensor in tensors.items()}
    if len(pieces) + len(values) + len(constants) < len(leaves):
        paths = [keystr(path) for path, _ in leaves]
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"`{argument}` has two leaves at {twice}; use keys with different texts")
    return Contents(pieces, values, constants)


def with_values(state: Any, values: dict[str, Value]) -> Any:
    """Return a state with other numbers and texts, by path."""

    def replaced(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf
        value = values.get(keystr(path), leaf)
        return type(leaf)(value) if isinstance(leaf, Enum) and value is not None else value

    return tree_map_with_path(replaced, state)


def _is_constant(node: Any) -> bool:
    """Return whether a node has no leaves but must be equal in a checkpoint.

    A `Sharding` may differ.
    """
    return is_constant_class(type(node)) and not isinstance(node, Sharding)


def _text_of_constant(node: Any) -> str:
    """Return a text that is equal for equal constants.

    Integers are written as floats, because 2 equals 2.0.
    """
    if not is_dataclass(node):
        return repr(node)
    values = {field.name: getattr(node, field.name) for field in fields(node)}
    plain = {name: float(value) if type(value) is int else value for name, value in values.items()}
    return f"{type(node).__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


def _check_tensor(argument: str, name: str, tensor: Tensor) -> None:
    if is_traceable_wrapper_subclass(tensor):
        advice = "shard with `dl.parallel.shard`" if hasattr(tensor, "placements") else "use `dl.bases.from_torchao`"
        raise TypeError(f"`{argument}` has a {type(tensor).__name__} at {name}, which has no plain bytes; {advice}")
    if tensor.layout != torch.strided or tensor.is_meta:
        what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
        raise TypeError(f"`{argument}` has a tensor {what} at {name}; use a dense tensor with data")
    if tensor.dtype not in DTYPES.values():
        raise TypeError(f"`{argument}` has {described(tensor)} at {name}, which safetensors cannot store; convert it")


def _value(argument: str, name: str, leaf: Any) -> Value:
    if leaf is None or isinstance(leaf, bool):
        return leaf
    for kind, plain in ((str, str.__str__), (Integral, int), (float, float)):  # an `Enum` of texts has another `str`
        if isinstance(leaf, kind):
            return plain(leaf)
    raise TypeError(
        f"`{argument}` has {described(leaf)} at {name}, which a checkpoint cannot store; "
        "pass tensors, numbers, texts and None, such as `generator.get_state()`"
    )


def _piece(argument: str, path: str, tensor: Any, members: Members) -> Piece:
    shape, offsets = tuple(tensor.shape), [0] * tensor.ndim
    if not hasattr(tensor, "placements"):
        return Piece(tensor.detach(), shape, tuple(offsets), False)
    mesh, (placement,) = tensor.device_mesh, tensor.placements
    if (mesh.size(), mesh.get_local_rank()) != (members.world_size, members.process):
        raise ValueError(
            f"`{argument}` has shards of process {mesh.get_local_rank()} of {mesh.size()} at {path}, but `group` has "
            f"process {members.process} of {members.world_size}; pass the group that it was sharded over"
        )
    length = shape[placement.dim]
    offsets[placement.dim] = min(members.process * -(-length // members.world_size), length)
    return Piece(tensor.to_local(), shape, tuple(offsets), True)

"""The shape, the stack members and the residual of a base that is not sharded."""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_flatten, tree_map, tree_unflatten
from dynlora_fn.bases._formats import Residual, shape_of
from dynlora_fn.bases._rowwise import int8_residual
from dynlora_fn.bases._types import LocalBase, Quantized

ResidualKind: TypeAlias = Literal["int8", "bfloat16"] | None
Device: TypeAlias = torch.device | str | None
LocalBaseT = TypeVar("LocalBaseT", bound="Tensor | Quantized")


def make_residual(error: Tensor, residual: ResidualKind, device: Device) -> Residual:
    """Return the difference that codes miss as a residual on a device."""
    if residual is None:
        return ()
    encoded = error.to(torch.bfloat16) if residual == "bfloat16" else int8_residual(error)
    return tree_map(lambda tensor: tensor.to(device or tensor.device), encoded)  # type: ignore[no-any-return]


def base_shape(base: LocalBase) -> torch.Size:
    """Return the shape of the weight, (*stack, out, in)."""
    return shape_of(base if isinstance(base, Tensor) else base.codes)


def stack_members(base: LocalBaseT) -> Iterator[LocalBaseT]:
    """Yield the bases of a stack in row-major order, as views."""
    stack = base_shape(base)[:-2]
    leaves, structure = tree_flatten(base)
    rows = [leaf.reshape(stack.numel(), *leaf.shape[len(stack) :]) for leaf in leaves]
    for index in range(stack.numel()):
        yield tree_unflatten([row[index] for row in rows], structure)


def stack_bases(members: Sequence[LocalBaseT], stack: Sequence[int]) -> LocalBaseT:
    """Copy the members into one base with the leading axes `stack`."""
    stacked: LocalBaseT = tree_map(lambda *leaves: torch.stack(leaves).reshape((*stack, *leaves[0].shape)), *members)
    return stacked

"""Quantized bases: shape, members of a stack, residual."""

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


def make_residual(rest: Tensor, residual: ResidualKind, device: Device) -> Residual:
    """What codes miss, as a residual on a device."""
    if residual is None:
        return ()
    made = rest.to(torch.bfloat16) if residual == "bfloat16" else int8_residual(rest)
    return tree_map(lambda tensor: tensor.to(device or tensor.device), made)  # type: ignore[no-any-return]


def base_shape(base: LocalBase) -> torch.Size:
    """Of the weight, (*stack, out, in)."""
    return shape_of(base if isinstance(base, Tensor) else base.codes)


def stack_members(base: LocalBaseT) -> Iterator[LocalBaseT]:
    """The bases of a stack in row-major order: views."""
    stack = base_shape(base)[:-2]
    leaves, structure = tree_flatten(base)
    rows = [leaf.reshape(stack.numel(), *leaf.shape[len(stack) :]) for leaf in leaves]
    for number in range(stack.numel()):
        yield tree_unflatten([row[number] for row in rows], structure)


def stack_bases(made: Sequence[LocalBaseT], stack: Sequence[int]) -> LocalBaseT:
    """The stack of these members: copies."""
    whole: LocalBaseT = tree_map(lambda *leaves: torch.stack(leaves).reshape((*stack, *leaves[0].shape)), *made)
    return whole

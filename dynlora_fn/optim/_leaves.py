"""Lists of tensors that elementwise formulas treat as one tensor.

Each operation of a formula is then one call for the whole list. The bits are the same as from a formula on each tensor,
because the same operations run in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import (
    flatten_tensors,
    foreach_add,
    foreach_add_,
    foreach_clamp_min,
    foreach_div,
    foreach_div_,
    foreach_mul,
    foreach_mul_,
    foreach_neg,
    foreach_sign,
    foreach_sqrt,
    foreach_sub,
    unflatten_tensors,
)


class Leaves:
    """A list of tensors of one dtype.

    The other operand of an operation is a number, a 0-d tensor, or a list of the same length.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def to(self, dtype: torch.dtype) -> "Leaves":
        return self if self.dtype == dtype else Leaves([tensor.to(dtype) for tensor in self.tensors])

    def __add__(self, other: Any) -> "Leaves":
        return Leaves(foreach_add(self.tensors, _term(other, self.tensors)))

    def __sub__(self, other: Any) -> "Leaves":
        return Leaves(foreach_sub(self.tensors, _term(other, self.tensors)))

    def __mul__(self, other: Any) -> "Leaves":
        return Leaves(foreach_mul(self.tensors, _operand(other, self.tensors)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Leaves":
        return Leaves(foreach_div(self.tensors, _operand(other, self.tensors)))

    def __neg__(self) -> "Leaves":
        return Leaves(foreach_neg(self.tensors))

    def square(self) -> "Leaves":
        return Leaves(foreach_mul(self.tensors, self.tensors))

    def sqrt(self) -> "Leaves":
        return Leaves(foreach_sqrt(self.tensors))

    def sign(self) -> "Leaves":
        return Leaves(foreach_sign(self.tensors))

    def clamp(self, min: float) -> "Leaves":
        return Leaves(foreach_clamp_min(self.tensors, min))


class _SpentLeaves(Leaves):
    """Leaves that the next sum, product or quotient overwrites, if it has their dtype."""

    __slots__ = ()

    def __add__(self, other: Any) -> Leaves:
        if not self._keeps_dtype(other):
            return super().__add__(other)
        foreach_add_(self.tensors, _term(other, self.tensors))
        return Leaves(self.tensors)

    def __mul__(self, other: Any) -> Leaves:
        return self._in_place(foreach_mul_, other) if self._keeps_dtype(other) else super().__mul__(other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Leaves:
        return self._in_place(foreach_div_, other) if self._keeps_dtype(other) else super().__truediv__(other)

    def _keeps_dtype(self, other: Any) -> bool:
        return not isinstance(other, Leaves | Tensor) or other.dtype == self.dtype

    def _in_place(self, operation: Callable[..., None], other: Any) -> Leaves:
        operation(self.tensors, _operand(other, self.tensors))
        return Leaves(self.tensors)


def spent(result: Any) -> Any:
    """Mark a result that only the next operation reads, so that it may be overwritten.

    The result must come from an operation that allocates memory, and not from `to`. Tensors are returned unchanged, so
    that a formula on tensors has the same graph and derivatives.
    """
    return _SpentLeaves(result.tensors) if isinstance(result, Leaves) else result


class FlatLeaves:
    """A list of small tensors, copied into one tensor for operations on them.

    It can be the divisor of `Leaves`. If all entries are equal, as counts are without switches, one number replaces
    them.
    """

    __slots__ = ("flat", "like")

    def __init__(self, flat: Tensor, like: Sequence[Tensor]) -> None:
        self.flat, self.like = flat, like

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "FlatLeaves":
        flat = flatten_tensors(list(tensors))
        is_constant = flat.is_cpu and flat.numel() > 1 and bool((flat == flat[0]).all())
        return cls(flat[0] if is_constant else flat, tensors)

    @property
    def operand(self) -> Tensor | Sequence[Tensor]:
        """One number for all tensors, or a tensor for each."""
        return unflatten_tensors(self.flat, self.like) if self.flat.ndim else self.flat

    def _apply(self, operation: Callable[..., Tensor], *args: Any) -> "FlatLeaves":
        return FlatLeaves(operation(self.flat, *args), self.like)

    def to(self, dtype: torch.dtype) -> "FlatLeaves":
        return self._apply(Tensor.to, dtype)

    def clamp(self, min: float) -> "FlatLeaves":
        return self._apply(Tensor.clamp_min, min)

    def __mul__(self, other: float) -> "FlatLeaves":
        return self._apply(torch.mul, other)

    def __neg__(self) -> "FlatLeaves":
        return self._apply(torch.neg)

    def expm1(self) -> "FlatLeaves":
        return self._apply(torch.expm1)

    def sqrt(self) -> "FlatLeaves":
        return self._apply(torch.sqrt)


def _operand(other: Any, tensors: Sequence[Tensor]) -> Any:
    """Convert an operand for an operation on a list of tensors."""
    if isinstance(other, Leaves | FlatLeaves):
        return other.tensors if isinstance(other, Leaves) else other.operand
    dtype = tensors[0].dtype
    is_exact = dtype.is_floating_point == isinstance(other, float) and dtype.itemsize > 2  # half precision rounds it
    if isinstance(other, int | float) and is_exact and tensors[0].is_cpu:
        return torch.tensor(other, dtype=dtype, device="cpu")  # once, and not for each tensor of the list
    return other


def _term(other: Any, tensors: Sequence[Tensor]) -> Any:
    """Convert an operand for a sum or difference with a list of tensors.

    The sum of a list and one number takes twice as long as the sum of two lists.
    """
    operand = _operand(other, tensors)
    is_number = isinstance(operand, Tensor) and not isinstance(other, Tensor | FlatLeaves)
    return [operand] * len(tensors) if is_number else operand

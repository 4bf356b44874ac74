"""Views of a low-rank weight in the shape of a parameter, transposed or cut.

A view computes and copies nothing, but `dense_base` dequantizes a base in low precision.

A `LowRank` is a matrix or a stack of matrices. The parameter of a module may have another shape:

=============================  ==========================  ==============================================
the module's parameter         the `LowRank`               example
=============================  ==========================  ==============================================
(out, in)                      (out, in)                   `nn.Linear`, an embedding
(stack, out, in)               (stack, out, in)            experts
(out, in, *kernel)             (out, in * prod(kernel))    `nn.Conv2d`
(stack, parts * out, in)       (stack, parts, out, in)     queries, keys and values, fused along rows
(stack, out, parts * in)       (stack, parts, out, in)     the same fused along columns, as in GPT-2
=============================  ==========================  ==============================================
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, Never, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._stacking import unbind
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.switching._weight import materialize

ROWS, COLUMNS = -2, -1

# What to do for an operation without a rule: form the dense weight and warn, or raise. `explain` passes a function that
# gets the names of the weight and the operation.
Fallback: TypeAlias = Literal["dense", "raise"] | Callable[[str, str], None]


class NoRuleError(NotImplementedError):
    """The error for an operation without a rule, or for a use that no rule covers."""


class View(NamedTuple):
    """One parameter of a module: one low-rank weight, or several along an axis."""

    name: str  # of the parameter
    parts: tuple[LowRank, ...]
    axis: int = ROWS  # along which several parts are adjacent
    kernel: tuple[int, ...] = ()  # of a convolution (out, in, *kernel), whose part has in * prod(kernel) columns
    scale: float | Tensor | None = None  # multiplies the weight; None for 1
    fallback: Fallback = "dense"
    read_dtype: torch.dtype | None = None  # the dtype that the module reads; None for the dtype of the factors

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.parts) == 1 and not self.kernel:
            return matrix_shape(self.parts[0])
        *stack, rows, columns = matrix_shape(self.parts[0])
        if self.kernel:
            return (rows, columns // prod(self.kernel), *self.kernel)
        if self.axis == ROWS:
            return (*stack, sum(matrix_shape(part)[ROWS] for part in self.parts), columns)
        return (*stack, rows, sum(matrix_shape(part)[COLUMNS] for part in self.parts))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].factors.b.dtype if self.read_dtype is None else self.read_dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].factors.b.device


def matrix_shape(param: LowRank) -> tuple[int, ...]:
    """Return the shape (*stack, out, in) of a weight, as a tuple."""
    return tuple(param.shape)


def view_of(name: str, param: LowRank, shape: Sequence[int], fallback: Fallback = "dense") -> View:
    """Return a view of `param` with the shape of a module's parameter.

    Raises:
        ValueError: If the shapes match no row of the table above. The message has the name and both shapes.
    """
    matrices, shape = matrix_shape(param), tuple(shape)
    if param.factor_sharding and matrices == shape:
        return View(name, (param,), fallback=fallback)  # `linear` gathers the factors
    param = with_pending(param)  # pending folds become further slots
    if matrices == shape:
        return View(name, (param,), fallback=fallback)
    *stack, rows, columns = matrices
    if not stack and len(shape) > 2 and (rows, columns) == (shape[0], prod(shape[1:])):
        return View(name, (param,), kernel=shape[2:], fallback=fallback)
    for axis, size in ((ROWS, rows), (COLUMNS, columns)):
        fused = [*stack[:-1], rows, columns]
        if stack and len(shape) == len(fused):
            fused[axis] = stack[-1] * size
            if tuple(fused) == shape:
                return View(name, unbind_last(param), axis, fallback=fallback)
    raise ValueError(
        f"`params` has shape {matrices} for {name!r}, which does not fit the parameter's shape {shape}; "
        "make `params` from this model"
    )


def unbind_last(param: LowRank) -> tuple[LowRank, ...]:
    if param.seed.ndim == 1:
        return tuple(part for part in unbind(param) if isinstance(part, LowRank))
    b, a, seed = param.factors.b.movedim(-3, 0), param.factors.a.movedim(-3, 0), param.seed.movedim(-1, 0)
    moved = LowRank(dense_base(param).movedim(-3, 0), param.factors._replace(b=b, a=a), seed)
    return tuple(part for part in unbind(moved) if isinstance(part, LowRank))


def dense_base(param: LowRank) -> Tensor:
    """Return the dense base that products read, dequantized if it is in low precision."""
    return as_base(param.base).as_tensor(param.factors.b.dtype)


def transposed(view: View) -> View:
    """Return the transposed weight, ``base.mT + alpha / rank * a.mT @ b.mT``.

    Codes are not changed, only marked as transposed.
    """
    parts = tuple(
        LowRank(
            as_base(part.base).transposed(),
            part.factors._replace(b=part.factors.a.mT, a=part.factors.b.mT),
            part.seed,
        )
        for part in view.parts
    )
    return view._replace(parts=parts, axis=COLUMNS if view.axis == ROWS else ROWS)


def take(part: LowRank, stack: tuple[Any, ...], rows: Any, columns: Any) -> LowRank:
    """Return ``weight[*stack, rows, columns]``, where `rows` and `columns` are slices."""
    b, a = whole_factors(part)
    factors = part.factors._replace(b=b[(*stack, rows, slice(None))], a=a[(*stack, slice(None), columns)])
    return LowRank(dense_base(part)[(*stack, rows, columns)], factors, part.seed[stack])


def split_rows(part: LowRank, shape: Sequence[int]) -> LowRank:
    """Return ``weight.view(*shape, in)`` of a matrix as a stack with shared `a`."""
    b, a = whole_factors(part)
    stack = shape[:-1]
    factors = part.factors._replace(b=b.reshape(*shape, b.shape[-1]), a=a.expand(*stack, *a.shape))
    return LowRank(dense_base(part).reshape(*shape, a.shape[-1]), factors, part.seed.expand(stack))


def scaled(tensor: Tensor, view: View) -> Tensor:
    """Multiply an input or result of a product by the scale of the view."""
    return tensor if view.scale is None else tensor * view.scale


def gathered(view: View) -> View:
    """Gather the sharded factors of a view."""
    if not any(part.factor_sharding for part in view.parts):
        return view
    return view._replace(parts=tuple(map(with_pending, view.parts)))


def dense(view: View) -> Tensor:
    """Return the dense weight in the shape of the parameter."""
    return torch.cat([materialize(part) for part in view.parts], dim=view.axis).reshape(view.shape)


def no_rule(view: View, operation: str) -> NoRuleError:
    """Return the error for an operation without a rule."""
    return NoRuleError(
        f"low-rank weight {view.name!r} is used in `{operation}`, which has no rule; pass fallback='dense' to `call`, "
        "exclude the weight from `targets`, or add a rule with `dl.nn.register_rule`"
    )


def refuse(view: View, operation: str, use: str) -> Never:
    """Raise for a use of an operation that its rule does not cover."""
    # Not a TypeError: the operators of `Tensor` take that for an unsupported operand and replace the message.
    raise NoRuleError(
        f"low-rank weight {view.name!r} is used in `{operation}` with {use}, which the rule does not cover; pass "
        "fallback='dense' to `call`, or exclude the weight from `targets`"
    )


def expect_weight(operation: str, weight: Any, **others: Any) -> View:
    """Return `weight`, and refuse an operation that has another low-rank argument."""
    for name, value in others.items():
        if isinstance(value, View):
            refuse(value, operation, f"a low-rank `{name}`")
    assert isinstance(weight, View)
    return weight


def single(view: View, operation: str) -> LowRank:
    """Return the only part of a view, and refuse a fused or convolutional weight."""
    if len(view.parts) > 1 or view.kernel:
        refuse(view, operation, f"shape {view.shape} made of {[matrix_shape(part) for part in view.parts]}")
    return view.parts[0]

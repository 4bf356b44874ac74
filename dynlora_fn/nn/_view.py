"""How a module sees a low-rank weight: in its own shape, transposed or in part. Nothing is multiplied or copied.

A `LowRank` is a matrix, or a stack of them. What a module holds may be of another shape:

=============================  ==========================  ==============================================
the module's parameter         the `LowRank`               e.g.
=============================  ==========================  ==============================================
(out, in)                      (out, in)                   `nn.Linear`, an embedding
(stack, out, in)               (stack, out, in)            experts
(out, in, *kernel)             (out, in * prod(kernel))    `nn.Conv2d`
(stack, parts * out, in)       (stack, parts, out, in)     queries, keys and values above each other
(stack, out, parts * in)       (stack, parts, out, in)     the same beside each other, as in GPT-2
=============================  ==========================  ==============================================
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, Never

import torch
from torch import Tensor

from dynlora_fn._core._stacking import unbind
from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.bases._base import dequantize
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._types import Deferred, Quantized, Transposed
from dynlora_fn.switching._weight import materialize

ROWS, COLUMNS = -2, -1


class View(NamedTuple):
    """Low-rank weights, one or several that lie side by side along an axis, as one parameter of a module."""

    name: str  # of the parameter
    parts: tuple[LowRank, ...]
    axis: int = ROWS  # that several parts lie along
    kernel: tuple[int, ...] = ()  # axes of a convolution behind (out, in), which the part has in its last one

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, columns = matrix_shape(self.parts[0])
        if self.kernel:
            return (rows, columns // prod(self.kernel), *self.kernel)
        if self.axis == ROWS:
            return (*stack, sum(matrix_shape(part)[ROWS] for part in self.parts), columns)
        return (*stack, rows, sum(matrix_shape(part)[COLUMNS] for part in self.parts))


def matrix_shape(param: LowRank) -> tuple[int, ...]:
    """(*stack, out, in), by the factors: a base may be stored in any way."""
    return tuple(param.shape)


def view_of(name: str, param: LowRank, shape: Sequence[int]) -> View:
    """`param` as a parameter of that shape.

    Raises:
        ValueError: if it is none of those in the table above; with the name and both shapes.
    """
    have, shape = matrix_shape(param), tuple(shape)
    if param.factor_sharding and have == shape:
        return View(name, (param,))  # gathered for each product
    param = LowRank(*with_pending(param), param.seed)  # what waits to be folded is among the factors from here on
    if have == shape:
        return View(name, (param,))
    *stack, rows, columns = have
    if not stack and len(shape) > 2 and (rows, columns) == (shape[0], prod(shape[1:])):
        return View(name, (param,), kernel=shape[2:])
    for axis, size in ((ROWS, rows), (COLUMNS, columns)):
        fused = [*stack[:-1], rows, columns]
        if stack and len(shape) == len(fused):
            fused[axis] = stack[-1] * size
            if tuple(fused) == shape:
                return View(name, _unbind_last(param), axis)
    raise ValueError(f"`params` must fit the model, got {name!r} of shape {have} for {shape}")


def _unbind_last(param: LowRank) -> tuple[LowRank, ...]:
    if param.seed.ndim == 1:
        return tuple(part for part in unbind(param) if isinstance(part, LowRank))
    inner = dense_base(param).movedim(-3, 0)
    b, a, seed = param.factors.b.movedim(-3, 0), param.factors.a.movedim(-3, 0), param.seed.movedim(-1, 0)
    return tuple(part for part in unbind(LowRank(inner, Factors(b, a), seed)) if isinstance(part, LowRank))


def dense_base(param: LowRank) -> Tensor:
    """What products see of the base, as a tensor that no gradient reaches: of one in low precision, a copy."""
    base = param.base
    assert not isinstance(base, Deferred)
    return (base if isinstance(base, Tensor) else dequantize(base, param.factors.b.dtype)).detach()


def transposed(view: View) -> View:
    """``weight.mT = base.mT + a.mT @ b.mT / rank``."""
    parts = tuple(
        LowRank(_turned(part.base), Factors(part.factors.a.mT, part.factors.b.mT), part.seed) for part in view.parts
    )
    return view._replace(parts=parts, axis=COLUMNS if view.axis == ROWS else ROWS)


def _turned(base: Any) -> Any:
    """The base transposed. Codes only by a mark, since a product dequantizes them and keeps nothing dense."""
    if isinstance(base, Transposed):
        return base.base
    plain = base.codes if isinstance(base, Quantized) else base
    return plain.mT.detach() if isinstance(plain, Tensor) else Transposed(base)


def take(part: LowRank, stack: tuple[Any, ...], rows: Any, columns: Any) -> LowRank:
    """``weight[*stack, rows, columns]``, rows and columns being slices."""
    b, a = part.factors
    factors = Factors(b[(*stack, rows, slice(None))], a[(*stack, slice(None), columns)])
    return LowRank(dense_base(part)[(*stack, rows, columns)], factors, part.seed[stack])


def split_rows(part: LowRank, shape: Sequence[int]) -> LowRank:
    """``weight.view(*shape, in)`` of a matrix: a stack whose members share `a`."""
    b, a = part.factors
    stack = shape[:-1]
    factors = Factors(b.reshape(*shape, b.shape[-1]), a.expand(*stack, *a.shape))
    return LowRank(dense_base(part).reshape(*shape, a.shape[-1]), factors, part.seed.expand(stack))


def gathered(view: View) -> View:
    """With whole factors."""
    if not any(part.factor_sharding for part in view.parts):
        return view
    return view._replace(parts=tuple(LowRank(*with_pending(part), part.seed) for part in view.parts))


def dense(view: View) -> Tensor:
    """The weight in the parameter's shape."""
    return torch.cat([materialize(part) for part in view.parts], dim=view.axis).reshape(view.shape)


def refuse(view: View, operation: str, got: str | None = None) -> Never:
    """Raises for an operation without a rule, or for what its rule does not cover."""
    rule = f"must be used as the rule of `{operation}` has it, got {got}"
    if got is None:
        rule = f"must be used by an operation that has a rule, got `{operation}`"
    # Not a TypeError: the operators of Tensor take that for an unsupported operand and hide the message.
    raise NotImplementedError(f"low-rank weight {view.name!r} {rule}")


def expect_weight(operation: str, weight: Any, **others: Any) -> View:
    for name, value in others.items():
        if isinstance(value, View):
            refuse(value, operation, f"it as its {name}")
    assert isinstance(weight, View)
    return weight


def single(view: View, operation: str) -> LowRank:
    if len(view.parts) > 1 or view.kernel:
        refuse(view, operation, f"shape {view.shape} made of {[matrix_shape(part) for part in view.parts]}")
    return view.parts[0]

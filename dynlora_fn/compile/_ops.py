"""Custom operations that Inductor does not inline.

Only `late` has a gradient. Graph passes insert the other operations after differentiation.
"""

from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("dynlora_fn", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("separate(Tensor x) -> Tensor")
_LIBRARY.define("after(Tensor(a) x, Tensor[] others) -> Tensor(a)")
_LIBRARY.define("late(Tensor x, Tensor other) -> Tensor")
_LIBRARY.define("stack(Tensor[] xs) -> Tensor")
_LIBRARY.define(
    "times_merged(Tensor x, Tensor? bias, Tensor base, Tensor b, Tensor a, float scale, bool with_b, bool transposed)"
    " -> Tensor"
)


def _separate(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _after(x: Tensor, others: list[Tensor]) -> Tensor:
    """Return a view of `x` that cannot be read before `others` are computed."""
    return x.view_as(x)


def _stack(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs)


def _times_merged(
    x: Tensor,
    bias: Tensor | None,
    base: Tensor,
    b: Tensor,
    a: Tensor,
    scale: float,
    with_b: bool,
    transposed: bool,
) -> Tensor:
    """Return ``x @ (base + scale * b @ a)`` plus the bias, in the dtype of `x`.

    With `with_b`, the columns of `b` are appended to the columns of the weight. With `transposed`, this matrix is
    transposed.
    """
    columns = base.shape[1]
    weight = x.new_empty(base.shape[0], columns + (b.shape[1] if with_b else 0))
    if x.dtype == base.dtype:
        torch.addmm(base, b, a, alpha=scale, out=weight[:, :columns])
    else:
        weight[:, :columns] = torch.addmm(base, b, a, alpha=scale)
    if with_b:
        weight[:, columns:] = b
    weight = weight.mT if transposed else weight
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _empty_times_merged(
    x: Tensor, bias: Any, base: Tensor, b: Tensor, a: Any, scale: float, with_b: bool, transposed: bool
) -> Tensor:
    return x.new_empty(x.shape[0], base.shape[0] if transposed else base.shape[1] + (b.shape[1] if with_b else 0))


_LIBRARY.impl("separate", _separate, "CompositeExplicitAutograd")
_LIBRARY.impl("separate", lambda x: torch.empty_like(x, memory_format=torch.contiguous_format), "Meta")
_LIBRARY.impl("after", _after, "CompositeExplicitAutograd")
_LIBRARY.impl("after", _after, "Meta")
_LIBRARY.impl("late", lambda x, other: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("late", lambda x, other: torch.empty_like(x), "Meta")
_LIBRARY.impl("stack", _stack, "CompositeExplicitAutograd")
_LIBRARY.impl("stack", lambda xs: xs[0].new_empty(len(xs), *xs[0].shape), "Meta")
_LIBRARY.impl("times_merged", _times_merged, "CompositeExplicitAutograd")
_LIBRARY.impl("times_merged", _empty_times_merged, "Meta")


def late(x: Tensor, other: Tensor) -> Tensor:
    """Return a copy of `x` that is computed after `other`.

    Its derivative is the identity. The graph pass `order_remat_blocks` replaces the copy with a view.
    """
    return _Late.apply(x, other)  # type: ignore[no-any-return, no-untyped-call]


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.dynlora_fn.late(x, other)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, other: Any) -> Tensor | None:
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, other: Tensor) -> tuple[Tensor, int | None]:
        return _Late.apply(x, other), in_dims[0]  # type: ignore[no-untyped-call]

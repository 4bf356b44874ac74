"""Rules for further functions that compute products, and for concatenated weights.

They call the rules of `_products` where possible.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._tree import whole_factors
from dynlora_fn.nn._products import compute_dtype, einsum, linear, matmul
from dynlora_fn.nn._view import View, dense_base, expect_weight, refuse, scaled, single


def inner(input: Any, other: Any) -> Tensor:
    """Return ``input @ other.mT`` for a matrix."""
    view = other if isinstance(other, View) else input
    if len(view.shape) > 2:
        refuse(view, "inner", f"shape {view.shape}")
    if isinstance(other, View):
        return linear(input, other)
    output: Tensor = linear(other, input).movedim(-1, 0)
    return output


def tensordot(a: Any, b: Any, dims: Any = 2, out: Any = None) -> Tensor:
    """Contract the axes `dims` with `einsum`."""
    axes = [len(operand.shape) for operand in (a, b)]
    if isinstance(dims, Tensor) or out is not None:
        refuse(a if isinstance(a, View) else b, "tensordot", "`dims` in a tensor, or `out`")
    first, second = (range(axes[0] - dims, axes[0]), range(dims)) if isinstance(dims, int) else dims
    left, right = ascii_letters[: axes[0]], list(ascii_letters[axes[0] : sum(axes)])
    contracted = []
    for axis, other in zip(first, second, strict=True):
        right[other % axes[1]] = left[axis % axes[0]]
        contracted.append(left[axis % axes[0]])
    result = "".join(letter for letter in [*left, *right] if letter not in contracted)
    return einsum(f"{left},{''.join(right)}->{result}", a, b)


def multiply_chain(tensors: Sequence[Any], *more: Any) -> Tensor:
    """Return the product of matrices, computed from left to right."""
    matrices = [tensors, *more] if isinstance(tensors, Tensor | View) else tensors
    output: Tensor = reduce(_product, matrices)
    return output


def _product(left: Any, right: Any) -> Tensor:
    return matmul(left, right) if isinstance(left, View) or isinstance(right, View) else left @ right


def bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Tensor:
    """Return ``input1 @ weight[o] @ input2`` for each matrix o of a stack."""
    view = expect_weight("bilinear", weight, input1=input1, input2=input2, bias=bias)
    part = single(view, "bilinear")
    dtype = compute_dtype(input1)
    input1, input2, base, b, a = (
        leaf.to(dtype) for leaf in (scaled(input1, view), input2, dense_base(part), *whole_factors(part))
    )
    left, right = torch.einsum("...i,oir->...or", input1, b), torch.einsum("...j,orj->...or", input2, a)
    return functional.bilinear(input1, input2, base, bias) + (left * right).sum(-1) / part.divisor


def cat(tensors: Sequence[Any], dim: int = 0) -> View:
    """Concatenate low-rank matrices along rows or columns into one fused weight."""
    view = next(tensor for tensor in tensors if isinstance(tensor, View))
    axis = dim if dim < 0 else dim - 2
    for tensor in tensors:
        is_matrix = isinstance(tensor, View) and len(tensor.shape) == 2 and tensor.scale is None
        if not is_matrix or tensor.dtype != view.dtype or (len(tensor.parts) > 1 and tensor.axis != axis):
            refuse(view, "cat", "a tensor that is not a low-rank matrix")
    if len({tensor.shape[-3 - axis] for tensor in tensors}) > 1:
        refuse(view, "cat", "matrices of different sizes")
    parts = tuple(part for tensor in tensors for part in tensor.parts)
    return view._replace(name=", ".join(tensor.name for tensor in tensors), parts=parts, axis=axis)


def transposed_convolution(dimensions: int) -> Callable[..., Tensor]:
    """Return the rule for a transposed convolution in 1, 2 or 3 dimensions."""
    operation = f"conv_transpose{dimensions}d"
    convolution: Callable[..., Tensor] = getattr(functional, f"conv{dimensions}d")
    transposed: Callable[..., Tensor] = getattr(functional, operation)

    def low_rank_convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        """Add the convolution with the base and the convolution with `b` and then `a`.

        `b` (in, rank) is a convolution with kernel size 1, and `a` (rank, out, *kernel) a transposed convolution.
        """
        view = expect_weight(operation, weight, input=input, bias=bias)
        if len(view.kernel) != dimensions or groups > 1:
            refuse(view, operation, f"{groups} groups and a weight of shape {view.shape}")
        (part,) = view.parts
        dtype = compute_dtype(input)
        input, base, b, a = (leaf.to(dtype) for leaf in (scaled(input, view), dense_base(part), *whole_factors(part)))
        bias = None if bias is None else bias.to(dtype)
        settings = (stride, padding, output_padding, groups, dilation)
        pointwise = (b.mT / part.divisor).reshape(*b.mT.shape, *(1 for _ in view.kernel))
        low_rank = transposed(convolution(input, pointwise), a.reshape(-1, *view.shape[1:]), None, *settings)
        return transposed(input, base.reshape(view.shape), bias, *settings) + low_rank

    return low_rank_convolution


CONTRACTION_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.inner, Tensor.inner), inner),
    torch.tensordot: tensordot,
    **dict.fromkeys((torch.linalg.multi_dot, torch.chain_matmul), multiply_chain),
    functional.bilinear: bilinear,
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), cat),
    functional.conv_transpose1d: transposed_convolution(1),
    functional.conv_transpose2d: transposed_convolution(2),
    functional.conv_transpose3d: transposed_convolution(3),
}

"""Products of a low-rank weight, and other uses of its numbers: plain operations, and so right under every transform.

Products of a matrix go through `contraction.linear`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import autocast_now, widest, without_autocast
from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._linear import linear as contract
from dynlora_fn.nn._view import ROWS, View, dense_base, expect_weight, matrix_shape, refuse, single, transposed


def _compute_dtype(x: Tensor) -> torch.dtype:
    autocast = autocast_now(x.device.type)
    return autocast.dtype if autocast and autocast.enabled else x.dtype


# Products. All are `x @ weight.mT`, of a view or its transpose.


def _times(x: Tensor, view: View, operation: str, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.mT + bias``: parts above each other give outputs side by side, parts side by side take inputs."""
    if view.kernel:
        refuse(view, operation, f"the weight of a convolution of shape {view.shape}")
    if len(view.parts) == 1:
        return _times_part(x, view.parts[0], bias)
    sizes = [matrix_shape(part)[view.axis] for part in view.parts]
    if view.axis == ROWS:
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes, dim=-1)
        outputs = [_times_part(x, part, own) for part, own in zip(view.parts, biases, strict=True)]
        return torch.cat(outputs, dim=-1)
    inputs = torch.split(x, sizes, dim=-1)
    first = _times_part(inputs[0], view.parts[0], bias)
    return sum((_times_part(own, part) for own, part in zip(inputs[1:], view.parts[1:], strict=True)), first)


def _times_part(x: Tensor, part: LowRank, bias: Tensor | None = None) -> Tensor:
    b, a = part.factors
    if b.ndim == 2:
        return contract(x, part, bias)
    dtype = _compute_dtype(x)
    x, base, b, a = (leaf.to(dtype) for leaf in (x, dense_base(part), b, a))
    output: Tensor = x @ base.mT + (x @ a.mT / a.shape[-2]) @ b.mT
    return output if bias is None else output + bias


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    return _times(input, expect_weight("linear", weight, input=input, bias=bias), "linear", bias)


def matmul(left: Any, right: Any) -> Tensor:
    if isinstance(right, View):
        expect_weight("matmul", right, input=left)
        return _times(left, transposed(right), "matmul")
    weight = expect_weight("matmul", left, input=right)
    x: Tensor = right
    if x.ndim == 1:
        return _times(x, weight, "matmul")
    turned: Tensor = _times(x.mT, weight, "matmul").mT
    return turned


def add_product(input: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`addmm`, which Hugging Face's Conv1D uses with a weight (in, out), and `baddbmm`."""
    expect_weight("addmm", right if isinstance(right, View) else left, input=input)
    if beta == alpha == 1 and input.ndim == 1 and isinstance(right, View):
        expect_weight("addmm", right, input=left)
        return _times(left, transposed(right), "addmm", input)
    total: Tensor = beta * input + alpha * matmul(left, right)
    return total


def einsum(equation: Any, *operands: Any) -> Tensor:
    """``einsum("bi,oi->bo", x, base) + einsum("bi,or,ri->bo", x, b, a) / rank``."""
    at = next(number for number, operand in enumerate(operands) if isinstance(operand, View))
    view = operands[at]
    for other in operands[at + 1 :]:
        expect_weight("einsum", view, further_weight=other)
    part = single(view, "einsum")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    terms = terms.split(",")
    *stack, row, column = terms[at]
    if not (row + column).isalpha() or len(operands) != len(terms):
        refuse(view, "einsum", f"the equation {equation!r}")
    if not arrow:
        letters = "".join(terms).replace(".", "")
        result = "..." * ("..." in equation) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    shared = next(letter for letter in "rsuvwxyzabcdefghijklmnopqtRS" if letter not in equation)
    before = "".join(stack)
    b, a = part.factors
    others = [*operands[:at], *operands[at + 1 :]]
    dtype = _compute_dtype(others[0]) if others else b.dtype
    base, b, a, *others = (leaf.to(dtype) for leaf in (dense_base(part), b, a, *others))
    low_rank = [*terms[:at], f"{before}{row}{shared}", f"{before}{shared}{column}", *terms[at + 1 :]]
    output: Tensor = torch.einsum(f"{','.join(terms)}->{result}", *others[:at], base, *others[at:])
    low = torch.einsum(f"{','.join(low_rank)}->{result}", *others[:at], b / a.shape[-2], a, *others[at:])
    return output + low


def grouped_mm(input: Any, weight: Any, *, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Of experts (expert, in, out), each with its own rows of the input."""
    view = expect_weight("grouped_mm", weight, input=input, bias=bias)
    part = single(view, "grouped_mm")
    if bias is not None or out_dtype is not None or matrix_shape(part)[:-2] != tuple(offs.shape):
        refuse(view, "grouped_mm", "a bias, a dtype or something else than a stack of experts")
    rank = part.factors.a.shape[-2]
    padding = -rank % (16 // input.element_size())  # the operation wants rows of whole 16 bytes
    b, a = functional.pad(part.factors.b, (0, padding)), functional.pad(part.factors.a, (0, 0, 0, padding))

    def times(x: Tensor, matrices: Tensor) -> Tensor:
        return functional.grouped_mm(x, matrices.to(x.dtype), offs=offs)

    return times(input, dense_base(part)) + times(times(input, b) / rank, a)


# What is no product.


def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``base[input] + b[input] @ a / rank``; no gradient reaches the row `padding_idx`, nor `a` by way of it."""
    view = expect_weight("embedding", weight, input=input)
    part = single(view, "embedding")
    if max_norm is not None or scale_grad_by_freq or sparse:
        refuse(view, "embedding", "`max_norm`, `scale_grad_by_freq` or `sparse`")
    if part.factors.b.ndim != 2:
        refuse(view, "embedding", f"the shape {view.shape}")
    low, base = rows_of(part, input)
    if padding_idx is not None:
        is_padding = input == padding_idx % view.shape[0]
        low = torch.where(is_padding[..., None], low.detach(), low)
    return base + low


def rows_of(part: LowRank, index: Any) -> tuple[Tensor, Tensor]:
    """Those of ``b @ a / rank`` and of the base."""
    b, a = part.factors
    dtype = widest(b.dtype, a.dtype)
    with without_autocast(b.device.type):
        low = b[index].to(dtype) @ a.to(dtype) / a.shape[-2]
    return low.to(b.dtype), dense_base(part)[index].to(b.dtype)


def convolve(dimensions: int) -> Callable[..., Tensor]:
    operation = f"conv{dimensions}d"
    convolution: Callable[..., Tensor] = getattr(functional, operation)

    def rule(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """With the base, plus with ``a`` (rank, in, *kernel) and then ``b`` (out, rank) in every place. All groups
        share `a`, which is repeated for them."""
        view = expect_weight(operation, weight, input=input, bias=bias)
        if len(view.kernel) != dimensions:
            refuse(view, operation, f"shape {view.shape} that was not made low-rank as (out, in * kernel)")
        (part,) = view.parts
        dtype = _compute_dtype(input)
        input, b, a = (leaf.to(dtype) for leaf in (input, *part.factors))
        bias = None if bias is None else bias.to(dtype)
        out_features, *inner = view.shape
        base = dense_base(part).to(dtype).reshape(view.shape)
        spatial = a.reshape(-1, *inner).repeat(groups, *(1 for _ in inner))
        pointwise = (b / a.shape[-2]).reshape(out_features, -1, *(1 for _ in view.kernel))
        low = convolution(input, spatial, None, stride, padding, dilation, groups)
        output = convolution(input, base, bias, stride, padding, dilation, groups)
        return output + convolution(low, pointwise, groups=groups)

    return rule

"""Rules for products and convolutions with a low-rank weight.

The rules use plain operations, so that every transform of `torch.func` differentiates them correctly. Products with a
single matrix call `contract` of `_linear.py`.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import cast, product_dtype
from dynlora_fn._core._torch import grouped_mm as torch_grouped_mm
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.nn._linear import contract
from dynlora_fn.nn._view import ROWS, View, dense_base, expect_weight, matrix_shape, refuse, scaled, single, transposed

# --- products, each computed as `x @ weight.mT` of a view or of its transpose


def _times(x: Tensor, view: View, operation: str, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.mT + bias``, part by part.

    Outputs of parts along the rows are concatenated. Inputs are split for parts along the columns.
    """
    if view.kernel:
        refuse(view, operation, f"the weight of a convolution of shape {view.shape}")
    if not torch.compiler.is_dynamo_compiling():  # tracing a check takes as long as tracing the product
        _check_operands(x, view, operation, bias)
    x = scaled(x, view)
    if len(view.parts) == 1:
        return _times_part(x, view.parts[0], bias)
    sizes = [matrix_shape(part)[view.axis] for part in view.parts]
    if view.axis == ROWS:
        bias = bias.expand(sum(sizes)) if bias is not None and bias.shape[0] == 1 else bias
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes, dim=-1)
        outputs = [_times_part(x, part, part_bias) for part, part_bias in zip(view.parts, biases, strict=True)]
        return torch.cat(outputs, dim=-1)
    inputs = torch.split(x, sizes, dim=-1)
    first = _times_part(inputs[0], view.parts[0], bias)
    return sum((_times_part(columns, part) for columns, part in zip(inputs[1:], view.parts[1:], strict=True)), first)


def _check_operands(x: Any, view: View, operation: str, bias: Any) -> None:
    """Refuse operands that `linear` does not take.

    torch takes them with the dense weight, or refuses them with its message.
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        refuse(view, operation, "no dense tensor")
    if not (x.is_floating_point() or x.is_complex()):
        refuse(view, operation, f"an input of dtype {x.dtype}")
    if isinstance(bias, Tensor) and bias.ndim != 1:
        refuse(view, operation, f"a bias of shape {tuple(bias.shape)}")


def _times_part(x: Tensor, part: LowRank, bias: Tensor | None = None) -> Tensor:
    if part.factors.b.ndim == 2:
        return contract(x, part, bias)
    part = with_pending(part)  # gathers sharded factors; `contract` does this for a matrix
    b, a = whole_factors(part)
    dtype = product_dtype(x)
    x, base, b, a = (leaf.to(dtype) for leaf in (x, dense_base(part), b, a))
    rows = x[None] if x.ndim == 1 else x  # for a vector, the product with a stack of `a` would be one matrix
    output: Tensor = rows @ base.mT + (rows @ a.mT / part.divisor) @ b.mT
    output = output[..., 0, :] if x.ndim == 1 else output
    return output if bias is None else output + bias


def linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    """Return ``input @ weight.mT + bias``."""
    return _times(input, expect_weight("linear", weight, input=input, bias=bias), "linear", bias)


def matmul(left: Any, right: Any) -> Tensor:
    """Return ``left @ right``, where one of the operands is the low-rank weight."""
    if isinstance(right, View):
        expect_weight("matmul", right, input=left)
        return _times(left, transposed(right), "matmul")
    weight = expect_weight("matmul", left, input=right)
    x: Tensor = right
    if x.ndim == 1:
        return _times(x, weight, "matmul")
    output: Tensor = _times(x.mT, weight, "matmul").mT
    return output


def add_product(input: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Return ``beta * input + alpha * left @ right``.

    Conv1D of Hugging Face calls `addmm` with a weight (in, out) as `right`.
    """
    expect_weight("addmm", right if isinstance(right, View) else left, input=input)
    if beta == alpha == 1 and input.ndim == 1 and isinstance(right, View):
        expect_weight("addmm", right, input=left)
        return _times(left, transposed(right), "addmm", input)
    product: Tensor = alpha * matmul(left, right)
    return product if beta == 0 else beta * input + product  # as in torch, NaN in an input without weight is no result


def einsum(equation: Any, *operands: Any) -> Tensor:
    """Return an einsum with the base plus an einsum with `b` and `a`.

    For example, ``einsum("bi,oi->bo", x, weight)`` is
    ``einsum("bi,oi->bo", x, base) + einsum("bi,or,ri->bo", x, b, a) / divisor``.
    """
    at = next(position for position, operand in enumerate(operands) if isinstance(operand, View))
    view = operands[at]
    for other in operands[at + 1 :]:
        expect_weight("einsum", view, second_weight=other)
    part = single(view, "einsum")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    terms = terms.split(",")
    if len(operands) != len(terms) or not terms[at][-2:].isalpha() or len(terms[at]) < 2:
        refuse(view, "einsum", f"the equation {equation!r}")
    *stack, row, column = terms[at]
    if not arrow:
        letters = "".join(terms).replace(".", "")
        result = "..." * ("..." in equation) + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    rank_letter = next(letter for letter in "rsuvwxyzabcdefghijklmnopqtRS" if letter not in equation)
    stack_letters = "".join(stack)
    b, a = whole_factors(part)
    others = [*operands[:at], *operands[at + 1 :]]
    dtypes = [product_dtype(other) for other in others if other.is_floating_point() or other.is_complex()]
    dtype = reduce(torch.promote_types, dtypes) if dtypes else b.dtype  # without any, the others are masks
    base, b, a, *others = (leaf.to(dtype) for leaf in (dense_base(part), b, a, *others))
    low_rank_terms = [
        *terms[:at],
        f"{stack_letters}{row}{rank_letter}",
        f"{stack_letters}{rank_letter}{column}",
        *terms[at + 1 :],
    ]
    output: Tensor = torch.einsum(f"{','.join(terms)}->{result}", *others[:at], base, *others[at:])
    low_rank_output = torch.einsum(
        f"{','.join(low_rank_terms)}->{result}", *others[:at], b / part.divisor, a, *others[at:]
    )
    return scaled(cast(output + low_rank_output, dtype if dtypes else view.dtype), view)


def grouped_mm(input: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Multiply rows of the input by the matrices (expert, in, out) of their experts.

    `offs` has the end of the rows of each expert.
    """
    view = expect_weight("grouped_mm", weight, input=input, bias=bias)
    part = single(view, "grouped_mm")
    if offs is None or bias is not None or out_dtype is not None or matrix_shape(part)[:-2] != tuple(offs.shape):
        refuse(view, "grouped_mm", "`bias`, `out_dtype`, no `offs` or a weight that is not a stack of experts")
    b, a = whole_factors(part)
    padding = -b.shape[-1] % (16 // input.element_size())  # `grouped_mm` requires rows of a multiple of 16 bytes
    b, a = functional.pad(b, (0, padding)), functional.pad(a, (0, 0, 0, padding))

    def times(x: Tensor, matrices: Tensor) -> Tensor:
        return functional.grouped_mm(x, matrices.to(x.dtype), offs=offs)

    input = scaled(input, view)
    return times(input, dense_base(part)) + times(times(input, b) / part.divisor, a)


# --- convolutions


def convolve(dimensions: int) -> Callable[..., Tensor]:
    """Return the rule for `F.conv1d`, `F.conv2d` or `F.conv3d`."""
    operation = f"conv{dimensions}d"
    convolution: Callable[..., Tensor] = getattr(functional, operation)

    def low_rank_convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        """Add the convolution with the base and the convolution with `a` and then `b`.

        `a` is (rank, in, *kernel), and `b` (out, rank) is a convolution with kernel size 1. All groups share `a`, which
        is repeated for each group.
        """
        view = expect_weight(operation, weight, input=input, bias=bias)
        if len(view.kernel) != dimensions:
            refuse(view, operation, f"a weight of shape {view.shape} that is not low-rank as (out, in * prod(kernel))")
        (part,) = view.parts
        dtype = product_dtype(input)
        input, b, a = (leaf.to(dtype) for leaf in (scaled(input, view), *whole_factors(part)))
        bias = None if bias is None else bias.to(dtype)
        out_features, *inner_shape = view.shape
        base = dense_base(part).to(dtype).reshape(view.shape)
        spatial = a.reshape(-1, *inner_shape).repeat(groups, *(1 for _ in inner_shape))
        pointwise = (b / part.divisor).reshape(out_features, -1, *(1 for _ in view.kernel))
        inner_channels = convolution(input, spatial, None, stride, padding, dilation, groups)
        output = convolution(input, base, bias, stride, padding, dilation, groups)
        return output + convolution(inner_channels, pointwise, groups=groups)

    return low_rank_convolution


PRODUCT_RULES: dict[Any, Callable[..., Any]] = {
    functional.linear: linear,
    functional.conv1d: convolve(1),
    functional.conv2d: convolve(2),
    functional.conv3d: convolve(3),
    **dict.fromkeys((functional.grouped_mm, torch_grouped_mm), grouped_mm),
    torch.einsum: einsum,
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, torch.mm, torch.bmm, torch.mv), matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__), matmul),
    Tensor.__rmatmul__: lambda right, left: matmul(left, right),
    **dict.fromkeys((torch.addmm, torch.baddbmm, torch.addmv), add_product),
    **dict.fromkeys((Tensor.addmm, Tensor.baddbmm, Tensor.addmv), add_product),
}

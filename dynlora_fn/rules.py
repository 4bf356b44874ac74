"""What an operation does with a low-rank weight: one rule for each, and none for what would need the dense weight.

Each rule composes plain operations, and so is right under every transform; products of a matrix go through
`contraction.linear`. A rule is given views, never what stands for a weight in a module: within `__torch_function__`
Dynamo looks for no further overrides, and would take that for a tensor.
"""

from collections.abc import Callable, Sequence
from math import prod
from types import FunctionType
from typing import Any, Never

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn.base import autocast_now, widest, without_autocast
from dynlora_fn.contraction import linear as contract
from dynlora_fn.types import LowRank
from dynlora_fn.views import ROWS, View, dense_base, matrix_shape, split_rows, take, transposed


def refuse(view: View, operation: str, got: str | None = None) -> Never:
    """Raises for an operation without a rule, or for what its rule does not cover."""
    rule = f"must be used as the rule of `{operation}` has it, got {got}"
    if got is None:
        rule = f"must be used by an operation that has a rule, got `{operation}`"
    # Not a TypeError: the operators of Tensor take that for an unsupported operand and hide the message.
    raise NotImplementedError(f"low-rank weight {view.name!r} {rule}")


def _expect_weight(operation: str, weight: Any, **others: Any) -> View:
    for name, value in others.items():
        if isinstance(value, View):
            refuse(value, operation, f"it as its {name}")
    assert isinstance(weight, View)
    return weight


def _single(view: View, operation: str) -> LowRank:
    if len(view.parts) > 1 or view.kernel:
        refuse(view, operation, f"shape {view.shape} made of {[matrix_shape(part) for part in view.parts]}")
    return view.parts[0]


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


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    return _times(input, _expect_weight("linear", weight, input=input, bias=bias), "linear", bias)


def _matmul(left: Any, right: Any) -> Tensor:
    if isinstance(right, View):
        _expect_weight("matmul", right, input=left)
        return _times(left, transposed(right), "matmul")
    weight = _expect_weight("matmul", left, input=right)
    x: Tensor = right
    if x.ndim == 1:
        return _times(x, weight, "matmul")
    turned: Tensor = _times(x.mT, weight, "matmul").mT
    return turned


def _add_product(input: Any, left: Any, right: Any, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """`addmm`, which Hugging Face's Conv1D uses with a weight (in, out), and `baddbmm`."""
    _expect_weight("addmm", right if isinstance(right, View) else left, input=input)
    if beta == alpha == 1 and input.ndim == 1 and isinstance(right, View):
        _expect_weight("addmm", right, input=left)
        return _times(left, transposed(right), "addmm", input)
    total: Tensor = beta * input + alpha * _matmul(left, right)
    return total


def _einsum(equation: Any, *operands: Any) -> Tensor:
    """``einsum("bi,oi->bo", x, base) + einsum("bi,or,ri->bo", x, b, a) / rank``."""
    at = next(number for number, operand in enumerate(operands) if isinstance(operand, View))
    view = operands[at]
    for other in operands[at + 1 :]:
        _expect_weight("einsum", view, further_weight=other)
    part = _single(view, "einsum")
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


def _grouped_mm(input: Any, weight: Any, *, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Of experts (expert, in, out), each with its own rows of the input."""
    view = _expect_weight("grouped_mm", weight, input=input, bias=bias)
    part = _single(view, "grouped_mm")
    if bias is not None or out_dtype is not None or matrix_shape(part)[:-2] != tuple(offs.shape):
        refuse(view, "grouped_mm", "a bias, a dtype or something else than a stack of experts")
    rank = part.factors.a.shape[-2]
    padding = -rank % (16 // input.element_size())  # the operation wants rows of whole 16 bytes
    b, a = functional.pad(part.factors.b, (0, padding)), functional.pad(part.factors.a, (0, 0, 0, padding))

    def times(x: Tensor, matrices: Tensor) -> Tensor:
        return functional.grouped_mm(x, matrices.to(x.dtype), offs=offs)

    return times(input, dense_base(part)) + times(times(input, b) / rank, a)


# What is no product.


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``base[input] + b[input] @ a / rank``; no gradient reaches the row `padding_idx`, nor `a` by way of it."""
    view = _expect_weight("embedding", weight, input=input)
    part = _single(view, "embedding")
    if max_norm is not None or scale_grad_by_freq or sparse:
        refuse(view, "embedding", "`max_norm`, `scale_grad_by_freq` or `sparse`")
    if part.factors.b.ndim != 2:
        refuse(view, "embedding", f"the shape {view.shape}")
    low, base = _rows(part, input)
    if padding_idx is not None:
        is_padding = input == padding_idx % view.shape[0]
        low = torch.where(is_padding[..., None], low.detach(), low)
    return base + low


def _rows(part: LowRank, index: Any) -> tuple[Tensor, Tensor]:
    """Those of ``b @ a / rank`` and of the base."""
    b, a = part.factors
    dtype = widest(b.dtype, a.dtype)
    with without_autocast(b.device.type):
        low = b[index].to(dtype) @ a.to(dtype) / a.shape[-2]
    return low.to(b.dtype), dense_base(part)[index].to(b.dtype)


def _convolve(dimensions: int) -> Callable[..., Tensor]:
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
        view = _expect_weight(operation, weight, input=input, bias=bias)
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


# Views of a view.


def _transpose(view: View, *dims: Any, **named: int) -> View:
    wanted = {dim % len(view.shape) for dim in (*dims, *named.values())}
    if view.kernel or (wanted or {0, 1}) != {len(view.shape) - 2, len(view.shape) - 1}:
        refuse(view, "transpose", f"dims {sorted(wanted)} of shape {view.shape}")
    return transposed(view)


def _transpose_matrix(view: View) -> View:
    return _transpose(view, 0, 1)


def _transpose_last(view: View) -> View:
    return _transpose(view, -2, -1)


def _split(view: View, split_size: int | Sequence[int], dim: int = 0) -> tuple[View, ...]:
    size = view.shape[dim]
    if isinstance(split_size, int):
        split_size = [min(split_size, size - at) for at in range(0, size, split_size)]
    axis = dim if dim < 0 else dim - len(view.shape)
    if len(view.parts) > 1:
        sizes = [matrix_shape(part)[view.axis] for part in view.parts]
        if axis != view.axis or sum(split_size) != size:
            refuse(view, "split", f"axis {dim} of shape {view.shape}")
        return tuple(_span(view, sizes, at, at + own) for at, own in _spans(split_size))
    slices = [slice(at, at + own) for at, own in _spans(split_size)]
    index = (slice(None),) * (len(view.shape) + axis)
    pieces = [_get_item(view, (*index, one)) for one in slices]
    return tuple(piece for piece in pieces if isinstance(piece, View))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:number]), own) for number, own in enumerate(sizes)]


def _span(view: View, sizes: list[int], start: int, end: int) -> View:
    """Whole parts alone, from row or column `start` to `end`."""
    edges = [at for at, _ in _spans(sizes)] + [sum(sizes)]
    if start not in edges or end not in edges:
        refuse(view, "split", f"{start} to {end}, within one of its parts of {sizes}")
    return view._replace(parts=view.parts[edges.index(start) : edges.index(end)])


def _chunk(view: View, chunks: int, dim: int = 0) -> tuple[View, ...]:
    return _split(view, -(-view.shape[dim] // chunks), dim)


def _unbind(view: View, dim: int = 0) -> tuple[Any, ...]:
    if dim % len(view.shape):
        refuse(view, "unbind", f"axis {dim}")
    return tuple(_get_item(view, number) for number in range(view.shape[0]))


def _get_item(view: View, index: Any) -> View | Tensor:
    """Of a stack its members, which stay low-rank, and so do slices of a matrix; single rows are plain tensors."""
    index = index if isinstance(index, tuple) else (index,)
    stack_axes = len(view.shape) - 2
    if len(index) > len(view.shape) or any(one is None or one is Ellipsis for one in index):
        refuse(view, "__getitem__", f"the index {index}")
    index = (*index, *[slice(None)] * (stack_axes + 2 - len(index)))
    stack, rows, columns = index[:stack_axes], index[-2], index[-1]
    is_whole = rows == slice(None) if isinstance(rows, slice) else False
    if view.kernel or (len(view.parts) > 1 and not (is_whole and columns == slice(None))):
        refuse(view, "__getitem__", f"the index {index}")
    if isinstance(rows, slice) and isinstance(columns, slice):
        return view._replace(parts=tuple(take(part, stack, rows, columns) for part in view.parts))
    if stack_axes or not isinstance(columns, slice):
        refuse(view, "__getitem__", f"the index {index}")
    low, base = _rows(take(view.parts[0], (), slice(None), columns), rows)
    return base + low


def _reshape(view: View, *shape: Any) -> View:
    """Rows in groups, such as the heads of attention: ``weight.view(heads, size, in)``."""
    shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    part = _single(view, "view")
    rows, columns = view.shape[-2:]
    if -1 in shape:
        known = -prod(shape)
        shape = tuple(rows * columns // known if size == -1 else size for size in shape)
    if len(view.shape) != 2 or shape[-1] != columns or prod(shape[:-1]) != rows:
        refuse(view, "view", f"shape {shape} of {view.shape}")
    return view._replace(parts=(split_rows(part, shape[:-1]),))


def _unflatten(view: View, dim: int, sizes: Sequence[int]) -> View:
    if dim % len(view.shape) or len(view.shape) != 2:
        refuse(view, "unflatten", f"axis {dim} of shape {view.shape}")
    return _reshape(view, *sizes, view.shape[-1])


# Attention as `nn.MultiheadAttention` has it uses its weights by `linear` alone, if the queries', keys' and values' are
# fused after cutting them apart. So its rule is its own body, as another function, with other meanings for these two.


def _any_linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    return _linear(x, weight, bias) if isinstance(weight, View) else functional.linear(x, weight, bias)


def _project_fused(q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Tensor | None = None) -> Sequence[Tensor]:
    if q is k and k is v:
        return [one.contiguous() for one in _any_linear(q, weight, bias).chunk(3, dim=-1)]
    weights = _chunk(weight, 3) if isinstance(weight, View) else weight.chunk(3)
    return _project(q, k, v, *weights, *(bias.chunk(3) if bias is not None else (None, None, None)))


def _project(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Any, k_weight: Any, v_weight: Any, *biases: Any
) -> list[Tensor]:
    weights = (q_weight, k_weight, v_weight)
    return [_any_linear(x, *own) for x, *own in zip((q, k, v), weights, biases or (None, None, None), strict=True)]


def _has_no_rule(_: Any) -> bool:
    return False


def _attention() -> Callable[..., Any]:
    body: Any = functional.multi_head_attention_forward
    own = {"linear": _any_linear, "_in_projection_packed": _project_fused, "_in_projection": _project}
    names = {**body.__globals__, **own, "has_torch_function": _has_no_rule}
    return FunctionType(body.__code__, names, body.__name__, body.__defaults__)


RULES: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    functional.conv1d: _convolve(1),
    functional.conv2d: _convolve(2),
    functional.conv3d: _convolve(3),
    **dict.fromkeys((functional.grouped_mm, torch._grouped_mm), _grouped_mm),
    functional.multi_head_attention_forward: _attention(),
    torch.einsum: _einsum,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: lambda right, left: _matmul(left, right),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), _add_product),
    **dict.fromkeys((torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes), _transpose),
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), _transpose_matrix),  # type: ignore[attr-defined]
    Tensor.mT.__get__: _transpose_last,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.split, Tensor.split), _split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), _chunk),
    **dict.fromkeys((torch.unbind, Tensor.unbind), _unbind),
    Tensor.__getitem__: _get_item,
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), _reshape),
    **dict.fromkeys((torch.unflatten, Tensor.unflatten), _unflatten),
}
# Methods of Tensor that are written in Python, by name: to look one up is an operation to Dynamo, as with a property.
METHODS = {"split": _split, "unflatten": _unflatten}

"""What an operation does with a low-rank weight: one rule for each, and none for what would need the dense weight.

A rule is given views, never what stands for a weight in a module: within `__torch_function__` Dynamo looks for no
further overrides, and would take that for a tensor.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._torch import grouped_mm as torch_grouped_mm
from dynlora_fn.nn._products import add_product, convolve, einsum, embedding, grouped_mm, linear, matmul
from dynlora_fn.nn._reshaping import (
    chunk,
    get_item,
    reshape,
    split,
    transpose,
    transpose_last,
    transpose_matrix,
    unbind,
    unflatten,
)
from dynlora_fn.nn._view import View

# Attention as `nn.MultiheadAttention` has it uses its weights by `linear` alone, if the queries', keys' and values' are
# fused after cutting them apart. So its rule is its own body, as another function, with other meanings for these two.


def _any_linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    return linear(x, weight, bias) if isinstance(weight, View) else functional.linear(x, weight, bias)


def _project_fused(q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Tensor | None = None) -> Sequence[Tensor]:
    if q is k and k is v:
        return [one.contiguous() for one in _any_linear(q, weight, bias).chunk(3, dim=-1)]
    weights = chunk(weight, 3) if isinstance(weight, View) else weight.chunk(3)
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
    functional.linear: linear,
    functional.embedding: embedding,
    functional.conv1d: convolve(1),
    functional.conv2d: convolve(2),
    functional.conv3d: convolve(3),
    **dict.fromkeys((functional.grouped_mm, torch_grouped_mm), grouped_mm),
    functional.multi_head_attention_forward: _attention(),
    torch.einsum: einsum,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, torch.mv), matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.__matmul__), matmul),
    Tensor.__rmatmul__: lambda right, left: matmul(left, right),
    **dict.fromkeys((torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm), add_product),
    **dict.fromkeys((torch.transpose, torch.swapaxes, Tensor.transpose, Tensor.swapaxes), transpose),
    **dict.fromkeys((torch.t, Tensor.t, Tensor.T.__get__), transpose_matrix),  # type: ignore[attr-defined]
    Tensor.mT.__get__: transpose_last,  # type: ignore[attr-defined]
    **dict.fromkeys((torch.split, Tensor.split), split),
    **dict.fromkeys((torch.chunk, Tensor.chunk), chunk),
    **dict.fromkeys((torch.unbind, Tensor.unbind), unbind),
    Tensor.__getitem__: get_item,
    **dict.fromkeys((torch.reshape, Tensor.reshape, Tensor.view), reshape),
    **dict.fromkeys((torch.unflatten, Tensor.unflatten), unflatten),
}
# Methods of Tensor that are written in Python, by name: to look one up is an operation to Dynamo, as with a property.
METHODS = {"split": split, "unflatten": unflatten}

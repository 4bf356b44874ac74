"""The autograd functions of `linear`. They save the input and the parameters.

The backward pass forms a merged weight again instead of saving it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import cast, widest, without_autocast
from dynlora_fn._core._torch import apply_function, forward_levels, is_differentiated, is_tracked, unsafe_view
from dynlora_fn._core._types import Factors, ShardedFactors, Sharding, divisor_of
from dynlora_fn.bases._flatten import Layout, gather_codes, refuse_differentiated
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.bases._ops import dequantize
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._sharded_factors import gather_factors, scatter_gradients


def _dense(layout: Layout, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the dense base in its stored layout: (in, out) if it is transposed."""
    return dequantize(gather_codes(layout, codes), dtype)


def _times(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.mT + bias``.

    For a weight that is stored transposed it is ``x @ weight + bias``.
    """
    if layout.is_transposed:
        return x @ weight if bias is None else x @ weight + bias
    if x.ndim == 2 or bias is None or not x.is_contiguous():
        return functional.linear(x, weight, bias)
    # As in `functional.linear`, but the result is not a view: autograd refuses in-place changes of a Function's view.
    rows = functional.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    output: Tensor = unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))
    return output


def times_factored(x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, layout: Layout, *codes: Tensor) -> Tensor:
    inner = functional.linear(x, cast(a, x.dtype)) / divisor_of(a.shape[-2], layout.alpha)
    is_dense = layout.kind == "plain" and not (layout.sharding or layout.factor_sharding or layout.is_transposed)
    is_ready = is_dense and codes[0].dtype == x.dtype
    output = functional.linear(x, codes[0]) if is_ready else _times_base(x, layout, *codes)
    output = output if bias is None else output + bias
    return output + functional.linear(inner, cast(b, x.dtype))


def _merge(x: Tensor, b: Tensor, a: Tensor, layout: Layout, codes: Sequence[Tensor]) -> Tensor:
    merge_dtype = widest(b.dtype, x.dtype, codes_from_tensors(layout.kind, codes).sum_dtype)
    left, right = (a.mT, b.mT) if layout.is_transposed else (b, a)
    dense = _dense(layout, codes, merge_dtype)
    merged = torch.addmm(dense, cast(left, merge_dtype), cast(right, merge_dtype), alpha=layout.alpha / b.shape[-1])
    return cast(merged, x.dtype)


def _factor_sharding(layout: Layout) -> Sharding | None:
    return Sharding(*layout.factor_sharding) if layout.factor_sharding else None


def _gather_if_sharded(b: Tensor, a: Tensor, layout: Layout) -> Factors:
    sharding = _factor_sharding(layout)
    if sharding is None:
        return Factors(b, a)
    factors = gather_factors(ShardedFactors(b, a, sharding))
    return Factors(factors.b, factors.a)


def _scatter_if_sharded(b: Tensor, a: Tensor, layout: Layout) -> Factors:
    sharding = _factor_sharding(layout)
    if sharding is None:
        return Factors(b, a)
    shards = scatter_gradients(Factors(b, a), sharding)
    return Factors(shards.b, shards.a)


def _refuse_sharded(layout: Layout, transform: str) -> None:
    if layout.factor_sharding:
        refuse(f"{transform}, sharded factors")


def _needs_plain_operations(codes: Sequence[Tensor]) -> bool:
    """Return whether the Functions below would lose a derivative without an error.

    They have no derivative with respect to the base. And torch disables forward mode while it calls a `jvp`, so an
    outer level of forward mode would see constants.
    """
    return forward_levels() > 1 or any(is_tracked(code) for code in codes)


# Dynamo rejects an autograd Function that defines `jvp`. With `allow_in_graph`, AOTAutograd traces it instead, under
# any transform.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def times_merged(
    x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, is_dense: bool, layout: Layout, *codes: Tensor
) -> Tensor:
    if _needs_plain_operations(codes):
        refuse_differentiated(layout, codes, "the base")
        _refuse_sharded(layout, "forward mode")
        return times_factored(x, b, a, bias, layout, *codes)
    if not is_differentiated((x, b, a, bias)):
        return _Merged.forward(x, b, a, bias, is_dense, layout, *codes)
    return apply_function(_Merged, x, b, a, bias, is_dense, layout, *codes)  # type: ignore[no-any-return]


class _Merged(torch.autograd.Function):
    """Compute ``linear(x, merged weight, bias)`` and save only the inputs.

    The backward pass forms the merged weight again.
    """

    @staticmethod
    def forward(
        x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, is_dense: bool, layout: Layout, *codes: Tensor
    ) -> Tensor:
        b, a = _gather_if_sharded(b, a, layout)
        with without_autocast(x.device.type):
            return _times(x, _merge(x, b, a, layout, codes), layout, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, b, a, bias, ctx.is_dense, ctx.layout, *codes = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, b, a, *codes)
        ctx.save_for_forward(x, b, a, *codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, *codes = ctx.saved_tensors
        b, a = _gather_if_sharded(b, a, ctx.layout)
        with without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            rows = rows.conj() if x.is_complex() else rows
            grad_rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            weight = _merge(x, b, a, ctx.layout, codes)
            gradients = _dense_gradients if ctx.is_dense else _low_rank_gradients
            if ctx.layout.is_transposed:
                weight = weight.mT
                gradients = _dense_gradients if ctx.is_dense else _separate_gradients
            grad_bias = grad_rows.sum(0) if ctx.has_bias else None
            divisor = divisor_of(b.shape[-1], ctx.layout.alpha)
            if not ctx.needs_input_grad[2] and ctx.layout.factor_sharding is None:
                grad_x, grad_b = _one_sided_gradients(grad_rows, rows, weight, cast(a, x.dtype), ctx.is_dense)
                gradients_of_b = grad_x.reshape(x.shape), _gradient_of(b, grad_b) / divisor, None, grad_bias
                return *gradients_of_b, None, None, *(None for _ in codes)
            grad_x, grad_b, grad_a = gradients(grad_rows, rows, weight, cast(b, x.dtype), cast(a, x.dtype))
        grad_b, grad_a = _gradient_of(b, grad_b) / divisor, _gradient_of(a, grad_a) / divisor
        grad_b, grad_a = _scatter_if_sharded(grad_b, grad_a, ctx.layout)
        input_gradients = grad_x.reshape(x.shape), grad_b, grad_a, grad_bias
        return *input_gradients, None, None, *(None for _ in codes)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        b: Tensor,
        a: Tensor,
        bias: Any,
        is_dense: bool,
        layout: Layout,
        *codes: Tensor,
    ) -> tuple[Tensor, int]:
        """Use the factored path, which multiplies by an unmapped tensor only once.

        Such tensors are the base in an ensemble, and base and factors in per-sample gradients.
        """
        _refuse_sharded(layout, "vmap")
        in_dims = (*in_dims[:4], None, *in_dims[6:])
        return torch.vmap(times_factored, in_dims=in_dims)(x, b, a, bias, layout, *codes), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, b_tangent: Any, a_tangent: Any, bias_tangent: Any, *_: Any) -> Any:
        x, b, a, *codes = ctx.saved_tensors
        _refuse_sharded(ctx.layout, "forward mode")
        divisor = divisor_of(b.shape[-1], ctx.layout.alpha)
        terms = [
            None if x_tangent is None else times_factored(x_tangent, b, a, None, ctx.layout, *codes),
            None if b_tangent is None else (x @ a.to(x.dtype).mT) @ b_tangent.to(x.dtype).mT / divisor,
            None if a_tangent is None else (x @ a_tangent.to(x.dtype).mT) @ b.to(x.dtype).mT / divisor,
            bias_tangent,
        ]
        return sum(term for term in terms if term is not None)


def _gradient_of(factor: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient in its factor's dtype, without an imaginary part."""
    return cast(grad.real if grad.is_complex() and not factor.is_complex() else grad, factor.dtype)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _times_base(x: Tensor, layout: Layout, *codes: Tensor) -> Tensor:
    if _needs_plain_operations(codes) or not is_differentiated((x,)):
        return _TimesBase.forward(x, layout, *codes)
    return apply_function(_TimesBase, x, layout, *codes)  # type: ignore[no-any-return]


class _TimesBase(torch.autograd.Function):
    """Compute ``linear(x, base)`` in the dtype of `x`, and save only the stored base.

    The backward pass dequantizes it again.
    """

    @staticmethod
    def forward(x: Tensor, layout: Layout, *codes: Tensor) -> Tensor:
        return _times(x, _dense(layout, codes, x.dtype), layout)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layout, *codes = inputs
        ctx.save_for_backward(*codes)
        ctx.save_for_forward(*codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes = ctx.saved_tensors
        dense = _dense(ctx.layout, codes, grad.dtype)
        dense = dense.mT if ctx.layout.is_transposed else dense
        return grad @ dense, None, *(None for _ in codes)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, layout: Layout, *codes: Tensor) -> tuple[Tensor, int]:
        return torch.vmap(_TimesBase.forward, in_dims=in_dims)(x, layout, *codes), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, *_: Any) -> Any:
        return _times(x_tangent, _dense(ctx.layout, ctx.saved_tensors, x_tangent.dtype), ctx.layout)


def _low_rank_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # One product for the gradients of the input and of `x @ a.T`, because a narrow product would not use all of a
    # device.
    weight_and_b = torch.cat([weight, b], dim=1)
    grad_x, grad_inner = torch.split(grad @ weight_and_b, [a.shape[1], a.shape[0]], dim=1)
    return grad_x, grad.mT @ (x @ a.mT), (x.mT @ grad_inner).mT


def _separate_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients for a weight that is stored transposed.

    Its layout does not allow appending `b` as columns, as in `_low_rank_gradients`.
    """
    return grad @ weight, grad.mT @ (x @ a.mT), (x.mT @ (grad @ b)).mT


def _dense_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = grad.mT @ x
    return grad @ weight, grad_weight @ a.mT, b.mT @ grad_weight


def _one_sided_gradients(grad: Tensor, x: Tensor, weight: Tensor, a: Tensor, is_dense: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of `b`, for a weight that trains only `b`."""
    return grad @ weight, (grad.mT @ x) @ a.mT if is_dense else grad.mT @ (x @ a.mT)

"""One low-rank weight times its input, by one of the paths of `paths`."""

from collections.abc import Sequence
from math import prod
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import autocast_now, widest, without_autocast
from dynlora_fn._core._types import Factors, LowRank, Sharding
from dynlora_fn.bases._base import dequantize
from dynlora_fn.bases._flatten import Layout, flatten_base, gather_codes
from dynlora_fn.bases._pending import BaseAndFactors, rank_with_pending, with_pending, without_pending
from dynlora_fn.bases._sharded_factors import gather_factors, scatter_gradients
from dynlora_fn.bases._types import Sharded
from dynlora_fn.nn._contraction_paths import ContractionPath, cheapest_path


def linear(
    x: Float[Tensor, "*batch in"],
    param: LowRank,
    bias: Float[Tensor, " out"] | None = None,
    *,
    path: ContractionPath | None = None,
) -> Float[Tensor, "*batch out"]:
    """``x @ weight.T + bias`` by the `cheapest` path, in the dtype of `x` or the one that autocast sets.

    No gradient reaches the base. All paths give the same values and gradients but for rounding, under compositions of
    `torch.func`'s transforms too; under `torch.vmap` the factored one is taken, and tangents are formed as it forms
    them. (Compiled, forward mode wants inputs that are no views of one tensor: Dynamo fails on plain products as well.)

    Args:
        x: the input.
        param: the weight, without stack axes.
        bias: added to every output.
        path: "factored", "merged" or "dense"; the cheapest by FLOPs for these shapes unless given, of a sharded weight
            one of the last two.

    Numerics: a merged weight is formed in the widest dtype of base and factors, float32 at least, and rounded once to
    that of the product. It is formed again for the backward pass, of which only `x` and `param` are kept.
    """
    if path is not None and path not in get_args(ContractionPath):
        raise ValueError(f"`path` must be one of {', '.join(get_args(ContractionPath))}, got {path!r}")
    path = _cheapest(x, param) if path is None else path
    # Sharded factors are gathered for each of its products, but for those of the factored path, which keeps them.
    is_gathered_later = param.factor_sharding and path != "factored"
    held, (b, a) = BaseAndFactors(param.base, param.factors) if is_gathered_later else with_pending(param)
    layout, tensors = flatten_base(held)
    codes = [tensor.detach() for tensor in tensors]
    autocast = autocast_now(x.device.type)
    dtype = autocast.dtype if autocast and autocast.enabled else x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if path == "factored":
        return _factored(x, b, a, bias, layout, *codes)
    output: Tensor = _merged(x, b, a, bias, path == "dense", layout, *codes)
    return output


def _cheapest(x: Tensor, param: LowRank) -> ContractionPath:
    """For these shapes. Processes whose batches differ must gather alike what is sharded: "merged" and "dense" do, but
    "factored" needs no base for the gradient of an input that has none."""
    out_features, in_features = param.shape
    rank, tokens = rank_with_pending(param), prod(x.shape[:-1])
    path = cheapest_path(tokens=tokens, out_features=out_features, in_features=in_features, rank=rank)
    return "merged" if path == "factored" and isinstance(without_pending(param), Sharded) else path


def _dense(layout: Layout, codes: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """As it is held, whether that is transposed or not."""
    return dequantize(gather_codes(layout, codes), dtype)


def _times(x: Tensor, weight: Tensor, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.mT + bias``, or with the weight itself where that is held transposed."""
    if not layout.is_transposed:
        return functional.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


def _factored(x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, layout: Layout, *codes: Tensor) -> Tensor:
    inner = functional.linear(x, a.to(x.dtype)) / a.shape[-2]
    is_ready = layout == Layout("plain") and codes[0].dtype == x.dtype
    output = functional.linear(x, codes[0]) if is_ready else _times_base(x, layout, *codes)
    output = output if bias is None else output + bias
    return output + functional.linear(inner, b.to(x.dtype))


def _merge(x: Tensor, b: Tensor, a: Tensor, layout: Layout, codes: Sequence[Tensor]) -> Tensor:
    wide = widest(b.dtype, x.dtype, codes[0].dtype if layout.kind == "plain" else torch.float32)
    left, right = (a.mT, b.mT) if layout.is_transposed else (b, a)
    return torch.addmm(_dense(layout, codes, wide), left.to(wide), right.to(wide), alpha=1 / b.shape[-1]).to(x.dtype)


def _factor_sharding(layout: Layout) -> Sharding | None:
    sharding = Sharding(*layout.sharding) if layout.sharding else None
    return None if sharding is None or sharding.columns is None else sharding


def _gathered(b: Tensor, a: Tensor, layout: Layout) -> Factors:
    sharding = _factor_sharding(layout)
    return Factors(b, a) if sharding is None else gather_factors(Factors(b, a), sharding)


def _own_gradients(b: Tensor, a: Tensor, layout: Layout) -> Factors:
    sharding = _factor_sharding(layout)
    return Factors(b, a) if sharding is None else scatter_gradients(Factors(b, a), sharding)


def _refuse_sharded(layout: Layout, what: str) -> None:
    if _factor_sharding(layout) is not None:
        raise NotImplementedError(f"`params` must hold whole factors for {what}, got sharded ones: see `unshard`")


# Dynamo refuses a function with a `jvp`. Left to AOTAutograd, it runs as it is written, under any transform.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _merged(
    x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, is_dense: bool, layout: Layout, *codes: Tensor
) -> Tensor:
    return _Merged.apply(x, b, a, bias, is_dense, layout, *codes)  # type: ignore[no-any-return, no-untyped-call]


class _Merged(torch.autograd.Function):
    """``linear(x, merged weight, bias)``. Keeps its inputs alone."""

    @staticmethod
    def forward(
        x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, is_dense: bool, layout: Layout, *codes: Tensor
    ) -> Tensor:
        b, a = _gathered(b, a, layout)
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
        b, a = _gathered(b, a, ctx.layout)
        with without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            grad_rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            weight = _merge(x, b, a, ctx.layout, codes)
            gradients = _dense_gradients if ctx.is_dense else _low_rank_gradients
            if ctx.layout.is_transposed:
                weight = weight.mT
                gradients = _dense_gradients if ctx.is_dense else _separate_gradients
            grad_x, grad_b, grad_a = gradients(grad_rows, rows, weight, b.to(x.dtype), a.to(x.dtype))
            grad_bias = grad_rows.sum(0) if ctx.has_bias else None
        rank = b.shape[-1]
        grad_b, grad_a = _own_gradients(grad_b.to(b.dtype) / rank, grad_a.to(a.dtype) / rank, ctx.layout)
        own = grad_x.reshape(x.shape), grad_b, grad_a, grad_bias
        return *own, None, None, *(None for _ in codes)

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
        """An ensemble shares the base, and per-sample gradients all of the weight: the factored path multiplies by what
        is shared once for all members."""
        _refuse_sharded(layout, "`torch.vmap`")
        in_dims = (*in_dims[:4], None, *in_dims[6:])
        return torch.vmap(_factored, in_dims=in_dims)(x, b, a, bias, layout, *codes), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, b_tangent: Any, a_tangent: Any, bias_tangent: Any, *_: Any) -> Any:
        x, b, a, *codes = ctx.saved_tensors
        _refuse_sharded(ctx.layout, "tangents")
        rank = b.shape[-1]
        terms = [
            None if x_tangent is None else _factored(x_tangent, b, a, None, ctx.layout, *codes),
            None if b_tangent is None else (x @ a.to(x.dtype).mT) @ b_tangent.to(x.dtype).mT / rank,
            None if a_tangent is None else (x @ a_tangent.to(x.dtype).mT) @ b.to(x.dtype).mT / rank,
            bias_tangent,
        ]
        return sum(term for term in terms if term is not None)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _times_base(x: Tensor, layout: Layout, *codes: Tensor) -> Tensor:
    return _TimesBase.apply(x, layout, *codes)  # type: ignore[no-any-return, no-untyped-call]


class _TimesBase(torch.autograd.Function):
    """``linear(x, base)`` in the dtype of `x`. Keeps the base as it is stored, not the dense one."""

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
    # One product for the gradients of the input and of `x @ a.T`: a narrow one leaves much of a processor idle.
    beside = torch.cat([weight, b], dim=1)
    grad_x, grad_inner = torch.split(grad @ beside, [a.shape[1], a.shape[0]], dim=1)
    return grad_x, grad.mT @ (x @ a.mT), (x.mT @ grad_inner).mT


def _separate_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where nothing can be laid beside the weight in one piece."""
    return grad @ weight, grad.mT @ (x @ a.mT), (x.mT @ (grad @ b)).mT


def _dense_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = grad.mT @ x
    return grad @ weight, grad_weight @ a.mT, b.mT @ grad_weight

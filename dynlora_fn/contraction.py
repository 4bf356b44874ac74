"""One low-rank weight times its input: which products are formed, and what their gradients cost.

Per token and weight of d x d at rank r, full-rank training takes 6 d^2 FLOPs:

=========  =========================================  ==========================================
path       FLOPs a token, and once a step             what is formed
=========  =========================================  ==========================================
factored   4 d^2 + 12 r d                             ``x @ base.T + (x @ a.T) @ b.T / rank``
merged     4 d^2 +  8 r d, and 4 r d^2                the weight, and the gradients of the factors
dense      6 d^2         , and 8 r d^2                the weight and its gradient, then projected
=========  =========================================  ==========================================
"""

from math import prod
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from opt_einsum.helpers import flop_count
from torch import Tensor
from torch.nn import functional

from dynlora_fn.base import autocast_now, widest, without_autocast
from dynlora_fn.bases import Layout, dequantize, seen, settled, whole_codes
from dynlora_fn.types import Codes, LowRank

Path: TypeAlias = Literal["factored", "merged", "dense"]

_WEIGHT = ("or,ri->oi",)
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = "ni,oi->no", "no,oi->ni", "no,ni->oi"
_FACTOR_GRADIENTS = ("no,or->nr", "nr,ni->ri", "ni,ri->nr", "no,nr->or")
# Every product of a forward and backward pass: tokens n, in i, out o, rank r.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "full": (_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT),
    "factored": (_FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS, "nr,or->no", "nr,ri->ni"),
    # The weight is formed anew in the backward pass, so that no more than one is ever alive.
    "merged": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS),
    "dense": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT, "oi,ri->or", "or,oi->ri"),
}


def _counted(product: str) -> tuple[int, str]:
    """The FLOPs of a product for sizes of 1, by opt_einsum's count (2 for each multiplication and addition), and the
    dimensions whose sizes they grow with. Counted once, since Dynamo would trace the counting for each weight."""
    dimensions = "".join(sorted(set(product) & set("nior")))
    return flop_count(dimensions, True, 2, dict.fromkeys(dimensions, 1)), dimensions


_COUNTED = {path: [_counted(product) for product in products] for path, products in PRODUCTS.items()}


def flops(path: str, *, tokens: int, out_features: int, in_features: int, rank: int) -> int:
    """FLOPs of a forward and backward pass by a path, or by ``"full"`` rank."""
    sizes = {"n": tokens, "o": out_features, "i": in_features, "r": rank}
    return sum(count * prod([sizes[dimension] for dimension in dimensions]) for count, dimensions in _COUNTED[path])


def cheapest(*, tokens: int, out_features: int, in_features: int, rank: int) -> Path:
    """The path of the fewest `flops`. Of equals the one that comes first in `Path`."""
    sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "rank": rank}
    costs = {path: flops(path, **sizes) for path in get_args(Path)}
    best: Path = "factored"
    for path, cost in costs.items():  # a comparison of each, which Dynamo traces where the shapes are dynamic
        if cost < costs[best]:
            best = path
    return best


def linear(
    x: Float[Tensor, "*batch in"],
    param: LowRank,
    bias: Float[Tensor, " out"] | None = None,
    *,
    path: Path | None = None,
) -> Float[Tensor, "*batch out"]:
    """``x @ weight.T + bias`` by the `cheapest` path, in the dtype of `x` or the one that autocast sets.

    No gradient reaches the base. All paths give the same values and gradients but for rounding, under compositions of
    `torch.func`'s transforms too; under `torch.vmap` the factored one is taken, and tangents are formed as it forms
    them. (Compiled, forward mode wants inputs that are no views of one tensor: Dynamo fails on plain products as well.)

    Args:
        x: the input.
        param: the weight, without stack axes.
        bias: added to every output.
        path: "factored", "merged" or "dense"; the cheapest by FLOPs for these shapes unless given.

    Numerics: a merged weight is formed in the widest dtype of base and factors, float32 at least, and rounded once to
    that of the product. It is formed again for the backward pass, of which only `x` and `param` are kept.
    """
    if path is not None and path not in get_args(Path):
        raise ValueError(f"`path` must be one of {', '.join(get_args(Path))}, got {path!r}")
    held, (b, a) = settled(param)
    layout, tensors = seen(held)
    codes = [tensor.detach() for tensor in tensors]
    autocast = autocast_now(x.device.type)
    dtype = autocast.dtype if autocast and autocast.enabled else x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if path is None:
        out_features, in_features = param.shape
        path = cheapest(tokens=prod(x.shape[:-1]), out_features=out_features, in_features=in_features, rank=b.shape[-1])
    if path == "factored":
        return _factored(x, b, a, bias, layout, *codes)
    output: Tensor = _merged(x, b, a, bias, path == "dense", layout, *codes)
    return output


def _factored(x: Tensor, b: Tensor, a: Tensor, bias: Tensor | None, layout: Layout, *codes: Tensor) -> Tensor:
    inner = functional.linear(x, a.to(x.dtype)) / a.shape[-2]
    is_ready = layout == Layout("plain", None) and codes[0].dtype == x.dtype
    output = functional.linear(x, codes[0]) if is_ready else _times_base(x, layout, *codes)
    output = output if bias is None else output + bias
    return output + functional.linear(inner, b.to(x.dtype))


def _merge(x: Tensor, b: Tensor, a: Tensor, base: Codes) -> Tensor:
    wide = widest(b.dtype, x.dtype, base.dtype if isinstance(base, Tensor) else torch.float32)
    return torch.addmm(dequantize(base, wide), b.to(wide), a.to(wide), alpha=1 / b.shape[-1]).to(x.dtype)


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
        with without_autocast(x.device.type):
            return functional.linear(x, _merge(x, b, a, whole_codes(layout, codes)), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, b, a, bias, ctx.is_dense, ctx.layout, *codes = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, b, a, *codes)
        ctx.save_for_forward(x, b, a, *codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, b, a, *codes = ctx.saved_tensors
        with without_autocast(x.device.type):
            rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
            grad_rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            gradients = _dense_gradients if ctx.is_dense else _low_rank_gradients
            weight = _merge(x, b, a, whole_codes(ctx.layout, codes))
            grad_x, grad_b, grad_a = gradients(grad_rows, rows, weight, b.to(x.dtype), a.to(x.dtype))
            grad_bias = grad_rows.sum(0) if ctx.has_bias else None
        rank = b.shape[-1]
        own = grad_x.reshape(x.shape), grad_b.to(b.dtype) / rank, grad_a.to(a.dtype) / rank, grad_bias
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
        in_dims = (*in_dims[:4], None, *in_dims[6:])
        return torch.vmap(_factored, in_dims=in_dims)(x, b, a, bias, layout, *codes), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, b_tangent: Any, a_tangent: Any, bias_tangent: Any, *_: Any) -> Any:
        x, b, a, *codes = ctx.saved_tensors
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
        return functional.linear(x, dequantize(whole_codes(layout, codes), x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layout, *codes = inputs
        ctx.save_for_backward(*codes)
        ctx.save_for_forward(*codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes = ctx.saved_tensors
        return grad @ dequantize(whole_codes(ctx.layout, codes), grad.dtype), None, *(None for _ in codes)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, layout: Layout, *codes: Tensor) -> tuple[Tensor, int]:
        return torch.vmap(_TimesBase.forward, in_dims=in_dims)(x, layout, *codes), 0

    @staticmethod
    def jvp(ctx: Any, x_tangent: Any, *_: Any) -> Any:
        return functional.linear(x_tangent, dequantize(whole_codes(ctx.layout, ctx.saved_tensors), x_tangent.dtype))


def _low_rank_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # One product for the gradients of the input and of `x @ a.T`: a narrow one leaves much of a processor idle.
    beside = torch.cat([weight, b], dim=1)
    grad_x, grad_inner = torch.split(grad @ beside, [a.shape[1], a.shape[0]], dim=1)
    return grad_x, grad.mT @ (x @ a.mT), (x.mT @ grad_inner).mT


def _dense_gradients(grad: Tensor, x: Tensor, weight: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = grad.mT @ x
    return grad @ weight, grad_weight @ a.mT, b.mT @ grad_weight

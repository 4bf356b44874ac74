"""What the factors cannot learn: the part of a gradient outside their span, folded into the base without any state."""

from collections.abc import Mapping
from math import sqrt
from typing import Literal, TypeAlias, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._types import Factors, LowRank, Param, Params
from dynlora_fn.bases._base import fold_base
from dynlora_fn.bases._types import Base, Deferred, Sharded
from dynlora_fn.optim._newton_schulz import norm, over_norm, with_even_spectrum
from dynlora_fn.optim._transform import Rate, rate_of

Normalize: TypeAlias = Literal["spectrum", "rows"]


def project_gradients(grads: Mapping[str, Tensor], params: Params) -> dict[str, Factors | Tensor]:
    """The gradients by what is trained, of gradients by the dense weights: those that `value_and_grad` gives.

    ``grad_b = G a.T / rank`` and ``grad_a = b.T G / rank``, with G the gradient at ``materialize(params)``.

    Args:
        grads: by name, of the shapes of the weights, stacks too.
        params: that the dense weights were made of. Those that are full-rank keep their gradient.

    Returns:
        By name `Factors` or a tensor, like `partition`'s trainable tree.

    Numerics: in float32 at least, rounded once to the dtype of the factors.
    """
    return {name: _projected(grads[name], param) for name, param in params.items()}


def _projected(grad: Tensor, param: Param) -> Factors | Tensor:
    if not isinstance(param, LowRank):
        return grad
    _refuse_sharded_factors(param)
    b, a = param.factors
    wide, rank = widest(grad.dtype, b.dtype, a.dtype), b.shape[-1]
    grad = grad.to(wide)
    grad_b, grad_a = grad @ a.to(wide).mT / rank, b.to(wide).mT @ grad / rank
    return Factors(b=grad_b.to(b.dtype), a=grad_a.to(a.dtype))


def _refuse_sharded_factors(param: LowRank) -> None:
    if param.factor_sharding:
        raise ValueError("`params` must have whole factors for gradients of dense weights, got sharded ones")


@overload
def compensate(params: LowRank, grads: Tensor, *, lr: Rate, normalize: Normalize = "spectrum") -> LowRank: ...
@overload
def compensate(
    params: Params, grads: Mapping[str, Tensor], *, lr: Rate | Mapping[str, Rate], normalize: Normalize = "spectrum"
) -> dict[str, Param]: ...
def compensate(
    params: LowRank | Params,
    grads: Tensor | Mapping[str, Tensor],
    *,
    lr: Rate | Mapping[str, Rate],
    normalize: Normalize = "spectrum",
) -> LowRank | dict[str, Param]:
    """Bases that have gone down the part of the gradient that lies outside the span of the factors; all else stays.

    With ``P_b``, ``P_a`` the projections on the columns of `b` and the rows of `a`, and G the gradient of the weight::

        rest = (1 - P_b) G (1 - P_a)                 what a step of the factors misses, to first order
        base = base - lr * normalized(rest)

    as Fira (arXiv:2410.01623, eq. 9) adds to a projected gradient what the projection discards, but without a look at
    the optimizer's state and with none of its own. "spectrum" makes all singular values of `rest` near
    ``sqrt(max(out, in))``, Muon's direction without its momentum; "rows" divides each row by the root mean square of
    its entries. Either way a change has the same size at every step, so that its growth needs no limit (Fira's does:
    what it adds grows with the gradient), and `lr` compares with AdamW's for the dense weight: were `rest` of full
    rank, the root mean square of the change's entries would be near `lr`.

    Cost: the gradients of the dense weights must be there: ``out * in`` numbers for each, where factors have
    ``rank * (out + in)``. Where data are parallel as many are reduced, as in full-rank training; called every k-th step
    alone, the k-th part of them. No moments are kept. The projections take about ``4 rank * out * in`` FLOPs, the
    spectrum ``20 * min(out, in) * out * in`` and more.

    Args:
        params: one weight, or weights by name. Those without a gradient, and full-rank ones, stay as they are.
        grads: of the dense weights, (*stack, out, in), as `value_and_grad` gives them at ``materialize(params)``. From
            the same ones `project_gradients` makes those of the factors.
        lr: learning rate for the dense weight: a number, or a 0-d tensor, or a dict of them by name.
        normalize: see above.

    Raises:
        ValueError: if a gradient does not fit its weight, or a quantized weight is not finite, then in a compiled step
            as well; it names the weight.

    Numerics: in float32 at least. The base is rounded once to its dtype: in plain bfloat16 much of a small change is
    lost, while a quantized base keeps it in its residual (see `quantize`). Vectors that depend on others, zeros above
    all, span nothing more. Rows of `rest` that are no more than rounding errors count as zeros. Singular values below
    a hundredth of all are brought up less.

    Example:
        >>> from torch import nn
        >>> from dynlora_fn import init, materialize, value_and_grad
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> def loss_fn(weights):
        ...     return weights["weight"].sum().square()
        >>> loss, grads = value_and_grad(loss_fn)(materialize(params))
        >>> factor_grads = project_gradients(grads, params)  # for the optimizer
        >>> bool(loss_fn(materialize(compensate(params, grads, lr=1e-3))) < loss)
        True
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"`normalize` must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
    if isinstance(params, LowRank):
        assert isinstance(grads, Tensor)
        return _compensate("param", params, grads, rate_of(lr, "param"), normalize)
    assert isinstance(grads, Mapping)
    new = dict(params)
    for name, param in params.items():
        if isinstance(param, LowRank) and name in grads:
            new[name] = _compensate(name, param, grads[name], rate_of(lr, name), normalize)
    return new


def _compensate(name: str, param: LowRank, grad: Tensor, lr: Rate, normalize: Normalize) -> LowRank:
    if grad.shape != param.shape:
        raise ValueError(f"`grads` must have shape {tuple(param.shape)} for {name!r}, got {tuple(grad.shape)}")
    _refuse_sharded_factors(param)
    with without_autocast(grad.device.type):
        rest = _outside_of(param.factors, grad)
        if normalize == "spectrum":
            change = with_even_spectrum(rest) * sqrt(max(param.shape[-2:]))
        else:
            change = over_norm(rest, dim=-1) * sqrt(param.shape[-1])
        base = _subtracted(param.base, lr * change, name=name)
    return param._replace(base=base)


def _subtracted(base: Base, change: Tensor, *, name: str) -> Base:
    if isinstance(base, Tensor):
        return (base - change).to(base.dtype)
    if isinstance(base, Deferred):  # there is room for switches alone to wait
        return base._replace(base=_subtracted(base.base, change, name=name))  # type: ignore[arg-type]
    if isinstance(base, Sharded):
        own = change[..., base.sharding.local_rows, :]
        return base._replace(base=_subtracted(base.base, own, name=name))  # type: ignore[arg-type]
    identity = torch.eye(change.shape[-1], dtype=change.dtype, device=change.device)
    return fold_base(base, -change, identity.expand(*change.shape[:-2], -1, -1), rank=1, name=name)


def _outside_of(factors: Factors, grad: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
    """``(1 - P_b) grad (1 - P_a)``, with zeros for rows of which rounding errors alone are left."""
    wide = widest(grad.dtype, factors.b.dtype, factors.a.dtype)
    grad, columns, rows = grad.to(wide), _basis(factors.b.to(wide)), _basis(factors.a.to(wide).mT)
    rest = grad
    for _ in range(2):  # the second time for the errors of the first, of which little else may be left
        rest = rest - columns @ (columns.mT @ rest)
        rest = rest - (rest @ rows) @ rows.mT
    least = norm(grad, dim=(-2, -1)) * (max(grad.shape[-2:]) * torch.finfo(wide).eps)
    return torch.where(norm(rest, dim=-1) <= least, 0, rest)


def _basis(columns: Float[Tensor, "*stack n rank"]) -> Float[Tensor, "*stack n rank"]:
    """Orthonormal columns that span what these do, and zeros for those that depend on the ones before."""
    orthonormal, triangle = torch.linalg.qr(columns)
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()  # (*stack, rank)
    least = sizes.amax(-1, keepdim=True) * (max(columns.shape[-2:]) * torch.finfo(columns.dtype).eps)
    return torch.where((sizes > least)[..., None, :], orthonormal, 0)

"""`compensate` and `project_gradients`: use gradients of dense weights."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._check import check_by_name, check_choice, check_rate, described
from dynlora_fn._core._check_trees import check_names, check_one_or_more, check_params
from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._tree import by_name, tensor_of
from dynlora_fn._core._types import (
    AnyFactors,
    Factors,
    FrozenTensor,
    LowRank,
    OneSidedFactors,
    Param,
    Params,
    ScaledFactors,
    ShardedFactors,
)
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.optim._polynomial import divide_by_norm, norm, orthogonalize
from dynlora_fn.optim._transform import Rate, check_rates, rate_of

Normalize: TypeAlias = Literal["spectrum", "rows"]


def project_gradients(grads: Mapping[str, Tensor], params: Params) -> dict[str, AnyFactors | Tensor]:
    """Convert gradients of dense weights to gradients of the trainable parameters.

    The result is equal to the gradients of the factors from `value_and_grad`. With G the gradient at
    ``materialize(params)``::

        grad_b = alpha / rank * G a.T,     grad_a = alpha / rank * b.T G

    Args:
        grads: The gradients of the dense weights by name, (*stack, out, in).
        params: The parameters from which the dense weights were materialized.

    Returns:
        The gradients by name, with the structure of `partition(params).trainable`. Full-rank parameters keep their
        gradient.

    Raises:
        TypeError: If a gradient is not a tensor of a floating dtype.
        ValueError: If names, shapes or devices of `grads` and `params` differ, or the factors of a weight are sharded.

    Numerics: Products are computed in float32, or in a wider dtype of gradient or factors, and rounded once to the
        dtype of the factors.

    Example:
        >>> import torch
        >>> param = LowRank(torch.zeros(2, 2), Factors(b=torch.ones(2, 1), a=torch.ones(1, 2)), torch.tensor(0))
        >>> project_gradients({"w": torch.eye(2)}, {"w": param})["w"].a
        tensor([[1., 1.]])
    """
    check_params("params", params)
    check_by_name("grads", grads, of="gradients")
    trained = {name: param for name, param in params.items() if not isinstance(param, FrozenTensor)}
    check_names("grads", [name for name in grads if name in trained or name not in params], "params", trained)
    return {name: _project_gradient(name, grads[name], param) for name, param in trained.items()}


def _project_gradient(name: str, grad: Tensor, param: Param) -> AnyFactors | Tensor:
    _check_gradient(name, grad, param)
    if not isinstance(param, LowRank):
        return grad
    factors, divisor = _whole_factors(name, param), param.divisor
    b, a = factors.b, factors.a
    wide = widest(grad.dtype, b.dtype, a.dtype)
    grad = grad.to(wide)
    with without_autocast(grad.device.type):
        grad_b = grad @ a.to(wide).mT / divisor
        if isinstance(factors, OneSidedFactors):
            return factors._replace(b=grad_b.to(b.dtype), a=())
        grad_a = b.to(wide).mT @ grad / divisor
    return factors._replace(b=grad_b.to(b.dtype), a=grad_a.to(a.dtype))


def _whole_factors(name: str, param: LowRank) -> Factors | ScaledFactors | OneSidedFactors:
    if isinstance(param.factors, ShardedFactors):
        refuse("dense gradients, sharded factors", name=name)
    return param.factors


@overload
def compensate(params: LowRank, grads: Tensor, *, lr: Rate, normalize: Normalize = "spectrum") -> LowRank: ...
@overload
def compensate(
    params: Params, grads: Mapping[str, Tensor], *, lr: Rate | Mapping[str, Rate], normalize: Normalize = "spectrum"
) -> dict[str, Param]: ...
def compensate(
    params: LowRank | Params,
    grads: Any,
    *,
    lr: Rate | Mapping[str, Rate],
    normalize: Normalize = "spectrum",
) -> LowRank | dict[str, Param]:
    """Move the bases along the part of the gradient outside the span of the factors.

    Only the bases change. With ``P_b`` and ``P_a`` the projections on the columns of `b` and the rows of `a`, and G the
    gradient of the weight::

        outside = (1 - P_b) G (1 - P_a)              what a step of the factors misses, to first order
        base = base - lr * normalized(outside)

    If only `b` is trained, ``outside = G (1 - P_a)``.

    Fira (arXiv:2410.01623, eq. 9) also adds the part of a gradient that a projection discards. Unlike Fira, this
    function does not use optimizer state, and its change has the same size at every step. The change of Fira grows with
    the gradient, so Fira has to limit its growth. `lr` is comparable to the learning rate of AdamW for the dense
    weight: if `outside` had full rank, the root mean square of the entries of the change would be near `lr`.

    Cost: the gradients of the dense weights must be computed. They have ``out * in`` entries for each weight, and
    gradients of factors have ``rank * (out + in)``. Data-parallel training has to reduce all of these entries, as
    full-rank training does, but only in the steps that call this function. The projections take about
    ``4 * rank * out * in`` FLOPs. "spectrum" takes at least ``20 * min(out, in) * out * in`` more.

    Args:
        params: One weight, or a dict of weights by name. Full-rank parameters, and weights without a gradient, are
            returned unchanged.
        grads: The gradients of the dense weights, (*stack, out, in), from `value_and_grad` at ``materialize(params)``.
            `project_gradients` converts them to gradients of the factors.
        lr: The learning rate for the dense weight: a number, a 0-d tensor, or a dict of either by name.
        normalize: How to scale the change. "spectrum" brings all singular values of `outside` near
            ``sqrt(max(out, in))``, as Muon does without momentum. "rows" divides each row by the root mean square of
            its entries.

    Returns:
        The weight, or the parameters by name, with new bases.

    Raises:
        TypeError: If a gradient is not a tensor of a floating dtype, or `lr` is not a number.
        ValueError: If `normalize` is unknown, or `lr` is negative or not finite. If a gradient belongs to no parameter,
            or differs from its weight in shape or device. If the factors of a weight are sharded. If a quantized weight
            is not finite, also in a compiled step. The message names the weight.
        NotImplementedError: If the change of a quantized weight requires a gradient or has a tangent.

    Numerics: Products are computed in float32 or a wider dtype of gradient or factors. The base is rounded once to its
        dtype. A plain bfloat16 base loses much of a small change, and a quantized base stores it in its residual (see
        `quantize`). Vectors that depend linearly on other vectors, such as zeros, do not enlarge the span. Rows of
        `outside` that contain only rounding errors are set to zero. Singular values below a hundredth of the norm end
        below the others. Derivatives are computed for factors of constant rank, and are zero for rows that are set to
        zero.

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
    check_choice("normalize", normalize, get_args(Normalize))
    check_one_or_more("params", params)
    if not isinstance(params, Mapping):
        check_rate("lr", lr)
        return _compensate("param", params, grads, rate_of(lr, "param"), normalize)
    check_by_name("grads", grads, of="gradients")
    by_name(grads, params, "grads")
    weights = {name: param for name, param in params.items() if isinstance(param, LowRank) and name in grads}
    check_rates("lr", lr, weights, known=params)
    new = {name: _compensate(name, param, grads[name], rate_of(lr, name), normalize) for name, param in weights.items()}
    return {**params, **new}


def _compensate(name: str, param: LowRank, grad: Tensor, lr: Rate, normalize: Normalize) -> LowRank:
    _check_gradient(name, grad, param)
    factors = _whole_factors(name, param)
    with without_autocast(grad.device.type):
        outside = _outside_span(factors, grad)
        if normalize == "spectrum":
            change = orthogonalize(outside) * sqrt(max(param.shape[-2:]))
        else:
            change = divide_by_norm(outside, dim=-1) * sqrt(param.shape[-1])
        base = as_base(param.base).add(-(lr * change), name=name)
    return param._replace(base=base)


def _check_gradient(name: str, grad: Any, param: Param) -> None:
    if not isinstance(grad, Tensor) or not grad.is_floating_point():
        raise TypeError(f"`grads` has {described(grad)} for {name!r}; use a tensor of a floating dtype")
    if grad.shape != param.shape:
        raise ValueError(
            f"`grads` must have the weight's shape {tuple(param.shape)} for {name!r}, got {tuple(grad.shape)}; "
            "pass the gradient of the dense weight"
        )
    device = param.factors.b.device if isinstance(param, LowRank) else tensor_of(param).device
    if grad.device != device:
        raise ValueError(f"`grads` has {name!r} on {grad.device}, but the weight is on {device}; move it")


def _outside_span(factors: AnyFactors, grad: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
    """Return ``(1 - P_b) grad (1 - P_a)``.

    If only `b` is trained, return ``grad (1 - P_a)``. Rows that contain only rounding errors become zero.
    """
    wide = widest(grad.dtype, factors.b.dtype, factors.a.dtype)
    grad, columns, rows = grad.to(wide), _projection(factors.b.to(wide)), _projection(factors.a.to(wide).mT)
    outside = grad
    for _ in range(2):  # the second pass removes rounding errors of the first, which may exceed the result
        if not isinstance(factors, OneSidedFactors):
            outside = outside - columns.left @ (columns.right @ outside)
        outside = outside - (outside @ rows.right.mT) @ rows.left.mT
    threshold = norm(grad, dim=(-2, -1)) * (max(grad.shape[-2:]) * torch.finfo(wide).eps)
    return torch.where(norm(outside, dim=-1) <= threshold, 0, outside)


class _Projection(NamedTuple):
    left: Float[Tensor, "*stack n rank"]
    right: Float[Tensor, "*stack rank n"]


def _projection(columns: Float[Tensor, "*stack n rank"]) -> _Projection:
    """Return two matrices whose product is the projection on the span of columns."""
    if is_attached(columns):  # the derivative of a QR decomposition is infinite if columns are linearly dependent
        return _Projection(columns, torch.linalg.pinv(columns))
    orthonormal = _orthonormal(columns)
    return _Projection(orthonormal, orthonormal.mT)


def _orthonormal(columns: Float[Tensor, "*stack n rank"]) -> Float[Tensor, "*stack n rank"]:
    """Return orthonormal columns with the same span.

    Columns that depend linearly on earlier columns become zero.
    """
    # Columns of zeros go last. QR gives them arbitrary directions, and would remove these from all later columns.
    is_zero = (columns == 0).all(-2, keepdim=True)  # (*stack, 1, rank)
    columns = columns.gather(-1, is_zero.to(torch.uint8).argsort(stable=True).expand(columns.shape))
    orthonormal, triangle = torch.linalg.qr(columns)
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()  # (*stack, rank)
    threshold = sizes.amax(-1, keepdim=True) * (max(columns.shape[-2:]) * torch.finfo(columns.dtype).eps)
    return torch.where((sizes > threshold)[..., None, :], orthonormal, 0)

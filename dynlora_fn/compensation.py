"""What the factors cannot learn: the part of a gradient outside their span, folded into the base without any state."""

from collections.abc import Mapping
from math import sqrt
from typing import Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dynlora_fn.base import widest, without_autocast
from dynlora_fn.bases import fold_base
from dynlora_fn.optim import Rate, rate_of
from dynlora_fn.types import Base, Deferred, Factors, LowRank, Param, Params, Trainable

Normalize: TypeAlias = Literal["spectrum", "rows"]
Gradient: TypeAlias = Tensor | Factors  # (*stack, out, in), or the two sides of a product that it is near to

# Five steps of x -> x (a + b x^2 + c x^4) bring every singular value from 1e-3 to 1 between 0.68 and 1.14: the
# coefficients of Muon (Jordan et al., 2024), chosen for the slope at zero.
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def project_gradients(grads: Mapping[str, Tensor], params: Params) -> dict[str, Factors | Tensor]:
    """The gradients by what is trained, of gradients by the dense weights: those that `value_and_grad` gives.

    ``grad_b = G a.T / rank`` and ``grad_a = b.T G / rank``, with G the gradient at ``materialize(params)``.

    Args:
        grads: by name, of the shapes of the weights, stacks too.
        params: that the dense weights were made of. Those that are full-rank keep their gradient.

    Returns:
        By name `Factors` or a tensor, in the dtypes of what they are gradients by: `partition`'s trainable tree.
    """
    return {name: _projected(grads[name], param) for name, param in params.items()}


def _projected(grad: Tensor, param: Param) -> Factors | Tensor:
    if not isinstance(param, LowRank):
        return grad
    b, a = param.factors
    wide, rank = widest(grad.dtype, b.dtype, a.dtype), b.shape[-1]
    grad_b, grad_a = grad.to(wide) @ a.to(wide).mT / rank, b.to(wide).mT @ grad.to(wide) / rank
    return Factors(b=grad_b.to(b.dtype), a=grad_a.to(a.dtype))


@overload
def compensate(params: LowRank, grads: Gradient, *, lr: Rate, normalize: Normalize = "spectrum") -> LowRank: ...
@overload
def compensate(
    params: Params,
    grads: Mapping[str, Gradient] | Trainable,
    *,
    lr: Rate | Mapping[str, Rate],
    normalize: Normalize = "spectrum",
) -> dict[str, Param]: ...
def compensate(
    params: LowRank | Params,
    grads: Gradient | Mapping[str, Gradient] | Trainable,
    *,
    lr: Rate | Mapping[str, Rate],
    normalize: Normalize = "spectrum",
) -> LowRank | dict[str, Param]:
    """Bases that have gone down the part of the gradient that lies outside the span of the factors; all else stays.

    With ``P_b``, ``P_a`` the projections on the columns of `b` and the rows of `a`, and G the gradient of the weight::

        rest = (1 - P_b) G (1 - P_a)                 what a step of the factors discards, to first order
        base = base - lr * normalized(rest)

    as Fira (arXiv:2410.01623, eq. 9) adds to a projected gradient what the projection discards, but with no state of
    an optimizer and no look at that of the factors. "spectrum" makes all singular values of `rest` ``sqrt(max(out, in))``
    (Muon's direction, without its momentum), "rows" divides each row by the root mean square of its entries. Either way
    the change has the same size at every step, so that there is no growth to be limited from one step to the next (Fira
    has to: what it adds is in proportion to the gradient), and `lr` compares with AdamW's for the dense weight: were
    `rest` of full rank, the root mean square of the change's entries would be `lr`.

    Cost: all of G must be there, out * in numbers a weight where AdamW on the factors needs rank * (out + in), and where
    data are parallel as many are reduced, as in full-rank training, but no moments are kept. Compensating each k-th step
    alone divides that traffic by k. A product of two thin matrices for G costs as many vectors as it has, `sketch`'s
    ``vectors * out`` numbers: see there.

    Args:
        params: one weight, or weights by name. Those without a gradient in `grads`, and full-rank ones, stay as they are.
        grads: of the weight, dense (*stack, out, in), or a product ``b @ a`` for it, as `sketch` makes it. Of
            full-rank parameters they are ignored.
        lr: learning rate for the dense weight, a number or a 0-d tensor, or a dict of them by name.
        normalize: see above.

    Raises:
        ValueError: if a gradient does not fit its weight, or a quantized weight is not finite, then in a compiled step as
            well; it names the weight.

    Numerics: in float32 or wider. The base is rounded once to its dtype: in plain bfloat16 most of a small change is
    lost; a quantized base keeps it in its residual (see `quantize`). Columns of `b` or rows of `a` that depend on those
    before them span nothing, zeros above all. Singular values below 1e-3 of the largest are brought up less than others.

    Example:
        >>> from torch import nn
        >>> from dynlora_fn import init, materialize, value_and_grad
        >>> params = init(nn.Linear(6, 4), rank=2, seed=0, targets=["weight"])
        >>> def loss_fn(weights):
        ...     return weights["weight"].sum().square()
        >>> _, grads = value_and_grad(loss_fn)(materialize(params))
        >>> factor_grads = project_gradients(grads, params)  # for the optimizer
        >>> float(loss_fn(materialize(compensate(params, grads, lr=1e-3)))) < float(loss_fn(materialize(params)))
        True
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"`normalize` must be one of {', '.join(get_args(Normalize))}, got {normalize!r}")
    if isinstance(params, LowRank):
        assert not isinstance(grads, Mapping)
        return _compensate("param", params, grads, rate_of(lr, "param"), normalize)
    assert isinstance(grads, Mapping)
    new = dict(params)
    for name, grad in grads.items():
        param = params.get(name)
        if isinstance(param, LowRank):
            new[name] = _compensate(name, param, grad, rate_of(lr, name), normalize)
    return new


def _compensate(name: str, param: LowRank, grad: Gradient, lr: Rate, normalize: Normalize) -> LowRank:
    _check_shape(name, param, grad)
    wide = widest(*(leaf.dtype for leaf in (*tree_leaves(grad), *param.factors)))
    with without_autocast(param.factors.b.device.type):
        rest, right = _rest(grad, param.factors, wide)
        change = _with_even_spectrum(rest) if normalize == "spectrum" else _with_even_rows(rest)
        size = max(param.shape[-2:]) if normalize == "spectrum" else param.shape[-1]
        base = _folded(param.base, -lr * sqrt(size) * change, right, name=name)
    return param._replace(base=base)


def _check_shape(name: str, param: LowRank, grad: Gradient) -> None:
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(grad)]
    *stack, out_features, in_features = param.shape
    vectors = shapes[0][-1]  # of a product
    wanted = [(*stack, out_features, vectors), (*stack, vectors, in_features)]
    if shapes != ([tuple(param.shape)] if isinstance(grad, Tensor) else wanted):
        rule = f"have shape {tuple(param.shape)}, or be a product of that shape,"
        raise ValueError(f"`grads` must {rule} for {name!r}, got {' and '.join(map(str, shapes))}")


class _Rest(NamedTuple):
    """``left @ right``, with orthonormal rows on the right, which change neither norms of rows nor singular values."""

    left: Tensor
    right: Tensor | None  # None: the identity


def _rest(grad: Gradient, factors: Factors, wide: torch.dtype) -> _Rest:
    """``(1 - P_b) G (1 - P_a)``, with zeros for rows in which nothing is left but rounding errors."""
    columns, rows = (_basis(leaf.to(wide)) for leaf in (factors.b, factors.a.mT))
    if isinstance(grad, Tensor):
        grad = grad.to(wide)
        left, right, size = _outside(_outside(grad, columns).mT, rows).mT, None, _norm(grad)
    else:
        b, a = (leaf.to(wide) for leaf in grad)
        orthonormal, triangle = torch.linalg.qr(_outside(a.mT, rows))
        left, right, size = _outside(b, columns) @ triangle.mT, orthonormal.mT, _norm(b) * _norm(a)
    least = size * torch.finfo(wide).eps * max(factors.b.shape[-2], factors.a.shape[-1])
    return _Rest(torch.where(_norm(left, dim=-1) <= least, 0, left), right)


def _norm(matrix: Tensor, dim: int | tuple[int, int] = (-2, -1)) -> Tensor:
    return matrix.square().sum(dim, keepdim=True).sqrt()


def _folded(base: Base, left: Tensor, right: Tensor | None, *, name: str) -> Base:
    if isinstance(base, Deferred):  # what waits are switches, and there is room for those alone
        return base._replace(base=_folded(base.base, left, right, name=name))  # type: ignore[arg-type]
    if right is None and isinstance(base, Tensor):
        return (base + left).to(base.dtype)
    if right is None:
        right = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device).expand(*left.shape[:-2], -1, -1)
    return fold_base(base, left, right, rank=1, name=name)


def _basis(columns: Tensor) -> Tensor:
    """Orthonormal columns that span what these do, (*stack, n, rank), and zeros for those that depend on others."""
    orthonormal, triangle = torch.linalg.qr(columns)
    sizes = triangle.diagonal(dim1=-2, dim2=-1).abs()  # (*stack, rank)
    least = sizes.amax(-1, keepdim=True) * max(columns.shape[-2:]) * torch.finfo(columns.dtype).eps
    return torch.where((sizes > least)[..., None, :], orthonormal, 0)


def _outside(columns: Tensor, basis: Tensor) -> Tensor:
    """Twice, since what is left of a column that lies almost inside is mostly rounding."""
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
    return columns


def _with_even_rows(rest: Tensor) -> Tensor:
    """Rows of norm 1, zeros apart."""
    return rest / _at_least_tiny(_norm(rest, dim=-1))


def _with_even_spectrum(rest: Tensor) -> Tensor:
    """The same singular vectors, all singular values near 1, zeros apart."""
    is_tall = rest.shape[-2] > rest.shape[-1]
    x = rest.mT if is_tall else rest
    x = x / _at_least_tiny(_norm(x))
    first, third, fifth = _NEWTON_SCHULZ
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x.mT if is_tall else x


def _at_least_tiny(norm: Tensor) -> Tensor:
    """So that zeros stay zeros."""
    return norm.clamp(min=torch.finfo(norm.dtype).tiny)

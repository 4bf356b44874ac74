"""The weight in float64 from its definition, and bounds on rounding errors."""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check import described
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.bases._base import StoredBase, as_base
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.bases._residual import residual_codes
from dynlora_fn.testing._compare import eps


def exact_weight(param: LowRank) -> Tensor:
    """Return the exact weight in float64: codes, residual, pending folds and factors.

    Products do not read the residual. `seen_weight` returns the weight that they use.

    Args:
        param: The weight, stacked or not.

    Returns:
        The weight (*stack, out, in).

    Example:
        >>> from dynlora_fn.testing import Shape, low_rank
        >>> exact_weight(low_rank(Shape(6, 4, 2))).shape
        torch.Size([6, 4])
    """
    _check_is_weight(param)
    return exact_base(as_base(param.base).folded) + sum(product(*pair) for pair in products(param))


def seen_weight(param: LowRank) -> Tensor:
    """Return the weight that products use, without the residual, in float64.

    Args:
        param: The weight, stacked or not.

    Returns:
        The weight (*stack, out, in).

    Example:
        >>> from dynlora_fn.testing import Shape, low_rank
        >>> param = low_rank(Shape(6, 4, 2))
        >>> bool((seen_weight(param) == exact_weight(param)).all())
        True
    """
    _check_is_weight(param)
    folded = as_base(as_base(param.base).folded)
    return folded.dequantize(torch.float64).double() + sum(product(*pair) for pair in products(param))


def _check_is_weight(param: Any) -> None:
    if not isinstance(param, LowRank):
        raise TypeError(f"`param` is {described(param)}; pass one LowRank")


def magnitude(param: LowRank) -> Tensor:
    """Return `exact_weight` with all terms positive.

    Rounding errors are relative to it, since terms may cancel.
    """
    absolute = [(Factors(b.abs(), a.abs()), abs(divisor)) for (b, a), divisor in products(param)]
    return exact_base(as_base(param.base).folded).abs() + sum(product(*pair) for pair in absolute)


def rounding(before: LowRank, after: LowRank, *, folds: int = 1) -> Tensor:
    """Return the largest error of each entry that folds may cause in an exact weight.

    The transform should keep the weight. An entry of the base is a sum of products in the widest dtype of the weight,
    at least float32. Each fold rounds it once, to the dtype of the base or of the residual. A residual is at most half
    a step of the codes. Pending folds are rounded to the dtype of the factors.

    Args:
        before: The weight before the transform.
        after: The weight after it.
        folds: How often the transform folds into the base.

    Returns:
        The bound in float64, in the shape of the weight.

    Example:
        >>> import dynlora_fn as dl
        >>> from dynlora_fn.testing import Shape, low_rank
        >>> param = low_rank(Shape(6, 4, 2))
        >>> bool(rounding(param, dl.merge(param)).max() < 1e-12)
        True
    """
    old, new = (as_base(param.base).folded for param in (before, after))
    work = widest(before.factors.b.dtype, after.factors.b.dtype, as_base(old).sum_dtype, as_base(new).sum_dtype)
    terms = 8 + 2 * sum(b.shape[-1] for param in (before, after) for (b, _), _ in products(param))
    total = magnitude(before) + magnitude(after) + _mixed_products(before, after)
    bound = folds * terms * eps(work) * total
    if any(as_base(param.base).pending_folds for param in (before, after)):
        bound = bound + folds * eps(after.factors.b.dtype) * total
    # Codes are scaled by the largest entry of their row or of the full weight.
    return bound + folds * sum(
        _fold_rounding(base, total.amax((-2, -1), keepdim=True) * eps(work)) for base in (old, new)
    )


def factor_rounding(before: LowRank, after: LowRank) -> Tensor:
    """Return the largest error that rounding may cause in the product of new factors.

    Each entry of a factor that has changed may be rounded twice to its dtype: when it is computed, and when it is
    stored. The computation (QR, an SVD, a rotation) rounds in float32 or a wider dtype, relative to the largest entries
    of the vector.

    Args:
        before: The weight before the transform.
        after: The weight after it.

    Returns:
        The bound in float64, in the shape of the weight.
    """
    old, new = Factors(*whole_factors(before)), Factors(*whole_factors(after))
    size = Factors(new.b.double().abs(), new.a.double().abs())
    is_kept = old.b.shape == new.b.shape and old.a.shape == new.a.shape
    changed = Factors(*(torch.where(x == y, 0, z) if is_kept else z for x, y, z in zip(old, new, size, strict=True)))
    divisor, dtype = abs(after.divisor), new.b.dtype
    rounded = product(Factors(changed.b, size.a), divisor) + product(Factors(size.b, changed.a), divisor)
    if not rounded.any():
        return rounded
    sums = (8 + 2 * new.b.shape[-1]) * eps(widest(dtype))
    return eps(dtype) * rounded + sums * (_largest_products(old, before.divisor) + _largest_products(new, divisor))


def _largest_products(factors: Factors, divisor: float) -> Tensor:
    """Return the sum over slots of the largest entry of a slot's product."""
    b, a = (leaf.double().abs() for leaf in factors)
    return (b.amax(-2, keepdim=True) @ a.amax(-1, keepdim=True)) / abs(divisor)


def half_step(base: StoredBase) -> Tensor:
    """Return the largest half step between a base's codes, (*stack, 1, 1).

    The step is relative to the largest entry. Without a residual only the rounded entry is known, which may have been
    rounded down, for example from 5 to 4 in mxfp4.
    """
    gathered = as_base(as_base(base).gather())
    layout, tensors = gathered.flatten()
    half, has_residual = (
        codes_from_tensors(layout.kind, tensors).half_step,
        residual_codes(gathered.residual) is not None,
    )
    return (
        gathered.exact(torch.float64).abs().amax((-2, -1), keepdim=True)
        / (1 if has_residual else 1 - half)
        * half
        * 1.01
    )


def exact_base(base: StoredBase) -> Tensor:
    """Return the base in float64, codes and residual together."""
    return as_base(base).exact(torch.float64)


def product(factors: tuple[Tensor, Tensor], divisor: float) -> Tensor:
    """Return ``b @ a / divisor`` in float64."""
    b, a = factors
    return torch.einsum("...or,...ri->...oi", b.double(), a.double()) / divisor


def _fold_rounding(base: StoredBase, slack: Tensor) -> Tensor:
    """Return the largest error of rounding a fold to the base or to its residual."""
    gathered = as_base(base).gather()
    if isinstance(gathered, Tensor):
        return eps(gathered.dtype) / 2 * gathered.double().abs() * 1.01
    step, residual = half_step(gathered) + slack, residual_codes(as_base(gathered).residual)
    return step if residual is None else step * residual.half_step * 1.01


def products(param: LowRank) -> list[tuple[tuple[Tensor, Tensor], float]]:
    """Return the trained and the pending factors, each with its divisor."""
    return [(whole_factors(param), param.divisor), *as_base(param.base).pending_folds]


def _mixed_products(before: LowRank, after: LowRank) -> Tensor | float:
    """Return the product of the sums of old and new factors, with positive terms.

    This is a bound of the products of old with new vectors, which a switch computes.
    """
    (b, a), (new_b, new_a) = whole_factors(before), whole_factors(after)
    if b.shape != new_b.shape:
        return 0.0
    pair = Factors(b.double().abs() + new_b.double().abs(), a.double().abs() + new_a.double().abs())
    return product(pair, abs(before.divisor))

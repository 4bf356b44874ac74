"""The weight in float64, computed from its definition, and the rounding errors that a transform may make."""

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.bases._base import dequantize, plain_dtype
from dynlora_fn.bases._formats import kind_of
from dynlora_fn.bases._ops import decode_exact
from dynlora_fn.bases._pending import without_pending
from dynlora_fn.bases._rowwise import Int8Codes
from dynlora_fn.bases._sharded import gather_base
from dynlora_fn.bases._types import Deferred, FoldedBase, LocalBase
from dynlora_fn.testing._compare import eps

# The largest half step of the codes, as a fraction of the largest entry of a weight (see `quantize`).
_HALF_STEPS = {"int8": 1 / 254, "float8": 2**-4, "nf4": 0.17, "nvfp4": 0.2, "mxfp4": 0.2}


def exact_weight(param: LowRank) -> Tensor:
    """Return the weight in float64: codes and residual, pending folds, and factors.

    Products do not read the residual. `seen_weight` is the weight that they use.

    Args:
        param: The weight, stacked or not.

    Example:
        >>> from dynlora_fn.testing import Shape, low_rank
        >>> exact_weight(low_rank(Shape(6, 4, 2))).shape
        torch.Size([6, 4])
    """
    return exact_base(without_pending(param)) + sum(product(*pair) for pair in _products(param))


def seen_weight(param: LowRank) -> Tensor:
    """Return the weight that products use, without the residual, in float64.

    Args:
        param: The weight, stacked or not.

    Example:
        >>> from dynlora_fn.testing import Shape, low_rank
        >>> param = low_rank(Shape(6, 4, 2))
        >>> bool((seen_weight(param) == exact_weight(param)).all())
        True
    """
    return dequantize(without_pending(param), torch.float64).double() + sum(product(*pair) for pair in _products(param))


def magnitude(param: LowRank) -> Tensor:
    """Return `exact_weight` with all terms positive. Rounding errors are relative to it, since terms may cancel."""
    absolute = [(Factors(b.abs(), a.abs()), rank) for (b, a), rank in _products(param)]
    return exact_base(without_pending(param)).abs() + sum(product(*pair) for pair in absolute)


def rounding(before: LowRank, after: LowRank, *, folds: int = 1) -> Tensor:
    """Return the largest error of each entry of the exact weight after a transform that keeps it.

    An entry of the base is a sum of products in the widest of the dtypes, float32 at least. Each fold rounds it once,
    to the dtype of the base or of the residual, and a residual is at most half a step of the codes. Pending folds are
    rounded to the dtype of the factors.

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
    old, new = without_pending(before), without_pending(after)
    work = widest(before.factors.b.dtype, after.factors.b.dtype, plain_dtype(old), plain_dtype(new))
    terms = 8 + 2 * sum(factors.b.shape[-1] for param in (before, after) for factors, _ in _products(param))
    total = magnitude(before) + magnitude(after) + _mixed_products(before, after)
    bound = folds * terms * eps(work) * total
    if any(isinstance(param.base, Deferred) for param in (before, after)):
        bound = bound + folds * eps(after.factors.b.dtype) * total
    # Codes are scaled by the largest entry of their row or of the full weight.
    return bound + folds * sum(
        _fold_rounding(base, total.amax((-2, -1), keepdim=True) * eps(work)) for base in (old, new)
    )


def half_step(base: FoldedBase) -> Tensor:
    """Return the largest half step of a base's codes, (*stack, 1, 1).

    Without a residual, only the rounded weight is known. Its largest entry may itself have been rounded down, for
    example from 5 to 4 in mxfp4.
    """
    full_base = gather_base(base)
    kind = "plain" if isinstance(full_base, Tensor) else kind_of(full_base.codes)
    half = _HALF_STEPS.get(kind, eps(torch.bfloat16) / 2)
    has_residual = not isinstance(full_base, Tensor) and tree_leaves(full_base.residual)
    return exact_base(full_base).abs().amax((-2, -1), keepdim=True) / (1 if has_residual else 1 - half) * half * 1.01


def exact_base(base: FoldedBase) -> Tensor:
    """Return the base in float64, codes and residual together."""
    full_base: LocalBase = gather_base(base)
    if isinstance(full_base, Tensor):
        return full_base.double()
    return decode_exact(full_base.codes, full_base.residual, torch.float64)


def product(factors: Factors, rank: int) -> Tensor:
    """Return ``b @ a / rank`` in float64."""
    b, a = factors
    return torch.einsum("...or,...ri->...oi", b.double(), a.double()) / rank


def _fold_rounding(base: FoldedBase, slack: Tensor) -> Tensor:
    """Return the largest error of rounding a fold to the dtype of the base or of its residual."""
    full_base = gather_base(base)
    if isinstance(full_base, Tensor):
        return eps(full_base.dtype) / 2 * full_base.double().abs() * 1.01
    step = half_step(full_base) + slack
    if not tree_leaves(full_base.residual):
        return step
    return step * (1 / 254 if isinstance(full_base.residual, Int8Codes) else eps(torch.bfloat16) / 2) * 1.01


def _products(param: LowRank) -> list[tuple[Factors, int]]:
    """Return the trained and the pending factors, each with the rank of the scale."""
    rank = param.factors.b.shape[-1]
    pending = [param.base.pending] if isinstance(param.base, Deferred) else []
    return [(factors, rank) for factors in (whole_factors(param), *pending)]


def _mixed_products(before: LowRank, after: LowRank) -> Tensor | float:
    """Return the products of old vectors with new ones, which a switch forms, with all terms positive."""
    (b, a), (new_b, new_a) = whole_factors(before), whole_factors(after)
    if b.shape != new_b.shape:
        return 0.0
    rank = b.shape[-1]
    pair = Factors(b.double().abs() + new_b.double().abs(), a.double().abs() + new_a.double().abs())
    return product(pair, rank)

"""The weight in float64, slowly and from the definition, and what a transform may round of it."""

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import Factors, LowRank
from dynlora_fn.bases._base import dequantize, plain_dtype
from dynlora_fn.bases._formats import kind_of
from dynlora_fn.bases._ops import decode_exact
from dynlora_fn.bases._pending import without_pending
from dynlora_fn.bases._rowwise import Int8Codes
from dynlora_fn.bases._sharded import gather_base
from dynlora_fn.bases._types import Deferred, FoldedBase, LocalBase
from dynlora_fn.testing._compare import eps

# Half a step of the codes at most, in shares of the largest number of a weight: see `quantize`.
_HALF_STEPS = {"int8": 1 / 254, "float8": 2**-4, "nf4": 0.17, "nvfp4": 0.2, "mxfp4": 0.2}


def exact_weight(param: LowRank) -> Tensor:
    """The weight that is never lost: codes and residual, all that waits, and the factors. Products do not see the
    residual; see `seen_weight`."""
    return kept(without_pending(param)) + sum(product(*pair) for pair in _products(param))


def seen_weight(param: LowRank) -> Tensor:
    """The weight that products see."""
    return dequantize(without_pending(param), torch.float64).double() + sum(product(*pair) for pair in _products(param))


def magnitude(param: LowRank) -> Tensor:
    """The same with all terms positive. Rounding errors are relative to this, since terms may cancel."""
    absolute = [(Factors(b.abs(), a.abs()), rank) for (b, a), rank in _products(param)]
    return kept(without_pending(param)).abs() + sum(product(*pair) for pair in absolute)


def rounding(before: LowRank, after: LowRank, *, folds: int = 1) -> Tensor:
    """How far the exact weight may be off after a transform that keeps it, entry by entry.

    Each entry of the base is a sum of products, formed in the widest of the dtypes, float32 at least, and rounded once
    for each fold: to the base's own dtype, or to that of the residual, which is no larger than half a step of codes.
    What waits is rounded to the factors' dtype.

    Args:
        before, after: one weight.
        folds: how often the transform folds into the base.
    """
    old, new = without_pending(before), without_pending(after)
    work = widest(before.factors.b.dtype, after.factors.b.dtype, plain_dtype(old), plain_dtype(new))
    terms = 8 + 2 * sum(factors.b.shape[-1] for param in (before, after) for factors, _ in _products(param))
    total = magnitude(before) + magnitude(after) + _mixed(before, after)
    bound = folds * terms * eps(work) * total
    if any(isinstance(param.base, Deferred) for param in (before, after)):
        bound = bound + folds * eps(after.factors.b.dtype) * total
    # Codes are scaled by their row or all of the weight: by the largest number there is in it.
    return bound + folds * sum(_rounded(base, total.amax((-2, -1), keepdim=True) * eps(work)) for base in (old, new))


def half_step(base: FoldedBase) -> Tensor:
    """Half a step of the base's codes at most, (*stack, 1, 1).

    Without a residual the weight that was quantized is not kept, whose largest number may have been rounded down
    itself: 5 to 4 in mxfp4.
    """
    held = gather_base(base)
    kind = "plain" if isinstance(held, Tensor) else kind_of(held.codes)
    half = _HALF_STEPS.get(kind, eps(torch.bfloat16) / 2)
    is_whole = not isinstance(held, Tensor) and tree_leaves(held.residual)
    return kept(held).abs().amax((-2, -1), keepdim=True) / (1 if is_whole else 1 - half) * half * 1.01


def kept(base: FoldedBase) -> Tensor:
    """Codes and residual together, in float64."""
    held: LocalBase = gather_base(base)
    if isinstance(held, Tensor):
        return held.double()
    return decode_exact(held.codes, held.residual, torch.float64)


def product(factors: Factors, rank: int) -> Tensor:
    """``b @ a / rank`` in float64."""
    b, a = factors
    return torch.einsum("...or,...ri->...oi", b.double(), a.double()) / rank


def _rounded(base: FoldedBase, slack: Tensor) -> Tensor:
    held = gather_base(base)
    if isinstance(held, Tensor):
        return eps(held.dtype) / 2 * held.double().abs() * 1.01
    step = half_step(held) + slack
    if not tree_leaves(held.residual):
        return step
    return step * (1 / 254 if isinstance(held.residual, Int8Codes) else eps(torch.bfloat16) / 2) * 1.01


def _products(param: LowRank) -> list[tuple[Factors, int]]:
    """All that is multiplied, with the rank of the scale."""
    rank = param.factors.b.shape[-1]
    waiting = [param.base.pending] if isinstance(param.base, Deferred) else []
    return [(factors, rank) for factors in (param.factors, *waiting)]


def _mixed(before: LowRank, after: LowRank) -> Tensor | float:
    """Old vectors with new ones, which meet in a switch."""
    (b, a), (new_b, new_a) = before.factors, after.factors
    if b.shape != new_b.shape:
        return 0.0
    rank = b.shape[-1]
    pair = Factors(b.double().abs() + new_b.double().abs(), a.double().abs() + new_a.double().abs())
    return product(pair, rank)

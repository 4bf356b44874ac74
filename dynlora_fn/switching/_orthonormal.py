"""Generate the vectors of a side that is not trained.

They are rows of an orthogonal matrix that the basis seed determines. The matrix is a discrete cosine transform whose
columns have random signs, as in randomized transforms (Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform",
2009). A row takes as many operations as it has entries. No QR decomposition is needed.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora_fn._core._torch import are_immediate
from dynlora_fn._core._types import LowRank, OneSidedFactors, SidePlan
from dynlora_fn.switching._basis import Request


def request_signs(seed: Int[Tensor, "*stack"], length: int) -> Request:
    """Return the request for random numbers whose signs the columns of a basis get."""
    return Request(seed, "a", torch.zeros(1, dtype=torch.int64, device=seed.device), length)


def orthonormal_rows(
    signs: Float[Tensor, "*stack 1 size"], indices: Int[Tensor, "*#stack count"]
) -> Float[Tensor, "*stack count size"]:
    """Return rows of the orthogonal matrix of a basis, in float64.

    Indices are taken modulo `size`, the number of rows::

        row[i, j] = sign[j] * sqrt(c / size) * cos(pi * (2 * j + 1) * i / (2 * size)),     c = 1 if i = 0 else 2

    Numerics: The argument of the cosine is reduced modulo a full turn in integers, so the reduction is exact.
    """
    size = signs.shape[-1]
    row = (indices % size)[..., None]
    column = torch.arange(size, device=signs.device)
    quarter_turns = (2 * column + 1) * row % (4 * size)
    cosines = torch.cos(quarter_turns.to(torch.float64) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    cosines = torch.where(row == 0, cosines * math.sqrt(0.5), cosines)
    return torch.where(signs < 0, -cosines, cosines)


def row_length(rank: int, alpha: float) -> float:
    """Return the length of the rows of `a`, ``sqrt(rank / abs(alpha))``.

    For a positive alpha, the product ``alpha / rank * b @ a`` is then ``sqrt(alpha / rank) * b @ Q`` with orthonormal
    rows of Q. So a step of AdamW has the same Frobenius norm at every rank.
    """
    return math.sqrt(rank / abs(alpha))


def indices_of(param: LowRank, plan: SidePlan) -> Int[Tensor, "*stack count"]:
    """Return the indices of the vectors that a plan of side a names.

    The rows of an `a` that is not trained must be distinct, whatever indices a plan names. So slot k gets only rows k,
    k + rank, k + 2 * rank and so on of the orthogonal matrix. The indices of `Schedule` give these rows in turn.
    """
    if not isinstance(param.factors, OneSidedFactors):
        return plan.indices
    rank, size = param.factors.b.shape[-1], param.factors.fixed.columns
    rows_of_slot = (size - 1 - plan.slots) // rank + 1
    return plan.slots + rank * (plan.indices // rank % rows_of_slot)


def check_orthogonal(name: str, factors: OneSidedFactors, plan: SidePlan) -> None:
    """Raise ValueError if the rows of `a` are not orthogonal after a switch.

    Rows that entered must be orthogonal to all other rows and have the same length. `muon` relies on this without a
    check. A traced step is not checked, because tracing cannot read values.
    """
    a, (rank, slots) = factors.a, (factors.b.shape[-1], plan.slots)
    if not are_immediate([a, slots]) or not slots.numel():
        return
    square, wide = row_length(rank, factors.fixed.alpha) ** 2, a.to(torch.float64)
    slots = slots.expand(*a.shape[:-2], slots.shape[-1])
    entered = wide.gather(-2, slots[..., None].expand(*slots.shape, a.shape[-1]))
    wanted = square * (slots[..., None] == torch.arange(rank, device=a.device)).to(wide.dtype)
    precision = 4 * torch.finfo(a.dtype).eps + a.shape[-1] * torch.finfo(wide.dtype).eps  # of entries, and of sums
    if bool(((entered @ wide.mT - wanted).abs() > square * precision).any()):
        raise ValueError(
            f"`incoming.a` of {name!r}, which trains only `b`, has vectors that are not orthogonal to the others"
            f" or not of length {math.sqrt(square):.6g}; leave `incoming` out, or pass the result of `candidates`"
        )

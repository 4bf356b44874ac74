"""The step of `muon` for low-rank weights that train only `b`."""

from math import sqrt

from dynlora_fn._core._types import OneSidedFactors
from dynlora_fn.optim._polynomial import Table, orthogonalize


def one_sided_direction(direction: OneSidedFactors, factors: OneSidedFactors, table: Table) -> OneSidedFactors:
    """Return the direction of `b` that orthogonalizes the change of the weight.

    With ``a = sqrt(rank / |alpha|) * Q`` and orthonormal rows of Q, for a positive alpha::

        alpha / rank * (sqrt(rank / alpha) * sqrt(max(out, in)) * orthogonalize(direction)) @ a
            = sqrt(max(out, in)) * orthogonalize(direction) @ Q

    A negative alpha changes the sign of the gradient of `b`, so the weight moves against its gradient too. No Gram
    matrix is inverted, so the step has a bounded norm without a limit.
    """
    (out_features, rank), (in_features, alpha) = factors.b.shape[-2:], (factors.fixed.columns, factors.fixed.alpha)
    length = sqrt(rank / abs(alpha)) * sqrt(max(out_features, in_features))
    return direction._replace(b=length * orthogonalize(direction.b, table))

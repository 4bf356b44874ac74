"""Muon for low-rank weights that train only `b`."""

from math import sqrt

from dynlora_fn._core._types import OneSidedFactors
from dynlora_fn.optim._polynomial import Table, orthogonalize


def one_sided_direction(direction: OneSidedFactors, factors: OneSidedFactors, table: Table) -> OneSidedFactors:
    """Return the direction of `b` for the orthogonalized dense gradient.

    The gradient is taken within the rows of `a`.

    With ``a = sqrt(rank / |alpha|) * Q`` and orthonormal rows of Q, for a positive alpha::

        alpha / rank * (sqrt(rank / alpha) * sqrt(max(out, in)) * orthogonalize(direction)) @ a
            = sqrt(max(out, in)) * orthogonalize(direction) @ Q

    The sign of a negative alpha is in the gradient of `b`, so that the weight moves against its gradient too. No Gram
    matrix is inverted, so a step needs no limit of its length.
    """
    (out_features, rank), (in_features, alpha) = factors.b.shape[-2:], (factors.fixed.columns, factors.fixed.alpha)
    length = sqrt(rank / abs(alpha)) * sqrt(max(out_features, in_features))
    return direction._replace(b=length * orthogonalize(direction.b, table))

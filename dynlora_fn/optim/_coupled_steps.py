"""The coupled steps of Muon: orthogonalize the change of a low-rank weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn.optim._factor_steps import Grams, Steps, inverse_triangle, whitening_of
from dynlora_fn.optim._polynomial import Table, divide_by_norm, identity_like, polynomial, trace, with_floor

# Singular values from 0.6 to 1.2 end within 0.005 of 1.
_AGAIN: Table = ((1.875, -1.25, 0.375),) * 2


def coupled_steps(grams: Grams, *, table: Table, projections: int) -> Steps:
    """Return the steps of LoRA-TSD (arXiv:2609.02734).

    To first order, factors can only change the weight within a tangent space. The direction is orthogonalized and
    projected back to this space, `projections` times. With orthonormal ``Q_b = b S_b.T``, ``Q_a = S_a a``::

        U = M_b S_a.T = Q_b C_u + E_u R_u,     V = S_b M_a = C_v Q_a + R_v.T E_v
        change = Q_b K11 Q_a + E_u K21 Q_a + Q_b K12 E_v,     K = [[(C_u + C_v) / 2, R_v.T], [R_u, 0]]

    Orthogonalizing K orthogonalizes the change, and setting the last block of K to zero projects it. The result has the
    steps of both factors that cause this change. Each factor contributes half of K11.
    """
    assert grams.mixed is not None  # computed for coupled steps
    whitening = whitening_of(grams.factors)
    of_a, of_b = whitening
    core = of_b @ grams.mixed @ of_a.mT  # C_u, C_v
    triangle, inverse = inverse_triangle(_remaining(grams, whitening, core))
    matrix = divide_by_norm(_blocks(core.mean(0), triangle[1], triangle[0].mT), dim=(-2, -1))
    for index in range(projections):
        inside, right, below = _split(polynomial(matrix, _AGAIN if index else table))
        matrix = _blocks(inside, right, below)
    in_basis = torch.cat([inside / 2, below], -2) @ of_a, of_b.mT @ torch.cat([inside / 2, right], -1)
    of_directions = torch.stack([inverse[0].mT @ below, right @ inverse[1]])
    of_factors = torch.stack([inside / 2 - core[0] @ of_directions[0], inside / 2 - of_directions[1] @ core[1]])
    return Steps(
        of_directions=whitening.mT @ of_directions @ whitening,
        squares=torch.stack([side.square().sum((-2, -1), keepdim=True) for side in in_basis]),
        of_factors=of_b.mT @ of_factors @ of_a,
    )


def _remaining(grams: Grams, whitening: Tensor, core: Tensor) -> Float[Tensor, "2 *stack rank rank"]:
    """Return ``R_u.T R_u`` and ``R_v.T R_v``.

    These are the Gram matrices of the parts of the directions outside `core`.
    """
    whitened = whitening @ with_floor(grams.directions) @ whitening.mT
    inside = torch.stack([core[0].mT @ core[0], core[1] @ core[1].mT])
    # The difference has the rounding errors of both terms, which nearly dependent vectors in a factor enlarge.
    square = whitening.square().sum((-2, -1), keepdim=True)
    condition = square * trace(grams.factors) / whitening.shape[-1] ** 2
    floor = with_floor(whitened, condition.sum(0)) - whitened
    # Directions may be zero. Factors may be zero too, and then the whitening is so large that a product is infinite.
    return whitened - inside + floor + torch.finfo(core.dtype).tiny * (1 + square) * identity_like(core)


def _blocks(inside: Tensor, right: Tensor, below: Tensor) -> Float[Tensor, "*stack twice_rank twice_rank"]:
    rows = [torch.cat([inside, right], -1), torch.cat([below, torch.zeros_like(below)], -1)]
    return torch.cat(rows, -2)


def _split(matrix: Float[Tensor, "*stack twice_rank twice_rank"]) -> tuple[Tensor, Tensor, Tensor]:
    rank = matrix.shape[-1] // 2
    return matrix[..., :rank, :rank], matrix[..., :rank, rank:], matrix[..., rank:, :rank]

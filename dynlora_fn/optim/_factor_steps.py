"""Muon's updates of factors, from Gram matrices of factors and directions."""

from collections.abc import Callable
from functools import partial
from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._collectives import all_reduce
from dynlora_fn._core._types import AnyFactors, ShardedFactors, alpha_of, divisor_of
from dynlora_fn.optim._polynomial import Table, identity_like, polynomial_of_gram, trace, with_floor
from dynlora_fn.optim._roots import square_root
from dynlora_fn.optim._transform import Rate

_DAMPING = 1e-3  # relative to the mean square of a factor's vectors; limits the steps of nearly dependent vectors
_MAX_RELATIVE_STEP = 0.1  # relative to the sum of the norms of both factors


class Grams(NamedTuple):
    """Products of the tall matrices of one weight: factors and directions.

    The first of each pair is for the step of `b`, and the second for the step of `a`.
    """

    factors: Float[Tensor, "2 *stack rank rank"]  # a a.T, b.T b: the Gram matrix of the other side
    directions: Float[Tensor, "2 *stack rank rank"]  # M_b.T M_b, M_a M_a.T
    mixed: Float[Tensor, "2 *stack rank rank"] | None = None  # b.T M_b, M_a a.T, for coupled steps


class Steps(NamedTuple):
    """The steps ``M_b X_b + b Y_b`` and ``X_a M_a + Y_a a``, as their small matrices."""

    of_directions: Float[Tensor, "2 *stack rank rank"]  # X_b, X_a
    squares: Float[Tensor, "2 *stack 1 1"]  # the squared Frobenius norms of the steps
    of_factors: Float[Tensor, "2 *stack rank rank"] | None = None  # Y_b, Y_a; None means zero


def factor_updates(
    directions: AnyFactors, factors: AnyFactors, rate: Rate, find_steps: Callable[[Grams], Steps], *, is_coupled: bool
) -> AnyFactors:
    """Return the updates of both factors, with limited norms.

    Each tall matrix is read twice, for its Gram matrix and for its product with a small matrix. The Gram matrices of
    sharded factors are summed over the processes. In that case this is collective: call it on every process.

    Args:
        directions: The directions M_b and M_a, which contain the momentum.
        factors: The factors.
        rate: The learning rate.
        find_steps: The function that computes the steps from the Gram matrices.
        is_coupled: Whether `find_steps` needs the mixed products of factors and directions.
    """
    sharding = factors.sharding if isinstance(factors, ShardedFactors) else None
    sum_over_processes = partial(all_reduce, group=sharding.group) if sharding else _identity
    b, a = factors.b.to(directions.b.dtype), factors.a.to(directions.a.dtype)
    products = [a @ a.mT, b.mT @ b, directions.b.mT @ directions.b, directions.a @ directions.a.mT]
    if is_coupled:
        products += [b.mT @ directions.b, directions.a @ a.mT]
    summed = sum_over_processes(torch.stack(products))
    grams = Grams(summed[:2], summed[2:4], summed[4:] if is_coupled else None)
    steps = find_steps(grams)
    shape = (sharding.rows, sharding.as_columns.rows) if sharding else (b.shape[-2], a.shape[-1])
    scale = abs(divisor_of(a.shape[-2], alpha_of(factors))) * sqrt(max(shape))
    for_b, for_a = _limit(grams, scale * square_root(steps.squares), rate) * (-rate * scale)
    update_b, update_a = (
        directions.b @ (for_b * steps.of_directions[0]),
        (for_a * steps.of_directions[1]) @ directions.a,
    )
    if steps.of_factors is not None:
        update_b = update_b + b @ (for_b * steps.of_factors[0])
        update_a = update_a + (for_a * steps.of_factors[1]) @ a
    return directions._replace(b=update_b, a=update_a)


def separate_steps(grams: Grams, *, table: Table) -> Steps:
    """Return the steps that orthogonalize each side separately.

    Each side is whitened with the Gram matrix of the other factor.
    """
    whitening = whitening_of(grams.factors)
    whitened = whitening @ with_floor(grams.directions) @ whitening.mT
    steps = whitening.mT @ polynomial_of_gram(whitened, table) @ whitening  # symmetric
    squares = (grams.directions @ steps * steps).sum((-2, -1), keepdim=True)
    return Steps(steps, squares.clamp(min=0))


def whitening_of(grams: Float[Tensor, "2 *stack rank rank"]) -> Float[Tensor, "2 *stack rank rank"]:
    """Return S for both factors, where ``S.T S`` inverts the damped Gram matrix."""
    size = trace(grams) / grams.shape[-1]
    # If a factor is zero, its damping is relative to the size of the other factor.
    damping = _DAMPING * (size + _DAMPING * size.flip(0))
    min_damping = torch.finfo(grams.dtype).eps ** 4  # keeps the sum invertible if both factors are zero
    return inverse_triangle(grams + (damping + min_damping) * identity_like(grams))[1]


def inverse_triangle(gram: Float[Tensor, "*stack n n"]) -> tuple[Tensor, Tensor]:
    """Return the lower triangular L with ``L L.T = gram``, and its inverse."""
    triangle: Tensor = torch.linalg.cholesky_ex(gram).L
    identity = identity_like(gram).expand_as(triangle)
    inverse: Tensor = torch.linalg.solve_triangular(triangle, identity, upper=False)
    return triangle, inverse


def _limit(grams: Grams, norms: Float[Tensor, "2 *stack 1 1"], rate: Rate) -> Float[Tensor, "2 *stack 1 1"]:
    """Return the factors of at most 1 that limit the norms of the updates."""
    max_norm = _MAX_RELATIVE_STEP * square_root(trace(grams.factors)).sum(0)
    factor: Tensor = max_norm / (rate * norms).clamp(min=torch.finfo(norms.dtype).tiny)
    return factor.clamp(max=1)


def _identity(tensor: Tensor) -> Tensor:
    return tensor

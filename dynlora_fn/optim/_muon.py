"""Muon for matrices and for low-rank weights."""

from collections.abc import Mapping
from functools import partial
from math import sqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import check_number
from dynlora_fn._core._collectives import all_reduce
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import (
    AnyFactors,
    OneSidedFactors,
    ShardedFactors,
    Trainable,
    alpha_of,
    divisor_of,
    is_factors,
)
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._freeze import freeze_counterparts
from dynlora_fn.optim._newton_schulz import orthogonalize, orthogonalize_shards
from dynlora_fn.optim._one_sided_muon import one_sided_direction
from dynlora_fn.optim._roots import square_root
from dynlora_fn.optim._sgd_lion import MomentumState, init_momentum
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, rate_of, refuse_decay_of_factors

_DAMPING = 1e-3  # of the mean square of a factor's vectors, so that nearly dependent vectors do not move further
_MAX_RELATIVE_STEP = 0.1  # of the sum of both factors' norms


def muon(*, momentum: float = 0.95, weight_decay: float = 0.0) -> Transform:
    """Create Muon, which orthogonalizes updates of matrices and of low-rank weights.

    A low-rank weight is updated through ``alpha / rank * b @ a``, not through each factor as a matrix. For a matrix
    (Jordan et al., 2024), with `orthogonalize` bringing all singular values near 1::

        mu = momentum * mu + grad,     direction = grad + momentum * mu
        updates = -lr * (sqrt(max(rows, columns)) * orthogonalize(direction) + weight_decay * matrix)

    If all directions have a gradient, the root mean square of the update's entries is near `lr`, as with AdamW. For
    factors, with ``S_a.T S_a = (a a.T)^-1`` and ``S_b.T S_b = (b.T b)^-1``::

        updates_b = -lr * rank / alpha * sqrt(max(out, in)) * orthogonalize(direction_b S_a.T) S_a
        updates_a = -lr * rank / alpha * sqrt(max(out, in)) * S_b.T orthogonalize(S_b direction_a)

    Then ``alpha / rank * updates_b @ a`` is the orthogonalized dense gradient within the rows of `a`. It does not
    depend on the lengths of the rows or the angles between them. So `lr` compares with the dense weight's learning
    rate, not with AdamW's for factors. Orthogonalizing `b` as a matrix would make a long step wherever a vector of `a`
    is long. LoRA-Muon (arXiv:2606.12921) takes the same step.

    Where only `b` is trained, ``a a.T`` is a multiple of the identity, and nothing is whitened (see `init`)::

        updates_b = -lr * sqrt(rank / alpha) * sqrt(max(out, in)) * orthogonalize(direction_b)

    A frozen vector does not move (see `freeze_counterparts`). Where both factors are trained, one update moves a factor
    by at most a tenth of the sum of both factors' Frobenius norms. Where `b` is zero, as at the start of LoRA or after
    a `merge`, the step of `a` would otherwise have no limit. Embedding, head and norms do better with AdamW: see
    `multi_transform`.

    Cost: one moment, and for factors about ``20 * rank**2 * (out + in)`` FLOPs for each update, or
    ``20 * rank**2 * out`` where only `b` is trained. For sharded factors four (rank, rank) matrices of each weight are
    all-reduced.

    Args:
        momentum: The decay rate of the moment, in [0, 1).
        weight_decay: The decoupled weight decay of full-rank tensors. A low-rank weight cannot be decayed through its
            factors: decay it with `dl.optim.decay`.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name. For sharded factors `update` is collective: call it on every
        process.

    Raises:
        ValueError: If `momentum` is not in [0, 1). In `init` and `update`, if `weight_decay` is not 0 and `trainable`
            has factors. In `update`, if a full-rank tensor has fewer than two axes or is complex, or `grads` does not
            have the names and shapes of `trainable`.

    Numerics: The moment and the updates are float32, or the parameter's dtype if that is wider. `orthogonalize` is a
    polynomial: singular values of at least a hundredth of the matrix's norm end between 0.68 and 1.14, smaller ones
    below. Gram matrices are damped by a thousandth of their mean diagonal.

    Example:
        >>> import torch
        >>> from dynlora_fn import Factors
        >>> optimizer = muon()
        >>> trainable = {"w": Factors(b=torch.eye(4, 2), a=torch.eye(2, 3))}
        >>> grads = {"w": Factors(b=torch.ones(4, 2), a=torch.ones(2, 3))}
        >>> updates, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.01)
        >>> updates["w"].b.shape
        torch.Size([4, 2])
    """
    momentum = check_number("momentum", momentum, least=0, below=1)
    weight_decay = check_number("weight_decay", weight_decay, least=0)

    @elementwise()
    def next_mu(mu: Any, grad: Any) -> Any:
        return momentum * mu + grad.to(mu.dtype)

    @elementwise()
    def direction_of(mu: Any, grad: Any) -> Any:
        return grad.to(mu.dtype) + momentum * mu

    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        refuse_decay_of_factors(weight_decay, trainable)
        check_state(opt_state, MomentumState, trainable)
        mu: Tree = next_mu(opt_state.mu, grads)
        directions: Tree = direction_of(mu, grads)
        updates: Tree = {}
        for name, leaf in trainable.items():
            rate, direction = rate_of(lr, name), directions[name]
            if isinstance(leaf, OneSidedFactors):
                direction = one_sided_direction(direction, leaf)
            elif is_factors(leaf):
                direction = _factor_directions(direction, leaf, rate)
            else:
                direction = _matrix_direction(name, direction)
            decayed = tree_map(lambda step, param: step + weight_decay * param.to(step.dtype), direction, leaf)
            updates[name] = tree_map(partial(_scale, rate), decayed)
        return Updates(updates, MomentumState(mu))

    return freeze_counterparts(Transform(partial(init_momentum, weight_decay=weight_decay), update))


def _scale(rate: Rate, direction: Tensor) -> Tensor:
    return -rate * direction


def _matrix_direction(name: str, direction: Tensor) -> Tensor:
    if direction.ndim < 2 or direction.is_complex():
        raise ValueError(
            f"`trainable` has {name!r} of shape {tuple(direction.shape)} and {direction.dtype}, which muon cannot "
            "orthogonalize; train it with another optimizer through `multi_transform`"
        )
    return orthogonalize(direction) * sqrt(max(direction.shape[-2:]))


def _factor_directions(directions: AnyFactors, factors: AnyFactors, rate: Rate) -> AnyFactors:
    """Return the directions of both factors. Their norms are limited.

    The Gram matrices of sharded factors are summed over the processes.
    """
    sharding = factors.sharding if isinstance(factors, ShardedFactors) else None
    b, a = factors.b.to(directions.b.dtype), factors.a.to(directions.a.dtype)
    sum_over_processes = partial(all_reduce, group=sharding.group) if sharding else _identity
    gram_b, gram_a = sum_over_processes(torch.stack([b.mT @ b, a @ a.mT]))  # (*stack, rank, rank)
    size_b, size_a = _mean_diagonal(gram_b), _mean_diagonal(gram_a)
    # A factor that is zero is damped by the other side's size.
    whitening_b = _whitening(gram_b, _DAMPING * (size_b + _DAMPING * size_a))
    whitening_a = _whitening(gram_a, _DAMPING * (size_a + _DAMPING * size_b))
    whitened_b, whitened_a = directions.b @ whitening_a.mT, whitening_b @ directions.a
    if sharding:
        step_b_transposed, step_a = orthogonalize_shards([whitened_b.mT, whitened_a], sum_over_processes)
        step_b, shape = step_b_transposed.mT, (sharding.rows, sharding.as_columns.rows)
    else:
        step_b, step_a = orthogonalize(whitened_b), orthogonalize(whitened_a)
        shape = b.shape[-2], a.shape[-1]
    scale = abs(divisor_of(a.shape[-2], alpha_of(factors))) * sqrt(max(shape))
    step_b, step_a = scale * step_b @ whitening_a, scale * whitening_b.mT @ step_a
    squares = [side.square().sum((-2, -1), keepdim=True) for side in (b, a, step_b, step_a)]
    norm_b, norm_a, norm_step_b, norm_step_a = square_root(sum_over_processes(torch.stack(squares)))
    max_norm = _MAX_RELATIVE_STEP * (norm_b + norm_a) / rate
    return directions._replace(
        b=_limit_norm(step_b, norm_step_b, max_norm), a=_limit_norm(step_a, norm_step_a, max_norm)
    )


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _whitening(
    gram: Float[Tensor, "*stack rank rank"], damping: Float[Tensor, "*stack 1 1"]
) -> Float[Tensor, "*stack rank rank"]:
    """Return S such that ``S.T S`` is the inverse of the damped `gram`."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    min_damping = torch.finfo(gram.dtype).eps ** 4  # keeps the sum invertible where both factors are zero
    triangle: Tensor = torch.linalg.cholesky_ex(gram + (damping + min_damping) * identity).L
    inverse: Tensor = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=False)
    return inverse


def _mean_diagonal(gram: Float[Tensor, "*stack rank rank"]) -> Float[Tensor, "*stack 1 1"]:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _limit_norm(matrix: Tensor, norm: Tensor, max_norm: Tensor) -> Tensor:
    """Scale a matrix of norm `norm` down to `max_norm` if it is longer."""
    return matrix * (max_norm / norm.clamp(min=torch.finfo(matrix.dtype).tiny)).clamp(max=1)

"""Muon, for matrices, and for products of factors as if they were the matrices that they make."""

from collections.abc import Mapping
from functools import partial
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._collectives import all_reduce
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Factors, Frozen, Sharding, Trainable
from dynlora_fn.bases._sharded import factor_shardings
from dynlora_fn.optim._freeze import count_down, zero_frozen
from dynlora_fn.optim._newton_schulz import with_even_spectra, with_even_spectrum
from dynlora_fn.optim._sgd_lion import MomentumState, check_decay, init_momentum
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, rate_of

_DAMPING = 1e-3  # of the mean square of a factor's vectors, so that nearly dependent ones move by no more
_LONGEST = 0.1  # of both factors' lengths


def muon(
    *, momentum: float = 0.95, weight_decay: float = 0.0, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Transform:
    """Muon (Jordan et al., 2024): every direction in which a weight can move moves by the same.

    A matrix, with `even` keeping its singular vectors and bringing all singular values near 1::

        mu = momentum * mu + grad,     direction = grad + momentum * mu
        updates = -lr * (sqrt(max(rows, columns)) * even(direction) + weight_decay * matrix)

    so that the root mean square of a change's entries is near `lr` as with AdamW, if all directions have a gradient.
    Factors move the weight ``b @ a / rank`` likewise, by each side as far as the other's span allows. With ``S_a`` and
    ``S_b`` such that ``S_a.T S_a = (a a.T)^-1`` and ``S_b.T S_b = (b.T b)^-1``::

        updates_b = -lr * rank * sqrt(max(out, in)) * even(direction_b S_a.T) S_a
        updates_a = -lr * rank * sqrt(max(out, in)) * S_b.T even(S_b direction_a)

    where ``updates_b @ a / rank`` is the even direction of the dense gradient within the rows of `a`, whatever the
    lengths of those and the angles between them. So `lr` compares with that of the dense weight, not with AdamW's for
    factors. Muon of `b` as a matrix would make a long step wherever a vector of `a` is long.

    Frozen vectors stand still, and no factor moves in one update by more than a tenth of what both are long together
    (Frobenius norms): where `b` is zero, as in a LoRA's beginning or after a `merge`, no step of `a` would else be long
    enough. Embedding, head and norms fare better with AdamW: see `multi_transform`. Other arguments of `update` are as
    in `adamw`.

    Cost: one moment, and for factors about ``20 * rank**2 * (out + in)`` FLOPs an update. Where they are sharded, four
    matrices (rank, rank) for each weight are reduced over the processes.

    Args:
        momentum: see above.
        weight_decay: likewise.
        frozen: the rest of the parameters, where factors are sharded: of matrices that processes have in parts, the
            Gram matrices are the sums of theirs. Only which they are is kept. It cannot be told from a share of a
            factor that it is none, so that without this every process would even out its own.

    Raises:
        ValueError: in `update`, if a leaf that is no factor has fewer than two axes.

    Numerics: in float32 at least. `even` is a polynomial: singular values from a hundredth of all together up end
    between 0.68 and 1.14, smaller ones below. Gram matrices are damped by a thousandth of their mean diagonal.
    """
    check_decay("momentum", momentum)
    shardings = factor_shardings(frozen or {})

    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        grads = zero_frozen(grads, opt_state.frozen_for)
        mu: Tree = tree_map(lambda m, g: momentum * m + g.to(m.dtype), opt_state.mu, grads)
        along: Tree = tree_map(lambda m, g: g.to(m.dtype) + momentum * m, mu, grads)
        updates: Tree = {}
        for name, leaf in trainable.items():
            rate, even = rate_of(lr, name), along[name]
            if isinstance(leaf, Factors):
                even = _even_factors(even, leaf, rate, opt_state.frozen_for[name], shardings.get(name))
            else:
                even = _even(name, even)
            decayed = tree_map(lambda own, param: own + weight_decay * param.to(own.dtype), even, leaf)
            updates[name] = tree_map(partial(_scaled, rate), decayed)
        return Updates(updates, MomentumState(mu, count_down(opt_state.frozen_for)))

    return Transform(init_momentum, update)


def _scaled(rate: Rate, even: Tensor) -> Tensor:
    return -rate * even


def _even(name: str, along: Tensor) -> Tensor:
    if along.ndim < 2:
        raise ValueError(f"`trainable` must be matrices to be trained by muon, got {tuple(along.shape)} for {name!r}")
    return with_even_spectrum(along) * sqrt(max(along.shape[-2:]))


def _even_factors(
    along: Factors, factors: Factors, rate: Rate, frozen_for: Factors, sharding: Sharding | None
) -> Factors:
    b, a = (side.to(own.dtype) for side, own in zip(factors, along, strict=True))
    total = partial(all_reduce, group=sharding.group) if sharding else _as_it_is
    gram_b, gram_a = total(torch.stack([b.mT @ b, a @ a.mT]))  # (*stack, rank, rank)
    size_b, size_a = _mean_diagonal(gram_b), _mean_diagonal(gram_a)
    # The other side's size, for a factor that is zero.
    of_b = _whitening(gram_b, _DAMPING * (size_b + _DAMPING * size_a))
    of_a = _whitening(gram_a, _DAMPING * (size_a + _DAMPING * size_b))
    rest_b, rest_a = along.b @ of_a.mT, of_b @ along.a
    if sharding:
        turned, even_a = with_even_spectra([rest_b.mT, rest_a], total)
        even_b, sizes = turned.mT, (sharding.rows, sharding.columns or 0)
    else:
        even_b, even_a = with_even_spectrum(rest_b), with_even_spectrum(rest_a)
        sizes = b.shape[-2], a.shape[-1]
    size = a.shape[-2] * sqrt(max(sizes))
    even_b, even_a = size * even_b @ of_a, size * of_b.mT @ even_a
    squares = [side.square().sum((-2, -1), keepdim=True) for side in (b, a, even_b, even_a)]
    own_b, own_a, length_b, length_a = total(torch.stack(squares)).sqrt()
    longest = _LONGEST * (own_b + own_a) / rate
    return Factors(
        b=torch.where(frozen_for.b > 0, 0, _at_most(even_b, length_b, longest)),
        a=torch.where(frozen_for.a > 0, 0, _at_most(even_a, length_a, longest)),
    )


def _as_it_is(whole: Tensor) -> Tensor:
    return whole


def _whitening(
    gram: Float[Tensor, "*stack rank rank"], damping: Float[Tensor, "*stack 1 1"]
) -> Float[Tensor, "*stack rank rank"]:
    """S with ``S.T S`` the inverse of the damped `gram`."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    least = torch.finfo(gram.dtype).eps ** 4  # where both factors are zero, and their gradients with them
    triangle: Tensor = torch.linalg.cholesky_ex(gram + (damping + least) * identity).L
    inverse: Tensor = torch.linalg.solve_triangular(triangle, identity.expand_as(triangle), upper=False)
    return inverse


def _mean_diagonal(gram: Float[Tensor, "*stack rank rank"]) -> Float[Tensor, "*stack 1 1"]:
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]


def _at_most(matrix: Tensor, length: Tensor, longest: Tensor) -> Tensor:
    """The matrix of that length, or as much of it as is no longer than the longest."""
    return matrix * (longest / length.clamp(min=torch.finfo(matrix.dtype).tiny)).clamp(max=1)

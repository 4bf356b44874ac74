"""Optimizers with one moment: stochastic gradient descent with momentum, and Lion."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Factors, Trainable
from dynlora_fn.optim._freeze import count_down, no_vectors_frozen, zero_frozen
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, rate_of, zero_moments


class MomentumState(NamedTuple):
    """Both trees mirror the trainable parameters; per vector as in `AdamWState`."""

    mu: Tree  # the moment, in float32 or the parameter's dtype if that is wider
    frozen_for: dict[str, Factors]  # int32, updates that each vector still sits out: per vector


def sgd(*, momentum: float = 0.9, weight_decay: float = 0.0) -> Transform:
    """Stochastic gradient descent that equals `torch.optim.SGD` where nothing is switched.

    ``mu = momentum * mu + grad + weight_decay * trainable`` and ``updates = -lr * mu``. Arguments of `update`, dtypes
    and frozen vectors are as in `adamw`.
    """
    check_decay("momentum", momentum)

    def direction(mu: Tensor, grad: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
        mu = momentum * mu + (grad + weight_decay * param)
        return mu, mu

    return _of_one_moment(direction)


def lion(*, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> Transform:
    """Lion (arXiv:2302.06675, algorithm 2): every entry moves by the learning rate.

    ``updates = -lr * (sign(beta1 * mu + (1 - beta1) * grad) + weight_decay * trainable)`` and
    ``mu = beta2 * mu + (1 - beta2) * grad``. Arguments of `update`, dtypes and frozen vectors are as in `adamw`.
    """
    for beta in betas:
        check_decay("betas", beta)

    def direction(mu: Tensor, grad: Tensor, param: Tensor) -> tuple[Tensor, Tensor]:
        sign = (betas[0] * mu + (1 - betas[0]) * grad).sign()
        return betas[1] * mu + (1 - betas[1]) * grad, sign + weight_decay * param

    return _of_one_moment(direction)


def check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be in [0, 1), got {value}")


def init_momentum(trainable: Trainable) -> MomentumState:
    """The state before the first update."""
    return MomentumState(zero_moments(trainable), no_vectors_frozen(trainable))


def _of_one_moment(direction: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Transform:
    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        grads = zero_frozen(grads, opt_state.frozen_for)

        def step(rate: Rate, mu: Tensor, grad: Tensor, param: Tensor) -> list[Tensor]:
            mu, along = direction(mu, grad.to(mu.dtype), param.to(mu.dtype))
            return [mu, -rate * along]

        mu, updates = {}, {}
        for name, leaf in trainable.items():
            both: Any = tree_map(partial(step, rate_of(lr, name)), opt_state.mu[name], grads[name], leaf)
            is_pair = isinstance(both, list)
            mu[name], updates[name] = both if is_pair else (Factors(*own) for own in zip(*both, strict=True))
        return Updates(updates, MomentumState(mu, count_down(opt_state.frozen_for)))

    return Transform(init_momentum, update)

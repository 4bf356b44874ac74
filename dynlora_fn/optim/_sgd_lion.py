"""`sgd` and `lion`: optimizers with one moment."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from dynlora_fn._core._check import check_number
from dynlora_fn._core._types import Trainable
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._complex import in_real_numbers
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._freeze import freeze_counterparts
from dynlora_fn.optim._leaves import spent
from dynlora_fn.optim._roles import register_state
from dynlora_fn.optim._transform import (
    Rate,
    Transform,
    Tree,
    Updates,
    check_betas,
    refuse_decay_of_factors,
    settings_of,
    zero_moments,
)


class MomentumState(NamedTuple):
    """The state of optimizers with one moment, inside their `FreezeState`.

    They are `sgd`, `lion`, `muon` and `normalized_sgd`. The field is a tree that mirrors the trainable parameters.
    """

    mu: Tree  # the moment, in float32, the parameter's dtype if that is wider, or the format that `muon` was passed


register_state(MomentumState, {"mu": "first_moment"})


def sgd(*, momentum: float = 0.9, weight_decay: float = 0.0) -> Transform:
    """Create stochastic gradient descent with momentum.

    Without switches it is equal to `torch.optim.SGD`::

        mu = momentum * mu + grad + weight_decay * trainable
        updates = -lr * mu

    A frozen vector does not move (see `freeze_counterparts`).

    Args:
        momentum: The decay rate of the moment, in [0, 1).
        weight_decay: The weight decay of full-rank tensors, which is added to the gradient. A low-rank weight cannot be
            decayed through its factors. Decay it with `dl.optim.decay`.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name.

    Raises:
        TypeError: If a setting is not a number.
        ValueError: If `momentum` is not in [0, 1), or `weight_decay` is negative. In `init` and `update`, if
            `weight_decay` is not 0 and `trainable` has factors. In `update`, if `grads` does not have the names and
            shapes of `trainable`.

    Numerics: The moment and the updates are in float32, or in the parameter's dtype if that is wider.

    Example:
        >>> import torch
        >>> optimizer, trainable = sgd(), {"w": torch.ones(2)}
        >>> grads = {"w": torch.tensor([2.0, -1.0])}
        >>> updates, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.5)
        >>> updates["w"]
        tensor([-1.0000,  0.5000])
    """
    momentum = check_number("momentum", momentum, least=0, below=1)
    weight_decay = check_number("weight_decay", weight_decay, least=0)

    def moment_step(mu: Any, grad: Any, param: Any) -> tuple[Any, Any]:
        mu = spent(momentum * mu) + (weight_decay * param + grad if weight_decay else grad)
        return mu, mu

    return _one_moment_transform(moment_step, weight_decay)


def lion(*, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> Transform:
    """Create Lion, which moves every entry by the learning rate.

    Without switches it follows arXiv:2302.06675, algorithm 2::

        updates = -lr * (sign(betas[0] * mu + (1 - betas[0]) * grad) + weight_decay * trainable)
        mu = betas[1] * mu + (1 - betas[1]) * grad

    A frozen vector does not move (see `freeze_counterparts`).

    Args:
        betas: The decay rates of the direction and of the moment, each in [0, 1).
        weight_decay: The decoupled weight decay of full-rank tensors. A low-rank weight cannot be decayed through its
            factors. Decay it with `dl.optim.decay`.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name.

    Raises:
        TypeError: If `betas` is not a pair, or a setting is not a number.
        ValueError: If one of `betas` is not in [0, 1), or `weight_decay` is negative. In `init` and `update`, if
            `weight_decay` is not 0 and `trainable` has factors. In `update`, if `grads` does not have the names and
            shapes of `trainable`.

    Numerics: The moment and the updates are in float32, or in the parameter's dtype if that is wider.

    Example:
        >>> import torch
        >>> optimizer, trainable = lion(), {"w": torch.ones(2)}
        >>> grads = {"w": torch.tensor([2.0, -1.0])}
        >>> updates, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.5)
        >>> updates["w"]
        tensor([-0.5000,  0.5000])
    """
    betas = check_betas(betas)
    weight_decay = check_number("weight_decay", weight_decay, least=0)

    def moment_step(mu: Any, grad: Any, param: Any) -> tuple[Any, Any]:
        sign = (spent(betas[0] * mu) + (1 - betas[0]) * grad).sign()
        return spent(betas[1] * mu) + (1 - betas[1]) * grad, sign + weight_decay * param if weight_decay else sign

    return _one_moment_transform(moment_step, weight_decay)


def init_momentum(trainable: Trainable, *, weight_decay: float) -> MomentumState:
    """Return the state before the first update."""
    refuse_decay_of_factors(weight_decay, trainable)
    return MomentumState(zero_moments(trainable))


def _one_moment_transform(moment_step: Callable[[Any, Any, Any], tuple[Any, Any]], weight_decay: float) -> Transform:
    """Return the optimizer that applies `moment_step` to every leaf.

    ``moment_step(mu, grad, param)`` returns the new moment and the direction. The update is ``-lr * direction``. The
    function is an elementwise formula (see `elementwise`).
    """

    @elementwise(results=2)
    def step(rate: Rate, mu: Any, grad: Any, param: Any) -> tuple[Any, Any]:
        mu, direction = moment_step(mu, grad.to(mu.dtype), param.to(mu.dtype))
        return mu, -rate * direction

    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        refuse_decay_of_factors(weight_decay, trainable)
        check_state(opt_state, MomentumState, trainable)

        mu, updates = step(opt_state.mu, grads, trainable, settings=settings_of(lr))
        return Updates(updates, MomentumState(mu))

    return in_real_numbers(freeze_counterparts(Transform(partial(init_momentum, weight_decay=weight_decay), update)))

"""`normalized_sgd`: gradient descent with normalized gradients."""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Literal

from torch import Tensor

from dynlora_fn._core._check import check_integer, check_number
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import count_axes
from dynlora_fn._core._types import Trainable
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._freeze import freeze_counterparts
from dynlora_fn.optim._polynomial import divide_by_norm
from dynlora_fn.optim._sgd_lion import MomentumState
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, rate_of, zero_moments


def normalized_sgd(*, axis: Literal[-1, -2] = -1, momentum: float = 0.0, weight_decay: float = 0.0) -> Transform:
    """Create SCALE's update, in which all outputs of a matrix have equal step sizes.

    It has no second moment, and without momentum no state. SCALE (arXiv:2506.16659) uses it for embedding and head,
    with momentum only for the head::

        mu = momentum * mu + (1 - momentum) * grad
        updates = -lr * (mu / rms(mu, axis) + weight_decay * matrix)

    Without weight decay, the root mean square of the entries of an update is `lr`, about as with AdamW. A row or column
    without a gradient does not move.

    Args:
        axis: The axis of the inputs: -1 for a linear layer (out, in), such as a head, and -2 for an embedding.
        momentum: The decay rate of the moment, in [0, 1). SCALE uses 0.9 for the head. With 0, no moment is stored.
        weight_decay: The decoupled weight decay.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name.

    Raises:
        TypeError: If `axis`, `momentum` or `weight_decay` is not a number.
        ValueError: If a setting is out of range. In `init` and `update`, if a parameter is not a real matrix or a stack
            of real matrices. Use another optimizer for factors and vectors, see `multi_transform`. In `update`, if
            `grads` does not have the names and shapes of `trainable`.

    Numerics: The moment and the updates are in float32, or in the parameter's dtype if that is wider. If the squares of
        a row leave the range of the dtype, its step is shorter or zero: in float32, for entries below 1e-19 or above
        1e18.

    Example: Embedding and head as SCALE trains them, norms with AdamW, factors with Muon.
        >>> import torch
        >>> from dynlora_fn.optim import adamw, multi_transform, muon
        >>> transforms = {
        ...     "embedding": normalized_sgd(axis=-2),
        ...     "head": normalized_sgd(momentum=0.9),
        ...     "norms": adamw(),
        ...     "factors": muon(),
        ... }
        >>> trainable = {"embedding": torch.ones(5, 2), "head": torch.ones(5, 2), "norm": torch.ones(2)}
        >>> labels = {"embedding": "embedding", "head": "head", "norm": "norms"}
        >>> optimizer = multi_transform(transforms, lambda name, _: labels.get(name, "factors"))
        >>> updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable, lr=0.1)
        >>> updates["head"][0]
        tensor([-0.1000, -0.1000])
    """
    along = _checked_axis(axis)
    momentum = check_number("momentum", momentum, least=0, below=1)
    weight_decay = check_number("weight_decay", weight_decay, least=0)

    def init(trainable: Trainable) -> MomentumState:
        _matrices(trainable)
        return MomentumState(zero_moments(trainable) if momentum else {})

    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        matrices, gradients = _matrices(trainable), _matrices(grads)
        check_state(opt_state, MomentumState, trainable if momentum else {})
        mu = _next_mu(momentum, opt_state.mu, gradients) if momentum else {}
        updates: Tree = {}
        for name, matrix in matrices.items():
            direction = mu[name] if momentum else gradients[name].to_dense().to(widest(matrix.dtype))
            step = divide_by_norm(direction, dim=along) * sqrt(matrix.shape[along])
            step = step + weight_decay * matrix.to(step.dtype) if weight_decay else step
            updates[name] = -rate_of(lr, name) * step
        return Updates(updates, MomentumState(mu))

    return freeze_counterparts(Transform(init, update))


def _next_mu(momentum: float, mu: Tree, grads: Mapping[str, Tensor]) -> Tree:
    return {name: momentum * old + (1 - momentum) * grads[name].to(old.dtype) for name, old in mu.items()}


def _checked_axis(axis: Any) -> int:
    checked: int = check_integer("axis", axis)
    if checked not in (-1, -2):
        raise ValueError(f"`axis` is {checked}; use -1 for the last axis or -2 for the one before it")
    return checked


def _matrices(trainable: Trainable) -> dict[str, Tensor]:
    """Return the parameters, or raise ValueError if one of them is not a real matrix."""
    matrices: dict[str, Tensor] = {}
    for name, leaf in trainable.items():
        if not isinstance(leaf, Tensor) or leaf.ndim - count_axes(name) < 2 or leaf.is_complex():
            kind = f"a tensor of {tuple(leaf.shape)} and {leaf.dtype}" if isinstance(leaf, Tensor) else "factors"
            raise ValueError(
                f"`trainable` has {name!r}, {kind}, but normalized_sgd trains only real matrices; train it with another"
                " optimizer through `multi_transform`"
            )
        matrices[name] = leaf
    return matrices

"""Updates of an optimizer over several steps."""

from typing import Any

from torch import Tensor

from dynlora_fn import apply_updates
from dynlora_fn.testing import normal

MOMENTUM, DECAY, LR = 0.9, 0.5, 0.125


def moved(transform: Any, grads: list[Any], trainable: Any) -> Any:
    state = transform.init(trainable)
    for step_grads in grads:
        updates, state = transform.update(step_grads, state, trainable, lr=LR)
        trainable = apply_updates(trainable, updates)
    return trainable


def noise(seed: int, leaf: Tensor) -> Tensor:
    return normal(seed, *leaf.shape)

"""What optimizers are made of, and what they share."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Trainable

Tree = dict[str, Any]
Rate: TypeAlias = Tensor | float


class Transform(NamedTuple):
    """An optimizer as a pair of pure functions: ``opt_state = init(trainable)`` and
    ``updates, opt_state = update(grads, opt_state, trainable, lr=lr)``."""

    init: Callable[..., Any]
    update: Callable[..., Any]


class Updates(NamedTuple):
    """What `update` of a `Transform` returns."""

    updates: Tree  # to be added, see `apply_updates`
    opt_state: Any  # of the structure, shapes and dtypes that were passed in


def zero_moments(trainable: Trainable) -> Tree:
    """Of the parameters' structure, in float32 or the parameter's dtype if that is wider."""

    def zero(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    moments: Tree = tree_map(zero, dict(trainable))
    return moments


def rate_of(lr: Rate | Mapping[str, Rate], name: str) -> Rate:
    return lr[name] if isinstance(lr, Mapping) else lr


def apply_updates(trainable: Trainable, updates: Trainable) -> Tree:
    """``trainable + updates``, rounded once to the parameters' dtype."""
    new: Tree = tree_map(lambda param, update: (param + update).to(param.dtype), dict(trainable), dict(updates))
    return new

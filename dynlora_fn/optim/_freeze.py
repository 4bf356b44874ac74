"""Freeze factor vectors for some updates by setting their gradients to zero."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._tree import map_leaf
from dynlora_fn._core._types import AnyFactors, Factors, Trainable, is_factors
from dynlora_fn.optim._transform import Tree


def no_vectors_frozen(trainable: Trainable) -> dict[str, Factors]:
    """Return counters of the remaining frozen updates of each vector, all zero."""
    return {name: Factors(*zero_counts(leaf)) for name, leaf in trainable.items() if is_factors(leaf)}


def count_down(frozen_for: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the counters after one update. They stop at zero."""
    remaining: dict[str, Factors] = tree_map(lambda leaf: (leaf - 1).clamp(min=0), dict(frozen_for))
    return remaining


def zero_frozen(grads: Trainable, frozen_for: Mapping[str, Factors]) -> Tree:
    """Return the gradients with zeros for frozen vectors."""
    return {
        name: map_leaf(_freeze, grad, frozen_for[name]) if is_factors(grad) else grad for name, grad in grads.items()
    }


def zero_counts(leaf: AnyFactors | Tensor) -> Factors | Tensor:
    """Return int32 zeros: one for each vector of factors, one for a full-rank tensor."""
    if isinstance(leaf, Tensor):
        return torch.zeros((), dtype=torch.int32, device=leaf.device)
    return Factors(
        b=torch.zeros_like(leaf.b[..., :1, :], dtype=torch.int32),
        a=torch.zeros_like(leaf.a[..., :1], dtype=torch.int32),
    )


def _freeze(grad: Tensor, frozen_for: Tensor) -> Tensor:
    return torch.where(frozen_for > 0, 0, grad)

"""Train complex parameters as pairs of real numbers, as `torch.optim` does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._types import Trainable
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, check_update


def in_real_numbers(inner: Transform) -> Transform:
    """Wrap an elementwise optimizer so that it gets only real tensors.

    `inner` and its state have a real tensor (*shape, 2) for each complex parameter (*shape). The update is complex.
    """

    def init(trainable: Trainable) -> Any:
        check_trainable("trainable", trainable)
        return inner.init(_as_real(trainable))

    def update(grads: Trainable, opt_state: Any, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]) -> Updates:
        if not (isinstance(trainable, Mapping) and any(map(_is_complex, trainable.values()))):
            result: Updates = inner.update(grads, opt_state, trainable, lr=lr)
            return result
        check_update(grads, trainable, lr)
        updates, opt_state = inner.update(_as_real(grads), opt_state, _as_real(trainable), lr=lr)
        new = {
            name: torch.view_as_complex(update) if _is_complex(trainable[name]) else update
            for name, update in updates.items()
        }
        return Updates(new, opt_state)

    return Transform(init, update)


def _as_real(tree: Mapping[str, Any]) -> Tree:
    # A gradient may be a conjugate that torch has not computed yet, which has no real view.
    return {name: torch.view_as_real(leaf.resolve_conj()) if _is_complex(leaf) else leaf for name, leaf in tree.items()}


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_complex()

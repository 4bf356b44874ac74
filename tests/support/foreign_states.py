"""States of optimizers of other libraries after two steps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn.testing import normal


def torch_state(kind: Any, **settings: Any) -> Callable[[Any], Any]:
    """Return a function that makes the state dict of one of torch's optimizers.

    It is in the order of the parameters.
    """

    def make(trainable: Any) -> Any:
        return stepped(kind(leaves_of(trainable), **{"lr": 0.1, **settings}))

    return make


def leaves_of(trainable: Any) -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in tree_leaves(trainable)]


def named_leaves(trainable: Any) -> dict[str, Tensor]:
    """Return the tensors by the names that `project_optimizer_state` reads.

    They are "w.b", "w.a" and "bias".
    """
    named: dict[str, Tensor] = {}
    for name, leaf in trainable.items():
        sides = {name: leaf} if isinstance(leaf, Tensor) else {f"{name}.b": leaf.b, f"{name}.a": leaf.a}
        named |= {side: tensor.clone().requires_grad_() for side, tensor in sides.items()}
    return named


def stepped(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict after two steps."""
    leaves = [leaf for group in optimizer.param_groups for leaf in group["params"]]
    for seed in range(2):
        for leaf in leaves:
            leaf.grad = normal(seed + leaf.numel(), *leaf.shape).to(leaf.dtype)
        optimizer.step(*([leaves[0].sum] if isinstance(optimizer, torch.optim.LBFGS) else []))
    return optimizer.state_dict()


def torchopt_state(name: str, **settings: Any) -> Callable[[Any], Any]:
    """Return a function that makes torchopt's state.

    It has lists of all leaves, in the order of sorted names.
    """

    def make(trainable: Any) -> Any:
        torchopt = pytest.importorskip("torchopt", reason="has no wheel for every version of Python")
        optimizer = getattr(torchopt, name)(0.1, **settings)
        state = optimizer.init(trainable)
        for seed in range(2):
            grads = tree_map(lambda leaf: normal(seed, *leaf.shape), trainable)  # noqa: B023, called at once
            _, state = optimizer.update(grads, state, params=trainable, inplace=False)
        return state

    return make

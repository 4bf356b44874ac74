"""Trees of parameters, gradients and plans for tests of optimizers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, Plan, SidePlan, partition
from dynlora_fn.optim import Transform, adamw, multi_transform
from dynlora_fn.testing import Shape, low_rank, normal

LR = 0.01


def decaying_adamw(decay: float, **options: Any) -> Transform:
    """Return AdamW that decays every tensor, factors too, as `torch.optim.AdamW` does."""
    transforms = {
        "factors": adamw(factor_decay=decay, **options),
        "tensors": adamw(weight_decay=decay, **options),
    }
    return multi_transform(transforms, lambda name, leaf: "tensors" if isinstance(leaf, Tensor) else "factors")


def some_trainable(dtype: torch.dtype = torch.float64, stack: tuple[int, ...] = ()) -> dict[str, Factors | Tensor]:
    params = {"w": low_rank(Shape(5, 6, 4), stack, factor_dtype=dtype), "bias": normal(1, 5, dtype=dtype)}
    return partition({**params, "scale": normal(2, dtype=dtype)}).trainable


def some_grads(trainable: Any, step: int) -> Any:
    """Return gradients of magnitudes 0.5 to 1.5.

    They bound the relative error of a moment's root.
    """
    signs = tree_map(lambda leaf: normal(100 + step, *leaf.shape).sign(), trainable)
    return tree_map(
        lambda leaf, sign: (sign * (0.5 + normal(step, *leaf.shape).sin().abs())).to(leaf.dtype), trainable, signs
    )


def one_switch(b: list[int], a: list[int], frozen_for: int, rank: int = 4) -> dict[str, Plan]:
    """Return a plan that is padded with an inactive entry of slot 0."""

    def side(slots: list[int]) -> SidePlan:
        active = torch.tensor([True] * len(slots) + [False])
        return SidePlan(torch.tensor([*slots, 0]), torch.arange(len(active)) + rank, active)

    return {"w": Plan(side(b), side(a), torch.tensor(frozen_for, dtype=torch.int32))}

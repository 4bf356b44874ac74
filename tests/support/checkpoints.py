"""States that tests write into checkpoints."""

from typing import Any

import torch
from torch import Tensor

import dynlora_fn as dl
from dynlora_fn.testing import normal

# Of a size from which moments in 8 bit are.
DENSE = {"layers.0.w": normal(0, 64, 64), "layers.1.w": normal(1, 64, 64), "norm": normal(2, 64)}


def params_of(rank: int = 32, **settings: Any) -> dict[str, Any]:
    return dl.init(DENSE, rank=rank, seed=0, targets=["*.w"], **settings)


def other(leaf: Any) -> Any:
    """Return a leaf of the same kind with another value."""
    if isinstance(leaf, Tensor):
        return torch.zeros_like(leaf)
    return leaf if leaf is None else type(leaf)()


def trained(rank: int = 32, optimizer: Any = None, **settings: Any) -> dict[str, Any]:
    params = params_of(rank, **settings)
    return {"params": params, "optimizer": (optimizer or dl.optim.adamw()).init(dl.partition(params).trainable)}


STATE, TEMPLATE = {"w": torch.arange(1000.0), "t": 3}, {"w": torch.zeros(1000), "t": 0}

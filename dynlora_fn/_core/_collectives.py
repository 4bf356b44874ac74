"""Rows of a base that lie on several processes, put together."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._torch import C10D
from dynlora_fn._core._types import Sharding


def gather(shard: Shaped[Tensor, "*stack rows in"], sharding: Sharding) -> Shaped[Tensor, "*stack out in"]:
    """The rows of all processes, bit for bit, by one functional all-gather: every process must ask for it.

    No gradient passes through it: what is frozen needs none, and so no reduce-scatter.
    """
    rows = shard.movedim(-2, 0)
    dtype = rows.dtype
    if dtype.itemsize == 1:
        rows = rows.view(torch.uint8)  # not every backend, nor every operation, knows the formats of eight bits
    missing = sharding.rows_per_process - len(rows)
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
    gathered = all_gather(rows, sharding.world_size, sharding.group)[: sharding.rows]
    return gathered.view(dtype).movedim(0, -2) if dtype.itemsize == 1 else gathered.movedim(0, -2)


def scatter(whole: Float[Tensor, "*stack out n"], sharding: Sharding) -> Float[Tensor, "*stack rows n"]:
    """The rows of this process of the sum over all of them, by one functional reduce-scatter."""
    rows = whole.movedim(-2, 0)
    missing = sharding.world_size * sharding.rows_per_process - len(rows)
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
    given = rows.contiguous()
    summed = C10D.reduce_scatter_tensor(given, "sum", sharding.world_size, sharding.group)
    own = sharding.local_rows
    summed = C10D.wait_tensor(summed)[: own.stop - own.start]
    return summed.movedim(0, -2)  # type: ignore[no-any-return]


def all_gather(tensor: Tensor, size: int, group: str) -> Tensor:
    """Those of all processes of a group, named, one behind the other along the first axis."""
    given = tensor.contiguous()  # has a name, so that it is not freed while gloo reads it (pytorch/pytorch#75529)
    gathered: Tensor = C10D.wait_tensor(C10D.all_gather_into_tensor(given, size, group))
    return gathered


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """The sum over all processes of a group, named."""
    reduced: Tensor = C10D.wait_tensor(C10D.all_reduce(tensor, "sum", group))
    return reduced

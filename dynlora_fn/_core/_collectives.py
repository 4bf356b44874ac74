"""All-gather, reduce-scatter and all-reduce as functions that return new tensors.

Dynamo can trace them. Every process of the group must call each function, in the same order.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._func_scope import is_in_func
from dynlora_fn._core._torch import C10D, forward_levels
from dynlora_fn._core._types import Sharding


def gather(shard: Shaped[Tensor, "*stack rows in"], sharding: Sharding) -> Shaped[Tensor, "*stack out in"]:
    """All-gather the rows of all processes.

    Every row keeps its bits. Callers refuse or detach a shard that requires a gradient, since bases are frozen and the
    backward pass needs no reduce-scatter. Collective: call it on every process.

    Args:
        shard: The rows of this process.
        sharding: The process group, and the number of rows on all processes.
    """
    rows = shard.movedim(-2, 0)
    dtype = rows.dtype
    if dtype.itemsize == 1:
        rows = rows.view(torch.uint8)  # some backends and operations do not support float8
    missing = sharding.rows_per_process - len(rows)
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
    gathered = all_gather(rows, sharding.world_size, sharding.group)[: sharding.rows]
    return gathered.view(dtype).movedim(0, -2) if dtype.itemsize == 1 else gathered.movedim(0, -2)


def scatter(tensor: Float[Tensor, "*stack out n"], sharding: Sharding) -> Float[Tensor, "*stack rows n"]:
    """Sum a tensor over all processes and return the rows of this process.

    This is one reduce-scatter. Collective: call it on every process.
    """
    rows = tensor.movedim(-2, 0)
    missing = sharding.world_size * sharding.rows_per_process - len(rows)
    if missing:
        rows = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing))
    refuse_derivatives(rows)
    summed = C10D.reduce_scatter_tensor(rows.contiguous(), "sum", sharding.world_size, sharding.group)
    local_rows = sharding.local_rows
    summed = C10D.wait_tensor(summed)[: local_rows.stop - local_rows.start]
    return summed.movedim(0, -2)  # type: ignore[no-any-return]


def all_gather(tensor: Tensor, size: int, group: str) -> Tensor:
    """Concatenate the tensors of all processes along the first axis.

    Args:
        tensor: The tensor of this process. Its shape must be the same on all processes.
        size: The number of processes.
        group: The name of the process group.
    """
    refuse_derivatives(tensor)
    gathered: Tensor = C10D.wait_tensor(C10D.all_gather_into_tensor(tensor.contiguous(), size, group))
    return gathered


def all_reduce(tensor: Tensor, group: str) -> Tensor:
    """Sum a tensor over all processes of the group with this name.

    Collective: call it on every process.
    """
    refuse_derivatives(tensor)
    reduced: Tensor = C10D.wait_tensor(C10D.all_reduce(tensor, "sum", group))
    return reduced


def weighted(tensor: Tensor, weight: float | Tensor) -> Tensor:
    """Multiply a term of a mean over processes by the weight of its process.

    With weight 0 the result is zero even where the term is NaN or infinite, as it may be on a process without data.

    Args:
        tensor: The term of this process.
        weight: The weight of this process, a number or a 0-d tensor.
    """
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, torch.zeros_like(tensor), tensor * weight)
    return tensor * weight if weight else torch.zeros_like(tensor)


def refuse_derivatives(tensor: Tensor) -> None:
    """Refuse a tensor that forward mode or `torch.func` differentiates.

    Collectives have gradient formulas for `torch.autograd` only.

    Raises:
        NotImplementedError: If the tensor is differentiated in forward mode or by `torch.func`.
    """
    if is_attached(tensor) and (is_in_func() or forward_levels()):
        raise NotImplementedError(
            f"a tensor of shape {tuple(tensor.shape)} that is sent to other processes is differentiated in forward mode"
            " or by `torch.func`, where a collective has no derivative; detach it, or use `torch.autograd`"
        )

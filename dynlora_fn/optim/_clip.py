"""Clip gradients by their global norm."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._collectives import all_reduce
from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import Frozen, Trainable
from dynlora_fn.bases._sharded import factor_shardings
from dynlora_fn.optim._transform import Tree


class Clipped(NamedTuple):
    """Store the result of `clip_by_global_norm`."""

    grads: Tree
    norm: Float[Tensor, ""]  # before clipping


def clip_by_global_norm(
    grads: Trainable, max_norm: float, *, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Clipped:
    """Scale the gradients so that their joint norm is at most `max_norm`.

    The result equals the one of `torch.nn.utils.clip_grad_norm_`::

        grads * min(1, max_norm / (norm + 1e-6))

    Clip before the switch. The gradients of frozen vectors count (arXiv:2406.06564's implementation).

    Args:
        grads: The gradients of the trainable parameters by name.
        max_norm: The largest norm that is left unchanged.
        frozen: The frozen parameters from `partition`, needed when factors are sharded. Each process then has a shard
            of their gradients, and the squared norms are summed over the processes (four bytes). Collective: call it
            on every process. Default None means that no factors are sharded.

    Returns:
        The clipped gradients, and their norm before clipping.

    Numerics: The norm is computed in float32, or in a gradient's dtype if that is wider. Each gradient is multiplied
    in its dtype.

    Example:
        >>> import torch
        >>> clipped = clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)
        >>> clipped.norm, clipped.grads["w"]
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    shardings = factor_shardings(frozen or {})
    squares = [_squares(leaf) for name, grad in grads.items() if name not in shardings for leaf in tree_leaves(grad)]
    sharded_squares = [_squares(leaf) for name in shardings for leaf in tree_leaves(grads[name])]
    if sharded_squares:
        (group,) = {sharding.group for sharding in shardings.values()}
        squares.append(all_reduce(torch.stack(sharded_squares).sum(), group))
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return Clipped(tree_map(lambda grad: grad * scale.to(grad.dtype), dict(grads)), norm)


def _squares(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()

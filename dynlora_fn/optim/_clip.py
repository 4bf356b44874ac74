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
    """What `clip_by_global_norm` returns."""

    grads: Tree
    norm: Float[Tensor, ""]  # before clipping


def clip_by_global_norm(
    grads: Trainable, max_norm: float, *, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Clipped:
    """Gradients whose norm, taken over all of them together, is at most `max_norm`.

    ``grads * min(1, max_norm / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_`. It comes before the switch, and
    the gradients of frozen vectors count (arXiv:2406.06564's implementation).

    Args:
        grads: of what is trained.
        max_norm: see above.
        frozen: the rest of the parameters, where factors are sharded: of their gradients each process has a share, and
            four bytes tell all of them of the others'.
    """
    shardings = factor_shardings(frozen or {})
    squares = [_squares(leaf) for name, grad in grads.items() if name not in shardings for leaf in tree_leaves(grad)]
    own = [_squares(leaf) for name in shardings for leaf in tree_leaves(grads[name])]
    if own:
        (group,) = {sharding.group for sharding in shardings.values()}
        squares.append(all_reduce(torch.stack(own).sum(), group))
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return Clipped(tree_map(lambda grad: grad * scale.to(grad.dtype), dict(grads)), norm)


def _squares(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()

"""`clip_by_global_norm`: limit the joint norm of all gradients."""

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_number, check_rate, described
from dynlora_fn._core._collectives import all_reduce
from dynlora_fn._core._torch import keystr, tree_flatten_with_path, tree_leaves, tree_map
from dynlora_fn._core._types import ShardedFactors, Trainable, is_factors
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._roots import square_root
from dynlora_fn.optim._transform import Tree


class Clipped(NamedTuple):
    """The result of `clip_by_global_norm`."""

    grads: Tree
    norm: Float[Tensor, ""]  # before clipping


def clip_by_global_norm(grads: Trainable, max_norm: float) -> Clipped:
    """Scale the gradients so that their joint norm is at most `max_norm`.

    The result is equal to the result of `torch.nn.utils.clip_grad_norm_`::

        grads * min(1, max_norm / (norm + 1e-6))

    Clip before the switch. The norm includes the gradients of frozen vectors, as in the implementation of
    arXiv:2406.06564.

    For sharded factors, each process has a shard of the gradients, and squared norms are summed over the processes
    (four bytes). In that case this is collective: call it on every process.

    Args:
        grads: The gradients of the trainable parameters by name.
        max_norm: The largest norm that is not clipped, at least 0. With infinity, the norm is only computed.

    Returns:
        The clipped gradients, and their norm before clipping as a 0-d tensor.

    Raises:
        TypeError: If a gradient is not a tensor of a floating or complex dtype, or `max_norm` is not a number.
        ValueError: If `max_norm` is negative or NaN.

    Numerics: The norm is computed in float32, or in a gradient's dtype if that is wider. Each gradient is multiplied
        in its dtype.

    Example:
        >>> import torch
        >>> clipped = clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)
        >>> clipped.norm, clipped.grads["w"]
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    max_norm = _checked_norm(grads, max_norm)
    nodes = tree_leaves(dict(grads), is_leaf=lambda node: isinstance(node, ShardedFactors))
    sharded = [node for node in nodes if isinstance(node, ShardedFactors)]
    tensors = [node for node in nodes if not isinstance(node, ShardedFactors)]
    squares = [*_squares(tensors)] if tensors else []
    squares_by_group: dict[str, list[Tensor]] = defaultdict(list)
    for node in sharded:
        squares_by_group[node.sharding.group] += [*_squares([node.b, node.a])]
    squares += [all_reduce(torch.stack(shards).sum(), group) for group, shards in squares_by_group.items()]
    norm = square_root(torch.stack(squares).sum()) if squares else torch.zeros(())
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if all(isinstance(leaf, Tensor) or is_factors(leaf) for leaf in grads.values()):
        return Clipped(_scaled(grads, settings=lambda _: (scale,)), norm)
    return Clipped(tree_map(lambda grad: grad * scale.to(grad.dtype), dict(grads)), norm)


def _checked_norm(grads: Any, max_norm: Any) -> Any:
    """Return the largest norm, and raise if it is none or a leaf is no gradient."""
    check_by_name("grads", grads, of="gradients")
    if not all(map(_is_gradient, tree_leaves(dict(grads)))):
        for path, leaf in tree_flatten_with_path(dict(grads))[0]:
            if not _is_gradient(leaf):
                raise TypeError(f"`grads` has {described(leaf)} at {keystr(path)}; use tensors of a floating dtype")
    if isinstance(max_norm, Tensor):
        return check_rate("max_norm", max_norm)
    return check_number("max_norm", max_norm, least=0, finite=False)


def _is_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


# With `allow_in_graph`, AOTAutograd traces this function instead of Dynamo, which takes longer for each operation.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _squares(grads: list[Tensor]) -> list[Tensor]:
    """Return the squared norms of gradients."""
    real = [torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad for grad in grads]
    return [grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum() for grad in real]


@elementwise()
def _scaled(scale: Tensor, grad: Any) -> Any:
    return grad * scale.to(grad.dtype)

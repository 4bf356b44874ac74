"""The model of the stateful machine, its dense counterpart, and its stacking."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import Factors, LowRank, Param
from dynlora_fn.bases._base import as_base
from dynlora_fn.testing._shadow import exact_base, half_step, product, products

LAYERS = ("layers.0.weight", "layers.1.weight")
STACK = "layers.*.weight"
Leaf = TypeVar("Leaf")


class Net(nn.Module):
    """Two layers of one shape, which can be stacked, and one of another shape.

    The model is linear, so bounds on rounding errors are sums of products.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)])
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def dense(weights: Mapping[str, Tensor], x: Tensor, cotangent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return ``(model(x) * cotangent).sum()`` and its gradients by dense weights."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    hidden = x @ leaves[LAYERS[0]].T @ leaves[LAYERS[1]].T
    value = ((hidden @ leaves["head.weight"].T + leaves["head.bias"]) * cotangent).sum()
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def magnitude(param: LowRank | None, weight: Tensor) -> Tensor:
    """Return the dense weight with all of its terms positive."""
    if param is None:
        return weight.abs()
    terms = [product(Factors(b.abs(), a.abs()), abs(divisor)) for (b, a), divisor in products(param)]
    base = as_base(param.base).folded
    return exact_base(base).abs() + half_step(base) + sum(terms)


def is_sharded(param: LowRank) -> bool:
    return as_base(param.base).sharding is not None


def has_pending(param: LowRank) -> bool:
    """Return whether the base is deferred, with vectors pending or not."""
    return bool(as_base(param.base).pending_folds)


def map_bases(change: Callable[[Any], Any], params: Mapping[str, Param]) -> dict[str, Param]:
    return {
        name: param._replace(base=change(param.base)) if isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def are_alike(params: Mapping[str, Any]) -> bool:
    """Return whether the layers are stored in tensors of the same shapes.

    A base in nvfp4 that was folded into while sharded has other shapes than before.
    """
    first, second = ([leaf.shape for leaf in tree_leaves(params[name])] for name in LAYERS)
    return first == second


def unstacked(tree: Mapping[str, Any]) -> dict[str, Any]:
    members = {name: tree_map(lambda leaf: leaf[index].clone(), tree[STACK]) for index, name in enumerate(LAYERS)}  # noqa: B023
    return {**members, **{name: leaf for name, leaf in tree.items() if name != STACK}}


def stacked(tree: Mapping[str, Leaf]) -> dict[str, Leaf]:
    stack = tree_map(lambda *leaves: torch.stack(leaves), *(tree[name] for name in LAYERS))
    return {STACK: stack, **{name: leaf for name, leaf in tree.items() if name not in LAYERS}}

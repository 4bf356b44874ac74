"""The model of the stateful machine, dense in float64 as well, and its parameters stacked and unstacked."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import Factors, LowRank, Param
from dynlora_fn.bases._pending import without_pending
from dynlora_fn.bases._types import Deferred, Sharded
from dynlora_fn.testing._shadow import half_step, kept, product

LAYERS = ("layers.0.weight", "layers.1.weight")
STACK = "layers.*.weight"
Leaf = TypeVar("Leaf")


class Net(nn.Module):
    """Two equal layers, which become a stack, and one of another shape: linear, so that bounds are sums of products."""

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
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    hidden = x @ leaves[LAYERS[0]].T @ leaves[LAYERS[1]].T
    value = ((hidden @ leaves["head.weight"].T + leaves["head.bias"]) * cotangent).sum()
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def magnitude(param: LowRank | None, weight: Tensor) -> Tensor:
    """The dense weight with all of its terms positive."""
    if param is None:
        return weight.abs()
    rank = param.factors.b.shape[-1]
    terms = [product(Factors(b.abs(), a.abs()), rank) for b, a in all_factors(param)]
    base = without_pending(param)
    return kept(base).abs() + half_step(base) + sum(terms)


def all_factors(param: LowRank) -> list[Factors]:
    return [param.factors, *([param.base.pending] if isinstance(param.base, Deferred) else [])]


def is_sharded(param: LowRank) -> bool:
    return isinstance(without_pending(param), Sharded)


def map_bases(change: Callable[[Any], Any], params: Mapping[str, Param]) -> dict[str, Param]:
    return {
        name: param._replace(base=change(param.base)) if isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def are_alike(params: Mapping[str, Any]) -> bool:
    """Whether the layers are held in tensors of the same shapes: nvfp4 that was folded into in shards is not as it was
    before."""
    first, second = ([leaf.shape for leaf in tree_leaves(params[name])] for name in LAYERS)
    return first == second


def unstacked(tree: Mapping[str, Any]) -> dict[str, Any]:
    members = {name: tree_map(lambda leaf: leaf[number].clone(), tree[STACK]) for number, name in enumerate(LAYERS)}  # noqa: B023
    return {**members, **{name: leaf for name, leaf in tree.items() if name != STACK}}


def stacked(tree: Mapping[str, Leaf]) -> dict[str, Leaf]:
    stack = tree_map(lambda *leaves: torch.stack(leaves), *(tree[name] for name in LAYERS))
    return {STACK: stack, **{name: leaf for name, leaf in tree.items() if name not in LAYERS}}

"""The products that a low-rank weight is multiplied by, and what they cost together with their gradients.

Full-rank training of a weight of d x d takes 6 d^2 FLOPs a token. A low-rank weight of rank r takes:

=========  ===================  ===============  ==========================================
path       FLOPs for a token    FLOPs in a step  what is formed
=========  ===================  ===============  ==========================================
factored   4 d^2 + 12 r d       none             ``x @ base.T + (x @ a.T) @ b.T / rank``
merged     4 d^2 +  8 r d       4 r d^2          the weight, and the gradients of the factors
dense      6 d^2                8 r d^2          the weight and its gradient, then projected
=========  ===================  ===============  ==========================================
"""

from functools import lru_cache
from math import prod
from typing import Literal, TypeAlias, get_args

import torch
from opt_einsum.helpers import flop_count

ContractionPath: TypeAlias = Literal["factored", "merged", "dense"]

_WEIGHT = ("or,ri->oi",)
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = "ni,oi->no", "no,oi->ni", "no,ni->oi"
_FACTOR_GRADIENTS = ("no,or->nr", "nr,ni->ri", "ni,ri->nr", "no,nr->or")
# Every product of a forward and backward pass: tokens n, in i, out o, rank r.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "full": (_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT),
    "factored": (_FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS, "nr,or->no", "nr,ri->ni"),
    # The weight is formed again in the backward pass, so that only one is alive at a time.
    "merged": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS),
    "dense": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT, "oi,ri->or", "or,oi->ri"),
}


def _unit_flops(product: str) -> tuple[int, str]:
    """Return the FLOPs of a product for sizes of 1, and the dimensions whose sizes multiply them.

    opt_einsum counts 2 FLOPs for each multiplication with addition.
    """
    dimensions = "".join(sorted(set(product) & set("nior")))
    return flop_count(dimensions, True, 2, dict.fromkeys(dimensions, 1)), dimensions


# Counted at import: Dynamo would trace the counting for each weight.
_UNIT_FLOPS = {path: [_unit_flops(product) for product in products] for path, products in PRODUCTS.items()}


def flops(path: str, *, tokens: int, out_features: int, in_features: int, rank: int) -> int:
    """Return the FLOPs of a forward and backward pass along a path, or of ``"full"`` rank."""
    sizes = {"n": tokens, "o": out_features, "i": in_features, "r": rank}
    return sum(count * prod([sizes[dimension] for dimension in dimensions]) for count, dimensions in _UNIT_FLOPS[path])


def cheapest_path(*, tokens: int, out_features: int, in_features: int, rank: int) -> ContractionPath:
    """Return the path with the fewest `flops`. Of equals, the first in `ContractionPath` is taken."""
    sizes = (tokens, out_features, in_features, rank)
    # Dynamo warns of a cache while it traces, and the sizes of a trace cannot be keys of one.
    is_static = not torch.compiler.is_dynamo_compiling() and all(type(size) is int for size in sizes)
    return _remembered_path(*sizes) if is_static else _cheapest_path(*sizes)


def _cheapest_path(tokens: int, out_features: int, in_features: int, rank: int) -> ContractionPath:
    sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "rank": rank}
    costs = {path: flops(path, **sizes) for path in get_args(ContractionPath)}
    best: ContractionPath = "factored"
    for path, cost in costs.items():  # comparisons instead of `min`, since Dynamo traces them for dynamic shapes
        if cost < costs[best]:
            best = path
    return best


_remembered_path = lru_cache(maxsize=4096)(_cheapest_path)

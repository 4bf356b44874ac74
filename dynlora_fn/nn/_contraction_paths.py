"""Which products a low-rank weight is multiplied by, and what they cost with their gradients.

Per token and weight of d x d at rank r, full-rank training takes 6 d^2 FLOPs:

=========  =========================================  ==========================================
path       FLOPs a token, and once a step             what is formed
=========  =========================================  ==========================================
factored   4 d^2 + 12 r d                             ``x @ base.T + (x @ a.T) @ b.T / rank``
merged     4 d^2 +  8 r d, and 4 r d^2                the weight, and the gradients of the factors
dense      6 d^2         , and 8 r d^2                the weight and its gradient, then projected
=========  =========================================  ==========================================
"""

from math import prod
from typing import Literal, TypeAlias, get_args

from opt_einsum.helpers import flop_count

ContractionPath: TypeAlias = Literal["factored", "merged", "dense"]

_WEIGHT = ("or,ri->oi",)
_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT = "ni,oi->no", "no,oi->ni", "no,ni->oi"
_FACTOR_GRADIENTS = ("no,or->nr", "nr,ni->ri", "ni,ri->nr", "no,nr->or")
# Every product of a forward and backward pass: tokens n, in i, out o, rank r.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "full": (_FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT),
    "factored": (_FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS, "nr,or->no", "nr,ri->ni"),
    # The weight is formed anew in the backward pass, so that no more than one is ever alive.
    "merged": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS),
    "dense": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT, "oi,ri->or", "or,oi->ri"),
}


def _counted(product: str) -> tuple[int, str]:
    """The FLOPs of a product for sizes of 1, by opt_einsum's count (2 for each multiplication and addition), and the
    dimensions whose sizes they grow with. Counted once, since Dynamo would trace the counting for each weight."""
    dimensions = "".join(sorted(set(product) & set("nior")))
    return flop_count(dimensions, True, 2, dict.fromkeys(dimensions, 1)), dimensions


_COUNTED = {path: [_counted(product) for product in products] for path, products in PRODUCTS.items()}


def flops(path: str, *, tokens: int, out_features: int, in_features: int, rank: int) -> int:
    """FLOPs of a forward and backward pass by a path, or by ``"full"`` rank."""
    sizes = {"n": tokens, "o": out_features, "i": in_features, "r": rank}
    return sum(count * prod([sizes[dimension] for dimension in dimensions]) for count, dimensions in _COUNTED[path])


def cheapest_path(*, tokens: int, out_features: int, in_features: int, rank: int) -> ContractionPath:
    """The path of the fewest `flops`. Of equals the one that comes first in `Path`."""
    sizes = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "rank": rank}
    costs = {path: flops(path, **sizes) for path in get_args(ContractionPath)}
    best: ContractionPath = "factored"
    for path, cost in costs.items():  # a comparison of each, which Dynamo traces where the shapes are dynamic
        if cost < costs[best]:
            best = path
    return best

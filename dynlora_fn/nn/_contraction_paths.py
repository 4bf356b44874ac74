"""The paths of a product with a low-rank weight, and their FLOPs with gradients.

Full-rank training of a (d, d) weight takes 6 d^2 FLOPs for each token. A low-rank weight of rank r takes:

=========  ===================  ===============  ==========================================
path       FLOPs for a token    FLOPs in a step  what is formed
=========  ===================  ===============  ==========================================
factored   4 d^2 + 12 r d       none             ``x @ base.T + (x @ a.T) @ b.T / rank``
merged     4 d^2 +  8 r d       4 r d^2          the weight, and the gradients of the factors
dense      6 d^2                8 r d^2          the weight and its gradient, then projected
=========  ===================  ===============  ==========================================

If only `b` is trained, the products for the gradient of `a` are omitted.
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
    # The backward pass forms the weight again, so that only one weight is alive at a time.
    "merged": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, *_FACTOR_GRADIENTS),
    "dense": (*_WEIGHT, *_WEIGHT, _FORWARD, _INPUT_GRADIENT, _WEIGHT_GRADIENT, "oi,ri->or", "or,oi->ri"),
}

# The products that only the gradient of `a` needs. On the factored path, "no,or->nr" is also for the input's gradient.
_FOR_GRADIENT_OF_A = {
    "factored": ("nr,ni->ri",),
    "merged": ("no,or->nr", "nr,ni->ri"),
    "dense": ("or,oi->ri",),
    "full": (),
}


def _unit_flops(product: str) -> tuple[int, str]:
    """Return the FLOPs of a product for sizes of 1, and its dimensions.

    The FLOPs for other sizes are this number times the product of the sizes. opt_einsum counts 2 FLOPs for a
    multiplication with addition.
    """
    dimensions = "".join(sorted(set(product) & set("nior")))
    return flop_count(dimensions, True, 2, dict.fromkeys(dimensions, 1)), dimensions


_DIMENSIONS = tuple(sorted({_unit_flops(product)[1] for products in PRODUCTS.values() for product in products}))


def _coefficients(products: tuple[str, ...]) -> tuple[int, ...]:
    """Return the FLOPs of products for sizes of 1, for each entry of `_DIMENSIONS`."""
    units = [_unit_flops(product) for product in products]
    return tuple(sum(count for count, dimensions in units if dimensions == wanted) for wanted in _DIMENSIONS)


# Counted at import, because Dynamo would trace the counting for each weight.
_COEFFICIENTS = {(path, False): _coefficients(products) for path, products in PRODUCTS.items()}
for _path, _omitted in _FOR_GRADIENT_OF_A.items():
    _products = tuple(product for product in PRODUCTS[_path] if product not in _omitted)
    _COEFFICIENTS[_path, True] = _coefficients(_products)


def flops(path: str, *, tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool = False) -> int:
    """Return the FLOPs of forward and backward pass for a path, or for ``"full"``."""
    return _total(path, _terms(tokens, out_features, in_features, rank), is_one_sided)


def cheapest_path(
    *, tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool = False
) -> ContractionPath:
    """Return the path with the fewest `flops`.

    In a tie, the first path in `ContractionPath` is returned.
    """
    sizes = (tokens, out_features, in_features, rank, is_one_sided)
    # Dynamo warns about `lru_cache` while it traces, and symbolic sizes cannot be its keys.
    is_static = not torch.compiler.is_dynamo_compiling() and all(type(size) in (int, bool) for size in sizes)
    return _remembered_path(*sizes) if is_static else _cheapest_path(*sizes)


def _cheapest_path(tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool) -> ContractionPath:
    terms = _terms(tokens, out_features, in_features, rank)
    costs = {path: _total(path, terms, is_one_sided) for path in get_args(ContractionPath)}
    best: ContractionPath = "factored"
    for path, cost in costs.items():  # comparisons instead of `min`, since Dynamo traces them for dynamic shapes
        if cost < costs[best]:
            best = path
    return best


_remembered_path = lru_cache(maxsize=4096)(_cheapest_path)


def _terms(tokens: int, out_features: int, in_features: int, rank: int) -> list[int]:
    sizes = {"n": tokens, "o": out_features, "i": in_features, "r": rank}
    return [prod([sizes[dimension] for dimension in dimensions]) for dimensions in _DIMENSIONS]


def _total(path: str, terms: list[int], is_one_sided: bool) -> int:
    return sum([count * term for count, term in zip(_COEFFICIENTS[path, is_one_sided], terms, strict=True)])

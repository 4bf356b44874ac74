"""The products with a low-rank weight, and what they cost with gradients.

Full-rank training of a weight of d x d takes 6 d^2 FLOPs a token. A low-rank weight of rank r takes:

=========  ===================  ===============  ==========================================
path       FLOPs for a token    FLOPs in a step  what is formed
=========  ===================  ===============  ==========================================
factored   4 d^2 + 12 r d       none             ``x @ base.T + (x @ a.T) @ b.T / rank``
merged     4 d^2 +  8 r d       4 r d^2          the weight, and the gradients of the factors
dense      6 d^2                8 r d^2          the weight and its gradient, then projected
=========  ===================  ===============  ==========================================

Where only `b` is trained, the products are omitted that only the gradient of `a` needs.
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

# Only for the gradient of `a`. The factored path needs the first one for the gradient of the input too.
_FOR_GRADIENT_OF_A = {
    "factored": ("nr,ni->ri",),
    "merged": ("no,or->nr", "nr,ni->ri"),
    "dense": ("or,oi->ri",),
    "full": (),
}


def _unit_flops(product: str) -> tuple[int, str]:
    """Return the FLOPs of a product for sizes of 1, and its dimensions.

    The sizes of these dimensions multiply the FLOPs. opt_einsum counts 2 FLOPs for each multiplication with addition.
    """
    dimensions = "".join(sorted(set(product) & set("nior")))
    return flop_count(dimensions, True, 2, dict.fromkeys(dimensions, 1)), dimensions


_DIMENSIONS = tuple(sorted({_unit_flops(product)[1] for products in PRODUCTS.values() for product in products}))


def _coefficients(products: tuple[str, ...]) -> tuple[int, ...]:
    """Return the FLOPs of products for sizes of 1, by dimensions.

    `_DIMENSIONS` lists them.
    """
    units = [_unit_flops(product) for product in products]
    return tuple(sum(count for count, dimensions in units if dimensions == wanted) for wanted in _DIMENSIONS)


# Counted at import: Dynamo would trace the counting for each weight.
_COEFFICIENTS = {(path, False): _coefficients(products) for path, products in PRODUCTS.items()}
for _path, _omitted in _FOR_GRADIENT_OF_A.items():
    _products = tuple(product for product in PRODUCTS[_path] if product not in _omitted)
    _COEFFICIENTS[_path, True] = _coefficients(_products)


def flops(path: str, *, tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool = False) -> int:
    """Return the FLOPs of both passes along a path, or of ``"full"`` rank."""
    return _total(path, _terms(tokens, out_features, in_features, rank), is_one_sided)


def cheapest_path(
    *, tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool = False
) -> ContractionPath:
    """Return the path with the fewest `flops`.

    Of equals, the first in `ContractionPath` is taken.
    """
    sizes = (tokens, out_features, in_features, rank, is_one_sided)
    # Dynamo warns of a cache while it traces, and the sizes of a trace cannot be keys of one.
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

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
from typing import Literal, TypeAlias

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


_DIMENSIONS = ("ino", "inr", "ior", "nor")  # the dimensions of all products


def _coefficients(products: tuple[str, ...]) -> tuple[int, ...]:
    """Return the FLOPs of products for sizes of 1, for each entry of `_DIMENSIONS`."""
    counts = dict.fromkeys(_DIMENSIONS, 0)
    for product in products:
        count, dimensions = _unit_flops(product)
        counts[dimensions] += count
    return tuple(counts.values())


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
    is_static = not torch.compiler.is_dynamo_compiling() and set(map(type, sizes)) <= {int, bool}
    return _remembered_path(*sizes) if is_static else _cheapest_path(*sizes)


def _cheapest_path(tokens: int, out_features: int, in_features: int, rank: int, is_one_sided: bool) -> ContractionPath:
    terms = _terms(tokens, out_features, in_features, rank)
    factored = _total("factored", terms, is_one_sided)
    merged = _total("merged", terms, is_one_sided)
    dense = _total("dense", terms, is_one_sided)
    if dense < factored and dense < merged:
        return "dense"
    return "merged" if merged < factored else "factored"


_remembered_path = lru_cache(maxsize=4096)(_cheapest_path)


# Both functions are without loops, because Dynamo traces them for each weight.
def _terms(tokens: int, out_features: int, in_features: int, rank: int) -> tuple[int, int, int, int]:
    """Return the products of the sizes for each entry of `_DIMENSIONS`."""
    dense, rank_tokens = in_features * tokens * out_features, tokens * rank
    return dense, in_features * rank_tokens, in_features * out_features * rank, out_features * rank_tokens


def _total(path: str, terms: tuple[int, int, int, int], is_one_sided: bool) -> int:
    ino, inr, ior, nor = terms
    dense, of_a, of_weight, of_b = _COEFFICIENTS[path, is_one_sided]
    return dense * ino + of_a * inr + of_weight * ior + of_b * nor

"""Add a low-rank change to a weight through its base."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import described
from dynlora_fn._core._check_trees import check_param
from dynlora_fn._core._types import LowRank
from dynlora_fn.bases._base import as_base


def fold(param: LowRank, b: Float[Tensor, "*stack out count"], a: Float[Tensor, "*stack count in"]) -> LowRank:
    """Add a product to a weight through its base.

    The weight changes by ``alpha / rank * b @ a``, with alpha and rank of `param`, and the factors do not change.
    `switch` and `merge` fold in this way::

        base += alpha / rank * b @ a

    A sharded base takes its rows of `b` and sends nothing.

    Args:
        param: The weight.
        b: The left factor of the change, with all rows of the weight and any number of vectors.
        a: The right factor of the change, with as many vectors.

    Returns:
        The weight with its new base.

    Raises:
        TypeError: If `param` is not a `LowRank`, or a factor is not a tensor of a floating dtype.
        ValueError: If shapes or devices do not fit the weight, a quantized weight is not finite, or a deferred base has
            no room for the vectors.
        NotImplementedError: If the base is quantized, and `b`, `a` or the base requires a gradient or has a tangent.

    Numerics: The sum is computed in float32 or a wider dtype. The base is then rounded once to its dtype, or quantized
    once (see `quantize`).

    Example:
        >>> import torch
        >>> from dynlora_fn import init, materialize
        >>> param = init({"w": torch.zeros(6, 4)}, rank=2, seed=0, targets=["w"])["w"]
        >>> new = fold(param, torch.ones(6, 1), torch.ones(1, 4))
        >>> torch.allclose(materialize(new), torch.full((6, 4), 0.5), atol=1e-6)
        True
    """
    _check_types(param, b, a)
    *stack, out_features, in_features = param.shape
    count = b.shape[-1:].numel()
    for name, factor, shape in (("b", b, (*stack, out_features, count)), ("a", a, (*stack, count, in_features))):
        if factor.shape != shape:
            raise ValueError(
                f"`{name}` has shape {tuple(factor.shape)}; a product for a weight of shape {tuple(param.shape)} needs"
                f" {shape} for the {count} vectors of `b`"
            )
    base = as_base(param.base).fold(b, a, divisor=param.divisor, name="param")
    return param._replace(base=base)


def _check_types(param: Any, b: Any, a: Any) -> None:
    if not isinstance(param, LowRank):
        raise TypeError(f"`param` is {described(param)}; pass one LowRank")
    check_param("param", "param", param)
    for name, factor in (("b", b), ("a", a)):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            raise TypeError(f"`{name}` is {described(factor)}; use a tensor of a floating dtype")
        if factor.device != param.factors.b.device:
            raise ValueError(f"`{name}` is on {factor.device}, but the weight on {param.factors.b.device}; move it")

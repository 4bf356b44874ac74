"""`defer` and `fold_pending`: collect folds, and fold them into the base later."""

from typing import overload

from dynlora_fn._core._check import check_integer
from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._types import Factors, LowRank, Param, Params, ShardedFactors
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._deferred import Deferred, Divisor
from dynlora_fn.bases._refusals import refuse


@overload
def defer(params: LowRank, *, vectors: int) -> LowRank: ...
@overload
def defer(params: Params, *, vectors: int) -> dict[str, Param]: ...
def defer(params: LowRank | Params, *, vectors: int) -> LowRank | dict[str, Param]:
    """Defer the folds of `switch` until `fold_pending`.

    The weight does not change. A switch appends its difference to the pending vectors instead of folding it::

        weight = base + pending.b @ pending.a / divisor + alpha / rank * b @ a

    The divisor is the ``rank / alpha`` that the weight had when it was deferred, merged or resized. Forward and
    backward pass treat pending vectors as additional slots, at the same cost as trained slots. If there is no room for
    a switch, the oldest vectors are folded, so no difference is lost. To fold only with `fold_pending`, pass `vectors`
    with room for n switches, and call `fold_pending` after every n switches.

    Args:
        params: One weight, or weights by name. Tensors are returned unchanged.
        vectors: The number of vectors that can be pending. A switch adds one vector for each entry of its plan, on both
            sides, active or not.

    Returns:
        The same weights, each with a `Deferred` base.

    Raises:
        TypeError: If `vectors` is not an integer, or `params` is neither a weight nor a dict of parameters.
        ValueError: If `vectors` is less than 1, a weight is deferred already, or its factors are sharded.

    Numerics: Pending vectors have the dtype of the factors. In float32 or wider they are exactly the vectors that a
        fold would use. In bfloat16 they are rounded.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32), rank=4, seed=0, targets=["weight"], base="int8")
        >>> deferred = dl.bases.defer(params, vectors=8)
        >>> deferred["weight"].base.pending.b.shape
        torch.Size([32, 8])
        >>> torch.allclose(dl.materialize(deferred)["weight"], dl.materialize(params)["weight"], atol=1e-6)
        True
    """
    vectors = check_integer("vectors", vectors, least=1)
    check_one_or_more("params", params)
    if isinstance(params, LowRank):
        return _defer("param", params, vectors)
    return {
        name: _defer(name, param, vectors) if isinstance(param, LowRank) else param for name, param in params.items()
    }


def _defer(name: str, param: LowRank, vectors: int) -> LowRank:
    if as_base(param.base).pending_folds:
        refuse("defer, deferred", name=name)
    if isinstance(param.factors, ShardedFactors):
        refuse("defer, sharded factors", name=name)
    b, a, shape = param.factors.b, param.factors.a, param.shape
    pending = Factors(b.new_zeros((*shape[:-1], vectors)), a.new_zeros((*shape[:-2], vectors, shape[-1])))
    return param._replace(base=Deferred(param.base, pending, Divisor(param.divisor)))


@overload
def fold_pending(params: LowRank) -> LowRank: ...
@overload
def fold_pending(params: Params) -> dict[str, Param]: ...
def fold_pending(params: LowRank | Params) -> LowRank | dict[str, Param]:
    """Fold the pending vectors into the bases.

    The weight does not change, except for one rounding of the base. The bases stay deferred, with no vectors pending.

    Args:
        params: One weight, or weights by name. Weights that are not deferred, and tensors, are returned unchanged.

    Returns:
        The same weights, with all pending vectors zero.

    Raises:
        TypeError: If `params` is neither a weight nor a dict of parameters.
        ValueError: If a quantized weight is not finite.
        NotImplementedError: If pending vectors of a quantized base require a gradient or have a tangent.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32), rank=4, seed=0, targets=["weight"], base="int8")
        >>> folded = dl.bases.fold_pending(dl.bases.defer(params, vectors=8))
        >>> folded["weight"].base.pending.b.any().item()
        False
    """
    check_one_or_more("params", params)
    if isinstance(params, LowRank):
        return _fold("param", params)
    return {name: _fold(name, param) if isinstance(param, LowRank) else param for name, param in params.items()}


def _fold(name: str, param: LowRank) -> LowRank:
    return param._replace(base=as_base(param.base).fold_pending(name=name))

"""Multiply an input by one low-rank weight, along one of the paths of `_contraction_paths`."""

from dataclasses import astuple
from math import prod
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._dtypes import autocast_now
from dynlora_fn._core._types import LowRank
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._pending import rank_with_pending, with_pending
from dynlora_fn.nn._contraction_paths import ContractionPath, cheapest_path
from dynlora_fn.nn._linear_functions import times_factored, times_merged


def linear(
    x: Float[Tensor, "*batch in"],
    param: LowRank,
    bias: Float[Tensor, " out"] | None = None,
    *,
    path: ContractionPath | None = None,
) -> Float[Tensor, "*batch out"]:
    """Return ``x @ weight.T + bias`` for one low-rank weight.

    All paths give the same values and gradients except for rounding, under compositions of the transforms of
    `torch.func` too. A plain tensor as the base gets its gradient where it is differentiated::

        weight = base + b @ a / rank    (arXiv:2406.06564, eq. 1 with alpha = 1)

    The factored path is taken under `torch.vmap`, under nested forward mode, and if the base is differentiated. In
    forward mode tangents are computed as on the factored path.
    When compiled, forward mode needs inputs that are not views of one tensor. Dynamo fails there on plain matrix
    products as well.

    Args:
        x: The input.
        param: The weight, without stack axes.
        bias: The bias, added to every output.
        path: "factored", "merged" or "dense". Default None takes the path with the fewest FLOPs for these shapes; for a
            weight with a sharded base, "merged" or "dense".

    Returns:
        The output in the dtype of `x`, or in the dtype of autocast where it is enabled.

    Raises:
        ValueError: If `path` is not one of the three.
        NotImplementedError: If the factors are sharded and the product is taken under `torch.vmap` or in forward mode,
            except on the factored path. Also if a base in low precision or a sharded one is differentiated.

    Numerics: A merged weight is formed in the widest dtype of base and factors, float32 at least. It is rounded once,
    to the dtype of the product. It is formed again in the backward pass, for which only `x` and `param` are saved.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> param = dl.init({"w": torch.ones(4, 6)}, rank=2, seed=0, targets=["w"])["w"]
        >>> linear(torch.ones(3, 6), param).shape
        torch.Size([3, 4])
    """
    if path is not None and path not in get_args(ContractionPath):
        raise ValueError(f"`path` is {path!r}; use one of {', '.join(get_args(ContractionPath))}")
    path = _cheapest(x, param) if path is None else path
    # The merged paths gather sharded factors for each product and free them. The factored path keeps them.
    sharding = param.factor_sharding if path != "factored" else None
    base, factors = (param.base, param.factors) if sharding else with_pending(param)
    layout, tensors = as_base(base).flatten()
    layout = layout._replace(factor_sharding=astuple(sharding) if sharding else None)
    autocast = autocast_now(x.device.type)
    dtype = autocast.dtype if autocast and autocast.enabled else x.dtype
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    if path == "factored":
        return times_factored(x, factors.b, factors.a, bias, layout, *tensors)
    output: Tensor = times_merged(x, factors.b, factors.a, bias, path == "dense", layout, *tensors)
    return output


def _cheapest(x: Tensor, param: LowRank) -> ContractionPath:
    """Return the cheapest path for these shapes, for a sharded base without "factored".

    Processes with different batches must run the same all-gathers. "merged" and "dense" always gather the base in the
    backward pass. "factored" does not where the input needs no gradient.
    """
    out_features, in_features = param.shape
    rank, tokens = rank_with_pending(param), prod(x.shape[:-1])
    path = cheapest_path(tokens=tokens, out_features=out_features, in_features=in_features, rank=rank)
    return "merged" if path == "factored" and as_base(param.base).sharding else path

"""`linear`: multiply an input by one low-rank weight.

The paths of this product are explained in `_contraction_paths`.
"""

from dataclasses import astuple
from math import prod
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import check_choice, described
from dynlora_fn._core._check_trees import check_param
from dynlora_fn._core._dtypes import cast, product_dtype
from dynlora_fn._core._types import LowRank, OneSidedFactors, has_no_constants
from dynlora_fn.bases._base import as_base, flatten
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

    All paths give the same values and derivatives to rounding, also under compositions of the transforms of
    `torch.func`. A base that is a plain tensor gets its gradient if it is differentiated::

        weight = base + alpha / rank * b @ a    (arXiv:2406.06564, eq. 1)

    The factored path is used under `torch.vmap`, under nested forward mode, and if the base is differentiated. In
    forward mode, tangents are computed as on the factored path. In a compiled function, forward mode needs inputs that
    are not views of one tensor. Dynamo fails for such inputs even with plain matrix products.

    Args:
        x: The input (*batch, in).
        param: The weight (out, in), without stack axes.
        bias: The bias (out,), or None for no bias.
        path: "factored", "merged" or "dense". Default None takes the path with the fewest FLOPs for these shapes. If
            the base is sharded, it takes "merged" or "dense".

    Returns:
        The output (*batch, out) in the dtype of `x`, or in the dtype of autocast if autocast is enabled.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If `path` is unknown, `param` is a stack, or shapes or devices do not fit.
        NotImplementedError: If sharded factors are used under `torch.vmap` or in forward mode, except on the factored
            path. Also if a base that is sharded or in low precision is differentiated.

    Numerics: A merged weight is formed in the widest dtype of base, factors and `x`, at least float32. Then it is
        rounded once, to the dtype of the product. The backward pass forms it again, from the saved `x` and `param`.

    Example:
        >>> import torch
        >>> import dynlora_fn as dl
        >>> x, param = torch.ones(3, 6), dl.init({"w": torch.ones(4, 6)}, rank=2, seed=0, targets=["w"])["w"]
        >>> torch.allclose(linear(x, param), x @ dl.materialize(param).T, atol=1e-5)
        True
    """
    check_choice("path", path, get_args(ContractionPath), or_none=True)
    if not torch.compiler.is_dynamo_compiling():  # tracing a check takes as long as tracing the product
        _check(param)
    return contract(x, param, bias, path=path)


def contract(x: Tensor, param: LowRank, bias: Tensor | None = None, *, path: ContractionPath | None = None) -> Tensor:
    """Return ``linear(x, param, bias)`` for a weight that was checked before."""
    is_in_graph = torch.compiler.is_dynamo_compiling() and has_no_constants(param)
    return (_contract_in_graph if is_in_graph else _contract)(x, param, bias, path)


# With `allow_in_graph`, AOTAutograd traces this function instead of Dynamo, which takes ten times as long.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _contract_in_graph(x: Tensor, param: LowRank, bias: Tensor | None, path: ContractionPath | None) -> Tensor:
    return _contract(x, param, bias, path)


def _contract(x: Tensor, param: LowRank, bias: Tensor | None, path: ContractionPath | None) -> Tensor:
    out_features, in_features = param.shape
    if not torch.compiler.is_dynamo_compiling():
        _check_inputs(x, bias, out_features, in_features, param.factors.b.device)
    path = _cheapest(x, param, out_features, in_features) if path is None else path
    # The merged and dense paths gather sharded factors inside the product and free them. The factored path saves them.
    sharding = param.factor_sharding if path != "factored" else None
    param = param if sharding else with_pending(param)
    factors, alpha = param.factors, param.alpha
    layout, tensors = flatten(param.base)
    layout = layout if alpha == 1 else layout._replace(alpha=alpha)
    layout = layout._replace(factor_sharding=astuple(sharding)) if sharding else layout
    dtype = product_dtype(x)
    x, bias = cast(x, dtype), None if bias is None else cast(bias, dtype)
    if path == "factored":
        return times_factored(x, factors.b, factors.a, bias, layout, *tensors)
    output: Tensor = times_merged(x, factors.b, factors.a, bias, path == "dense", layout, *tensors)
    return output


def _check(param: Any) -> None:
    """Raise if `param` is not one weight without stack axes."""
    if not isinstance(param, LowRank):
        raise TypeError(f"`param` is {described(param)}; pass one LowRank")
    check_param("param", "param", param)
    if param.seed.ndim:
        raise ValueError(f"`param` is a stack of shape {tuple(param.shape)}; pass one of its members, from `unstack`")


def _check_inputs(x: Any, bias: Any, out_features: int, in_features: int, device: torch.device) -> None:
    """Raise if the input or the bias does not fit a weight of this shape and device."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"`x` is {described(x)}; use a tensor of a floating dtype")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"`x` is a tensor of layout {x.layout}, sparse or nested; use a dense tensor")
    if x.shape[-1:] != (in_features,):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but the weight has {in_features} columns; use (*batch, in)")
    if bias is not None and not (isinstance(bias, Tensor) and bias.is_floating_point()):
        raise TypeError(f"`bias` is {described(bias)}; use None or a tensor of a floating dtype")
    if bias is not None and tuple(bias.shape) not in ((out_features,), (1,)):
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}, but the weight has {out_features} rows; use (out,)")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"`{name}` is on {tensor.device}, but the weight on {device}; move it")


def _cheapest(x: Tensor, param: LowRank, out_features: int, in_features: int) -> ContractionPath:
    """Return the cheapest path for these shapes.

    For a sharded base "factored" is not considered. All processes must run the same all-gathers, even with batches of
    different shapes. In the backward pass, "merged" and "dense" always gather the base. "factored" gathers it only if
    the input needs a gradient.
    """
    rank, tokens = rank_with_pending(param), prod(x.shape[:-1])
    path = cheapest_path(
        tokens=tokens,
        out_features=out_features,
        in_features=in_features,
        rank=rank,
        is_one_sided=isinstance(param.factors, OneSidedFactors),
    )
    is_sharded = not isinstance(param.base, Tensor) and as_base(param.base).sharding
    return "merged" if path == "factored" and is_sharded else path

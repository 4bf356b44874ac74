"""`decay`: decoupled weight decay of low-rank weights and tensors."""

from collections.abc import Mapping
from typing import overload

import torch
from torch import Tensor

from dynlora_fn._core._check import check_rate
from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._tree import by_name
from dynlora_fn._core._types import FrozenTensor, LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.optim._transform import Rate, check_is_floating


@overload
def decay(params: LowRank, rate: Rate) -> LowRank: ...
@overload
def decay(params: Tensor, rate: Rate) -> Tensor: ...
@overload
def decay(params: Params, rate: Rate | Mapping[str, Rate]) -> dict[str, Param]: ...
def decay(params: Param | Params, rate: Rate | Mapping[str, Rate]) -> Param | dict[str, Param]:
    """Multiply weights by ``1 - rate``.

    This is the decoupled weight decay of arXiv:1711.05101, with ``rate = lr * weight_decay``. It stays exact when
    vectors are switched, because base and product decay together::

        weight = base + alpha / rank * b @ a,     base *= 1 - rate,     b *= 1 - rate

    Decay of the factors is another method. It pulls the weight to its base, and a switched weight grows.

    Call this before `apply_updates`, because `torch.optim.AdamW` decays before it adds the update. A switch may come
    before or after it.

    Args:
        params: One parameter, or a dict of parameters by name. Full-rank tensors decay too.
        rate: The rate, from 0 to 1: a number, a 0-d tensor, or a dict of either by name. Parameters that are not in the
            dict, and each `FrozenTensor`, are returned unchanged. With a tensor, a new rate does not recompile a
            compiled step.

    Returns:
        The parameter, or the parameters by name, with the same structure, shapes and dtypes.

    Raises:
        TypeError: If `rate` is not a real number, or a parameter is neither a `LowRank` nor a tensor.
        ValueError: If a number is not from 0 to 1, a tensor is not 0-d, or the dict has a name that is not in `params`.
            Also if a tensor is not floating, such as a counter, which would be rounded.
        NotImplementedError: If a quantized base or its rate requires a gradient or has a tangent.

    Numerics: Products are computed in float32 or a wider dtype, and rounded once. At rates below ``2**-9``, rounding
        keeps a bfloat16 tensor unchanged. A quantized base multiplies only its scales if its format allows it, so codes
        are not rounded again. A residual in bfloat16 is then rounded up or down at random.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, materialize
        >>> dense, lr, weight_decay = torch.nn.Parameter(torch.ones(6, 4)), 1e-2, 0.1
        >>> params = init({"w": dense}, rank=2, seed=0, targets=["w"])
        >>> params = decay(params, lr * weight_decay)
        >>> dense.grad = torch.zeros_like(dense)
        >>> _ = torch.optim.AdamW([dense], lr=lr, weight_decay=weight_decay).step()
        >>> torch.allclose(materialize(params)["w"], dense)
        True
    """
    check_one_or_more("params", params, or_tensor=True)
    if isinstance(params, Mapping):
        rates: dict[str, Rate] = by_name(rate, params, "rate")
        return {name: _decay(name, param, rates[name]) if name in rates else param for name, param in params.items()}
    if isinstance(rate, Mapping):
        raise ValueError(f"`rate` is a dict of {list(rate)}, but `params` is one parameter; pass a number or a tensor")
    return _decay("param", params, rate)


def _decay(name: str, param: Param, rate: Rate) -> Param:
    if isinstance(param, FrozenTensor):
        return param
    if isinstance(param, Tensor):
        check_is_floating("params", name, param)
        return _scaled(param, _remainder(name, rate, param.device, widest(param.dtype)))
    base, b = as_base(param.base), param.factors.b
    factor = _remainder(name, rate, b.device, widest(b.dtype, base.sum_dtype))
    factors = param.factors._replace(b=_scaled(b, factor))
    return param._replace(base=base.scaled(factor, name=name), factors=factors)


def _remainder(name: str, rate: Rate, device: torch.device, dtype: torch.dtype) -> Rate:
    """Return ``1 - rate``. A tensor is moved to the device and dtype."""
    rate = check_rate("rate", rate, most=1, of=name)
    if not isinstance(rate, Tensor):
        return 1 - rate
    return 1 - rate.to(device, dtype)


def _scaled(tensor: Tensor, factor: Rate) -> Tensor:
    return (tensor.to(widest(tensor.dtype)) * factor).to(tensor.dtype)

"""Convert torchao's tensors from and to bases.

torchao takes a second to import, so it is imported at its first use.
"""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from dynlora_fn._core._check import described
from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._tree import tensor_of, whole_factors
from dynlora_fn._core._types import FrozenTensor, LowRank, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._formats import FORMATS, codes_from_tensors
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._quantized import Quantized
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._residual import Device, ResidualKind, check_residual, make_residual
from dynlora_fn.bases._rewrite import check_finite


def is_torchao(tensor: Tensor) -> bool:
    """Return whether the type of a tensor is defined in torchao."""
    return type(tensor).__module__.split(".")[0] == "torchao"


def from_torchao(
    tensor: Tensor, *, residual: ResidualKind = "bfloat16", residual_device: Device = None, name: str = "tensor"
) -> Quantized:
    """Return a base with the codes of a torchao tensor.

    The codes are copied bit for bit, and `to_torchao` returns an equal tensor.

    Args:
        tensor: A matrix of one of these types. Stable: Int8Tensor and Float8Tensor, weight-only with PerRow, and
            NF4Tensor, as torchao's ``quantize_`` and ``to_nf4`` return them. Prototypes: NVFP4Tensor with one scale for
            the weight, as NVFP4WeightOnlyConfig creates it, and MXTensor of float4, weight-only.
        residual: The format of the residual, as in `quantize`. The residual starts at zero.
        residual_device: The device of the residual. Default None means the device of the codes.
        name: The name of the weight, for error messages.

    Returns:
        The base, which shares no memory with the tensor.

    Raises:
        TypeError: If `tensor` is not a tensor, or `residual_device` is not a device.
        ValueError: If the tensor has another type or layout, or is not finite, or `residual` is unknown.
        NotImplementedError: If the tensor is the result of an operation that is being differentiated.

    Example:
        >>> import torch
        >>> from torchao.quantization import Int8Tensor, PerRow
        >>> tensor = Int8Tensor.from_hp(torch.randn(8, 16), granularity=PerRow())
        >>> torch.equal(to_torchao(from_torchao(tensor)).dequantize(), tensor.dequantize())
        True
    """
    check_residual(residual, residual_device)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`tensor` is {described(tensor)} for {name!r}; pass a tensor of torchao")
    if tensor.grad_fn is not None:
        refuse("gradient, quantize", name=name)
    detached: Any = tensor.detach()
    codes = _codes(detached)
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if codes is None or not _is_same(detached, codes.to_torchao(like)):
        raise ValueError(
            f"weight {name!r} is a {type(tensor).__name__} of shape {tuple(tensor.shape)} that cannot be a base; use a"
            " matrix in torchao's Int8Tensor or Float8Tensor, weight-only by row, NF4Tensor, or the prototypes"
            " NVFP4Tensor or MXTensor in weight-only float4"
        )
    dense = codes.decode(torch.float32)
    check_finite(dense, name)
    return Quantized(codes, make_residual(name, dense.zero_(), residual, residual_device), like)


def _codes(tensor: Any) -> Format | None:
    """Return the codes of a torchao matrix, with copies of its inner tensors.

    Return None if no format has this layout.
    """
    if tensor.ndim != 2:
        return None
    for format_type in FORMATS.values():
        codes = format_type.from_torchao(tensor)
        if codes is not None:
            return codes_from_tensors(codes.kind, map(_copy, codes))
    return None


def _is_same(tensor: Any, rebuilt: Any) -> bool:
    """Return whether a tensor that was rebuilt from codes equals the original.

    torchao's metadata (context) determines how it computes with a tensor. Codes do not store it, so a tensor with other
    metadata than the default differs.
    """
    (names, context), (rebuilt_names, rebuilt_context) = tensor.__tensor_flatten__(), rebuilt.__tensor_flatten__()
    same = type(tensor) is type(rebuilt) and context == rebuilt_context and set(names) <= set(rebuilt_names)
    return same and all(torch.equal(_bits(getattr(tensor, name)), _bits(getattr(rebuilt, name))) for name in names)


def _bits(tensor: Tensor) -> Tensor:
    return _copy(tensor).flatten().view(torch.uint8)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@overload
def to_torchao(params: LowRank | Quantized) -> Tensor: ...
@overload
def to_torchao(params: Params) -> dict[str, Tensor]: ...
def to_torchao(params: LowRank | Quantized | Params) -> Tensor | dict[str, Tensor]:
    """Return torchao's tensors with the same codes.

    The tensors dequantize to the same bits as the bases. Sharded bases are gathered. In that case this is collective:
    call it on every process.

    Args:
        params: A base, a weight, or weights by name. The factors and pending folds of a weight are merged into its base
            first. Weights by name are also unstacked.

    Returns:
        One tensor. For weights by name, a state dict for the unmodified module, in which plain bases are dense tensors.
        Load it with ``load_state_dict(..., assign=True)``, because torch cannot copy codes into dense parameters. A
        parameter then also has the dtype of its base, such as bfloat16.

    Raises:
        TypeError: If `params` is neither a base, a weight nor a dict of parameters.
        ValueError: If a base is a stack, nvfp4 codes have one factor for each row, or a merged weight is not finite.
        NotImplementedError: If factors that are merged into codes require a gradient or have a tangent.
        ImportError: If torchao has moved the prototype of the format.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(64, 32)
        >>> params = dl.init(model, rank=4, seed=0, targets=["weight"], base="int8")
        >>> model.load_state_dict(dl.bases.to_torchao(params), assign=True)
        <All keys matched successfully>
        >>> type(model.weight).__name__
        'Int8Tensor'
    """
    if not hasattr(params, "pending_folds"):  # no base
        check_one_or_more("params", params, or_tensor=True)
    if isinstance(params, Mapping):
        return {
            name: to_torchao(param) if isinstance(param, LowRank) else tensor_of(param)
            for name, param in unstack(params).items()
        }
    if isinstance(params, LowRank):
        joined = with_pending(params, widest(params.factors.b.dtype))
        base, (b, a) = as_base(as_base(joined.base).gather()), whole_factors(joined)
        params = base.fold(b, a, divisor=joined.divisor, name="params")
    return as_base(params.tensor if isinstance(params, FrozenTensor) else params).to_torchao()

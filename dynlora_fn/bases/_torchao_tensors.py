"""Convert torchao's tensors from and to bases.

torchao takes a second to import, so it is imported at its first use.
"""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.bases import _nf4, _torchao, _torchao_prototypes
from dynlora_fn.bases._base import fold_base
from dynlora_fn.bases._float4 import MXFP4Codes, NVFP4Codes
from dynlora_fn.bases._formats import Codes, decode
from dynlora_fn.bases._nf4 import NF4Codes
from dynlora_fn.bases._ops import check_finite
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._quantized import Device, ResidualKind, base_shape, make_residual
from dynlora_fn.bases._rowwise import Float8Codes, Int8Codes
from dynlora_fn.bases._sharded import gather_base
from dynlora_fn.bases._types import LocalBase, Quantized


def is_torchao(tensor: Tensor) -> bool:
    """Return whether the type of a tensor is one of torchao's."""
    return type(tensor).__module__.split(".")[0] == "torchao"


def from_torchao(
    tensor: Tensor, *, residual: ResidualKind = "bfloat16", residual_device: Device = None, name: str = "tensor"
) -> Quantized:
    """Return a base with the codes of a torchao tensor.

    The codes are copied, bit for bit. `to_torchao` returns an equal tensor.

    Args:
        tensor: A matrix. The stable types are Int8Tensor and Float8Tensor, weight-only with PerRow, and NF4Tensor, as
            torchao's ``quantize_`` and ``to_nf4`` return them. The prototypes are NVFP4Tensor with one scale for the
            weight, as from NVFP4WeightOnlyConfig, and MXTensor of float4, weight-only.
        residual: The format of the residual, as in `quantize`. It starts at zero.
        residual_device: The device of the residual. Default None means the device of the codes.
        name: The name of the weight, for error messages.

    Returns:
        The base.

    Raises:
        ValueError: If the tensor has another type or layout, or is not finite.

    Example:
        >>> import torch
        >>> from torchao.quantization import Int8Tensor, PerRow
        >>> tensor = Int8Tensor.from_hp(torch.randn(8, 16), granularity=PerRow())
        >>> torch.equal(to_torchao(from_torchao(tensor)).dequantize(), tensor.dequantize())
        True
    """
    detached: Any = tensor.detach()
    codes = _codes(detached)
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if codes is None or not _is_same(detached, _tensor(codes, like)):
        raise ValueError(
            f"weight {name!r} is a {type(tensor).__name__} of shape {tuple(tensor.shape)} that cannot be a base; use a"
            " matrix in torchao's Int8Tensor or Float8Tensor, weight-only by row, NF4Tensor, or the prototypes"
            " NVFP4Tensor or MXTensor in weight-only float4"
        )
    dense = decode(codes, torch.float32)
    check_finite(dense, name)
    return Quantized(codes, make_residual(dense.zero_(), residual, residual_device), like)


def _codes(tensor: Any) -> Codes | None:
    if tensor.ndim != 2:
        return None
    if _torchao_prototypes.is_prototype(tensor):
        views = _torchao_prototypes.codes_of(tensor)
        return None if views is None else tree_map(_copy, views)
    if isinstance(tensor, _torchao.Int8Tensor | _torchao.Float8Tensor):
        if tensor.scale.shape != (tensor.shape[0], 1):
            return None
        format_type = Int8Codes if isinstance(tensor, _torchao.Int8Tensor) else Float8Codes
        return format_type(_copy(tensor.qdata), _copy(tensor.scale))
    if isinstance(tensor, _torchao.NF4Tensor) and tensor.shape[1] % 2 == 0:
        inner = (tensor.quantized_data, tensor.quantized_scalers, tensor.quantization_factor, tensor.scaler_mean)
        data, *scales = (_copy(part) for part in inner)
        return NF4Codes(data.reshape(tensor.shape[0], -1), *scales)
    return None


def _is_same(tensor: Any, rebuilt: Any) -> bool:
    """Return whether nothing is lost.

    The context says how torchao computes with a tensor. Codes do not store it, so only the default context is accepted.
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

    The inner tensors are those of the base, and the bits are equal when dequantized.

    Args:
        params: A base, a weight, or weights by name. The factors of a weight are merged into its base first. Weights by
            name are also unstacked.

    Returns:
        One tensor. For weights by name, a state dict for the unmodified module; plain bases become dense tensors.

    Raises:
        ValueError: If a base is a stack, or nvfp4 codes have one factor for each row.
        ImportError: If torchao has moved the prototype of the format.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32), rank=4, seed=0, targets=["weight"], base="int8")
        >>> type(dl.bases.to_torchao(params)["weight"]).__name__
        'Int8Tensor'
    """
    if isinstance(params, Mapping):
        return {
            name: to_torchao(param) if isinstance(param, LowRank) else param for name, param in unstack(params).items()
        }
    base = _merged(params) if isinstance(params, LowRank) else params
    if isinstance(base, Tensor):
        return base
    if len(shape := base_shape(base)) != 2:
        raise ValueError(
            f"`params` is a stack of shape {tuple(shape)}, which torchao does not support; call `unstack` first"
        )
    return _tensor(base.codes, base.like)


def _merged(param: LowRank) -> LocalBase:
    base, (b, a) = with_pending(param)
    return fold_base(gather_base(base), b, a, rank=b.shape[-1], name="params")


def _tensor(codes: Codes, like: Tensor) -> Tensor:
    if isinstance(codes, Tensor):
        return codes
    if isinstance(codes, NF4Codes):
        return _nf4_tensor(codes, like)
    if isinstance(codes, NVFP4Codes | MXFP4Codes):
        return _torchao_prototypes.tensor_of(codes, like)
    block = [1, codes.codes.shape[1]]
    if isinstance(codes, Float8Codes):
        tensor: Tensor = _torchao.Float8Tensor(codes.codes, codes.scale, block_size=block, dtype=like.dtype)
    else:
        zero = torch.zeros_like(codes.scale, dtype=torch.int8)
        tensor = _torchao.Int8Tensor(codes.codes, codes.scale, block, like.dtype, zero_point=zero)
    return tensor


def _nf4_tensor(codes: NF4Codes, like: Tensor) -> Tensor:
    shape, blocks = base_shape(Quantized(codes, (), like)), len(codes.scales)
    # torchao computes the context for a weight of this shape.
    sizes = shape.numel() // blocks, blocks // len(codes.factor)
    _, context = _torchao.to_nf4(codes.mean.new_zeros(shape), *sizes).__tensor_flatten__()
    inner = {
        "quantized_data": codes.codes.flatten(),
        "scaler_mean": codes.mean,
        "quantization_factor": codes.factor,
        "quantized_scalers": codes.scales,
        "nf4": torch.tensor(_nf4.VALUES, dtype=codes.mean.dtype, device=codes.mean.device),
    }
    tensor: Tensor = _torchao.NF4Tensor.__tensor_unflatten__(inner, context, None, None)
    return tensor

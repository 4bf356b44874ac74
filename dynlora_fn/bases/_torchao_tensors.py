"""torchao's tensors and configurations, to and from the plain tensors that bases are held in.

torchao is imported where it is needed: it takes a second.
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
    return type(tensor).__module__.split(".")[0] == "torchao"


def from_torchao(
    tensor: Tensor, *, residual: ResidualKind = "bfloat16", residual_device: Device = None, name: str = "tensor"
) -> Quantized:
    """A base of the tensor's own codes, bit for bit; `to_torchao` gives the tensor back.

    Args:
        tensor: a matrix in torchao's Int8Tensor or Float8Tensor, weight-only with PerRow, or NF4Tensor, as its
            ``quantize_`` and ``to_nf4`` make them; or in its prototypes NVFP4Tensor with a scale for the whole, as
            NVFP4WeightOnlyConfig makes it, or MXTensor of float4, weight-only. It is copied.
        residual: "bfloat16", "int8" or None, as in `quantize`; nothing is missed yet.
        residual_device: where it lies; with the codes unless given.
        name: of the weight, for the message of an error.

    Raises:
        ValueError: if the tensor is of another kind or not finite.

    Example:
        >>> from torchao.quantization import Int8Tensor, PerRow
        >>> tensor = Int8Tensor.from_hp(torch.randn(8, 16), granularity=PerRow())
        >>> torch.equal(to_torchao(from_torchao(tensor)).dequantize(), tensor.dequantize())
        True
    """
    held: Any = tensor.detach()
    codes = _codes(held)
    like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    if codes is None or not _is_same(held, _tensor(codes, like)):
        kinds = "Int8Tensor or Float8Tensor, weight-only by row, NF4Tensor, or the prototypes NVFP4Tensor or MXTensor"
        rule = f"be a matrix in torchao's {kinds} in weight-only float4 to be a base"
        raise ValueError(f"weight {name!r} must {rule}, got {type(tensor).__name__} of shape {tuple(tensor.shape)}")
    dense = decode(codes, torch.float32)
    check_finite(dense, name)
    return Quantized(codes, make_residual(dense.zero_(), residual, residual_device), like)


def _codes(held: Any) -> Codes | None:
    if held.ndim != 2:
        return None
    if _torchao_prototypes.is_prototype(held):
        views = _torchao_prototypes.codes_of(held)
        return None if views is None else tree_map(_copy, views)
    if isinstance(held, _torchao.Int8Tensor | _torchao.Float8Tensor):
        if held.scale.shape != (held.shape[0], 1):
            return None
        kind = Int8Codes if isinstance(held, _torchao.Int8Tensor) else Float8Codes
        return kind(_copy(held.qdata), _copy(held.scale))
    if isinstance(held, _torchao.NF4Tensor) and held.shape[1] % 2 == 0:
        inner = (held.quantized_data, held.quantized_scalers, held.quantization_factor, held.scaler_mean)
        data, *rest = (_copy(tensor) for tensor in inner)
        return NF4Codes(data.reshape(held.shape[0], -1), *rest)
    return None


def _is_same(held: Any, rebuilt: Any) -> bool:
    """Whether nothing is lost: the context says how torchao computes with a tensor, and only the usual one is kept."""
    (names, context), (own_names, own_context) = held.__tensor_flatten__(), rebuilt.__tensor_flatten__()
    same = type(held) is type(rebuilt) and context == own_context and set(names) <= set(own_names)
    return same and all(torch.equal(_bits(getattr(held, name)), _bits(getattr(rebuilt, name))) for name in names)


def _bits(tensor: Tensor) -> Tensor:
    return _copy(tensor).flatten().view(torch.uint8)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


@overload
def to_torchao(params: LowRank | Quantized) -> Tensor: ...
@overload
def to_torchao(params: Params) -> dict[str, Tensor]: ...
def to_torchao(params: LowRank | Quantized | Params) -> Tensor | dict[str, Tensor]:
    """torchao's own tensor of the same codes: the same inner tensors, and the same bits when dequantized.

    Args:
        params: a base, a weight, which is merged first, or weights by name, which are also unstacked: a state dict for
            the plain module, in which plain bases become dense tensors.

    Raises:
        ValueError: if a base is a stack.
    """
    if isinstance(params, Mapping):
        return {
            name: to_torchao(param) if isinstance(param, LowRank) else param for name, param in unstack(params).items()
        }
    base = _merged(params) if isinstance(params, LowRank) else params
    if isinstance(base, Tensor):
        return base
    if len(shape := base_shape(base)) != 2:
        raise ValueError(f"`params` must be a single weight to be torchao's, got a stack of shape {tuple(shape)}")
    return _tensor(base.codes, base.like)


def _merged(param: LowRank) -> LocalBase:
    held, (b, a) = with_pending(param)
    return fold_base(gather_base(held), b, a, rank=b.shape[-1], name="params")


def _tensor(codes: Codes, like: Tensor) -> Tensor:
    if isinstance(codes, Tensor):
        return codes
    if isinstance(codes, NF4Codes):
        return _nf4_tensor(codes, like)
    if isinstance(codes, NVFP4Codes | MXFP4Codes):
        return _torchao_prototypes.tensor_of(codes, like)
    block = [1, codes.codes.shape[1]]
    if isinstance(codes, Float8Codes):
        made: Tensor = _torchao.Float8Tensor(codes.codes, codes.scale, block_size=block, dtype=like.dtype)
    else:
        zero = torch.zeros_like(codes.scale, dtype=torch.int8)
        made = _torchao.Int8Tensor(codes.codes, codes.scale, block, like.dtype, zero_point=zero)
    return made


def _nf4_tensor(codes: NF4Codes, like: Tensor) -> Tensor:
    shape, blocks = base_shape(Quantized(codes, (), like)), len(codes.scales)
    # What it says of a weight of this shape, by way of torchao itself.
    sizes = shape.numel() // blocks, blocks // len(codes.factor)
    _, context = _torchao.to_nf4(codes.mean.new_zeros(shape), *sizes).__tensor_flatten__()
    inner = {
        "quantized_data": codes.codes.flatten(),
        "scaler_mean": codes.mean,
        "quantization_factor": codes.factor,
        "quantized_scalers": codes.scales,
        "nf4": torch.tensor(_nf4.VALUES, dtype=codes.mean.dtype, device=codes.mean.device),
    }
    made: Tensor = _torchao.NF4Tensor.__tensor_unflatten__(inner, context, None, None)
    return made

"""torchao's prototypes, NVFP4Tensor and MXTensor, to and from the plain tensors that bases are held in.

They are imported where a tensor of theirs is asked for and nowhere else, so that nothing else fails if torchao moves
them; what arrives is told by its type's name.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn.bases._float4 import MXFP4Codes, NVFP4Codes


def is_prototype(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.prototype.")


def codes_of(held: Any) -> NVFP4Codes | MXFP4Codes | None:
    """Views of a matrix's inner tensors, none of another kind."""
    if type(held).__name__ == "NVFP4Tensor" and held.per_tensor_scale is not None and not held.per_tensor_scale.ndim:
        return NVFP4Codes(held.qdata, held.scale, held.per_tensor_scale)
    if type(held).__name__ == "MXTensor" and held.elem_dtype == torch.float4_e2m1fn_x2:
        is_swizzled = held.scale.shape[0] != held.qdata.shape[0]
        return None if is_swizzled else MXFP4Codes(held.qdata, held.scale.view(torch.uint8))
    return None


def tensor_of(codes: NVFP4Codes | MXFP4Codes, like: Tensor) -> Tensor:
    """Raises ImportError if torchao has its prototype elsewhere."""
    try:
        from dynlora_fn.bases._torchao import KernelPreference, MXTensor, NVFP4Tensor  # noqa: PLC0415
    except ImportError as error:
        rule = "must be in torchao.prototype.mx_formats to be made, as in torchao 0.18"
        raise ImportError(f"torchao's prototypes NVFP4Tensor and MXTensor {rule}, got {error}") from error
    if isinstance(codes, NVFP4Codes):
        if codes.factor.ndim:
            rule = "have one factor for the weight to be torchao's, not one for each row as when it has been sharded"
            raise ValueError(f"`params` in nvfp4 must {rule}: see `quantize`, got {tuple(codes.factor.shape)}")
        is_swizzled = codes.scale.shape[-1] * 8 != codes.codes.shape[-1]
        made: Tensor = NVFP4Tensor(
            codes.codes, codes.scale, 16, like.dtype, per_tensor_scale=codes.factor, is_swizzled_scales=is_swizzled
        )
    else:
        block = 2 * codes.codes.shape[-1] // codes.scale.shape[-1]
        scale = codes.scale.view(torch.float8_e8m0fnu)
        packed, preference = torch.float4_e2m1fn_x2, KernelPreference.EMULATED
        made = MXTensor(codes.codes, scale, packed, block, like.dtype, preference, None, False)
    return made

"""Convert torchao's prototypes NVFP4Tensor and MXTensor from and to codes.

The prototypes are imported only to create one of their tensors, so nothing else fails if torchao moves them.
An existing tensor is recognized by the name of its type.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn.bases._float4 import MXFP4Codes, NVFP4Codes


def is_prototype(tensor: Tensor) -> bool:
    """Return whether the type of a tensor is one of torchao's prototypes."""
    return type(tensor).__module__.startswith("torchao.prototype.")


def codes_of(tensor: Any) -> NVFP4Codes | MXFP4Codes | None:
    """Return codes that are views of the inner tensors of a matrix.

    The result is None if the layout is not supported.
    """
    if (
        type(tensor).__name__ == "NVFP4Tensor"
        and tensor.per_tensor_scale is not None
        and not tensor.per_tensor_scale.ndim
    ):
        return NVFP4Codes(tensor.qdata, tensor.scale, tensor.per_tensor_scale)
    if type(tensor).__name__ == "MXTensor" and tensor.elem_dtype == torch.float4_e2m1fn_x2:
        is_swizzled = tensor.scale.shape[0] != tensor.qdata.shape[0]
        return None if is_swizzled else MXFP4Codes(tensor.qdata, tensor.scale.view(torch.uint8))
    return None


def tensor_of(codes: NVFP4Codes | MXFP4Codes, like: Tensor) -> Tensor:
    """Return torchao's tensor with these codes.

    Raises:
        ImportError: If torchao has moved its prototype.
        ValueError: If nvfp4 codes have one factor for each row.
    """
    try:
        from dynlora_fn.bases._torchao import KernelPreference, MXTensor, NVFP4Tensor  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "torchao's prototypes NVFP4Tensor and MXTensor are not in torchao.prototype.mx_formats, where torchao 0.18"
            f" has them ({error}); install that version"
        ) from error
    if isinstance(codes, NVFP4Codes):
        if codes.factor.ndim:
            raise ValueError(
                f"`params` in nvfp4 have factors of shape {tuple(codes.factor.shape)}, one for each row, because of a"
                " fold while they were sharded; torchao needs one factor for the weight, so call `quantize` first"
            )
        is_swizzled = codes.scale.shape[-1] * 8 != codes.codes.shape[-1]
        tensor: Tensor = NVFP4Tensor(
            codes.codes, codes.scale, 16, like.dtype, per_tensor_scale=codes.factor, is_swizzled_scales=is_swizzled
        )
    else:
        block = 2 * codes.codes.shape[-1] // codes.scale.shape[-1]
        scale = codes.scale.view(torch.float8_e8m0fnu)
        packed, preference = torch.float4_e2m1fn_x2, KernelPreference.EMULATED
        tensor = MXTensor(codes.codes, scale, packed, block, like.dtype, preference, None, False)
    return tensor

"""torchao's prototype tensors, and the values that torchao dequantizes."""

import pytest
import torch
from torch import Tensor


def prototype(weight: Tensor, kind: str) -> Tensor:
    if kind == "nvfp4":
        nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        return nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=nvfp4.per_tensor_amax_to_scale(weight.abs().max()))
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    return mx.MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, scaling_mode=mx.ScaleCalculationMode.EVEN)


def dense(tensor: Tensor) -> Tensor:
    """Return torchao's tensor as torchao dequantizes it."""
    return tensor.get_original_weight() if hasattr(tensor, "get_original_weight") else tensor.dequantize()

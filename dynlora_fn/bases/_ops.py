"""Custom operations on codes that a compiler does not inline.

So only one dense weight is in memory at a time. If plain operations dequantized a weight, a compiler would compute it
once and keep it alive from the forward to the backward pass. The whole model would then be in memory in full precision.
These operations have no gradients. Codes that are differentiated are refused, and plain tensors that are differentiated
take plain operations.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.bases._plain import Plain
from dynlora_fn.bases._refusals import refuse

LIBRARY: Any = torch.library.Library("dynlora_fn", "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("dequantize(Tensor[] codes, str kind, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "times_codes(Tensor x, Tensor? bias, Tensor[] codes, str kind, Tensor? b, Tensor? a, float scale, bool with_b,"
    " bool transposed) -> Tensor"
)


def dequantize(codes: Format, dtype: torch.dtype) -> Tensor:
    """Return the dense weight, as one operation that a compiler does not inline.

    A plain tensor of that dtype is returned unchanged. A plain tensor that is differentiated is converted by `to`.

    Raises:
        NotImplementedError: If codes require a gradient or have a tangent.
    """
    if isinstance(codes, Plain) and codes.tensor.dtype == dtype:
        return codes.tensor
    dense: Tensor = _decoded(list(codes), codes.kind, dtype)
    return dense


# Dynamo cannot trace `is_attached`. With `allow_in_graph`, AOTAutograd traces this function instead.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _decoded(codes: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    if not is_attached(codes):
        return torch.ops.dynlora_fn.dequantize(codes, kind, dtype)  # type: ignore[no-any-return]
    if kind == "plain":
        return codes[0].to(dtype)
    return refuse("gradient, codes", what="the base", kind=kind)


# --- dequantize


def _dequantize(codes: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    return codes_from_tensors(kind, codes).decode(dtype)


def _empty_dequantized(codes: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    return codes[0].new_empty(codes_from_tensors(kind, codes).shape, dtype=dtype)


# --- multiply


def _times_codes(
    x: Tensor,
    bias: Tensor | None,
    codes: list[Tensor],
    kind: str,
    b: Tensor | None,
    a: Tensor | None,
    scale: float,
    with_b: bool,
    transposed: bool,
) -> Tensor:
    """Multiply `x` by the dequantized base.

    If factors are passed, they are merged into the dense base first, as in `times_merged`.
    """
    base = codes_from_tensors(kind, codes)
    if b is None or a is None:
        weight = base.decode(x.dtype)
    else:
        out_features, in_features = base.shape
        weight = b.new_empty(out_features, in_features + (b.shape[1] if with_b else 0))
        merged = weight[:, :in_features]
        base.decode_into(merged)
        merged.addmm_(b, a, alpha=scale)
        if with_b:
            weight[:, in_features:] = b
        weight = weight.to(x.dtype)
    weight = weight.mT if transposed else weight
    return x @ weight if bias is None else torch.addmm(bias, x, weight)


def _empty_times_codes(
    x: Tensor,
    bias: Any,
    codes: list[Tensor],
    kind: str,
    b: Tensor | None,
    a: Any,
    scale: float,
    with_b: bool,
    transposed: bool,
) -> Tensor:
    out_features, in_features = codes_from_tensors(kind, codes).shape
    b_features = b.shape[1] if with_b and b is not None else 0
    return x.new_empty(x.shape[0], out_features if transposed else in_features + b_features)


# --- vmap: the mapped axis becomes a stack axis


def leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Move the mapped axis to the front. A tensor without one is expanded."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def all_leading(tensors: list[Tensor], dims: Any, size: int) -> list[Tensor]:
    """Apply `leading` to each tensor of a list."""
    dims = [None] * len(tensors) if dims is None else dims
    return [leading(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]


def _mapped_dequantize(info: Any, dims: Any, codes: list[Tensor], kind: str, dtype: torch.dtype) -> Any:
    return torch.ops.dynlora_fn.dequantize(all_leading(codes, dims[0], info.batch_size), kind, dtype), 0


LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
LIBRARY.impl("times_codes", _times_codes, "CompositeExplicitAutograd")
# Fake kernels instead of meta kernels, because a residual may be on another device than the codes.
torch.library.register_fake("dynlora_fn::dequantize", _empty_dequantized, lib=LIBRARY)
torch.library.register_fake("dynlora_fn::times_codes", _empty_times_codes, lib=LIBRARY)
torch.library.register_vmap("dynlora_fn::dequantize", _mapped_dequantize, lib=LIBRARY)

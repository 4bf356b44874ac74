"""Operations on codes that a compiler cannot look into, so that only one dense weight is alive at a time.

A compiler computes a weight that is dequantized by plain operations once for forward and backward pass, and keeps it
alive in between. The whole model would then be in memory in full precision. These operations have no gradients,
because none of their inputs is trained.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn.bases._formats import (
    Codes,
    Residual,
    code_tensors,
    codes_from_tensors,
    decode,
    decode_into,
    encode,
    encode_residual,
    is_tied,
    residual_from_tensors,
    shape_of,
)
from dynlora_fn.bases._rowwise import Int8Codes

_LIBRARY: Any = torch.library.Library("dynlora_fn", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("dequantize(Tensor[] codes, str kind, ScalarType dtype) -> Tensor")
_LIBRARY.define(
    "fold_codes(Tensor[] codes, str kind, Tensor[] residual, Tensor left, Tensor right, int rank, str name) -> Tensor[]"
)
_LIBRARY.define(
    "times_codes(Tensor x, Tensor? bias, Tensor[] codes, str kind, Tensor? b, Tensor? a, float scale, bool with_b,"
    " bool transposed) -> Tensor"
)


def decode_exact(codes: Codes, residual: Residual, dtype: torch.dtype) -> Tensor:
    """Return codes plus residual as a dense weight, in newly allocated memory.

    It is on the device of the codes.
    """
    total = decode(codes, dtype)
    if not isinstance(residual, Tensor | Int8Codes):
        return total.clone() if total is codes else total
    return total + decode(residual, dtype).to(total.device)


def _can_read(tensor: Tensor) -> bool:
    """Return whether the host can read values.

    It cannot on the meta device, or while a CUDA graph is captured.
    """
    return not (tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


def check_finite(weight: Tensor, name: str) -> None:
    """Raise ValueError if a weight is not finite.

    It waits for the device. On the meta device, and while a CUDA graph is captured, it checks nothing.
    """
    if not _can_read(weight):
        return
    smallest, largest = torch.aminmax(weight)
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        raise ValueError(
            f"weight {name!r} is not finite, with values from {smallest.item()} to {largest.item()}; a base in low"
            " precision stores finite values only, so check the weight and its last update"
        )


# --- dequantize


def _dequantize(codes: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    return decode(codes_from_tensors(kind, codes), dtype)


def _empty_dequantized(codes: list[Tensor], kind: str, dtype: torch.dtype) -> Tensor:
    return codes[0].new_empty(shape_of(codes_from_tensors(kind, codes)), dtype=dtype)


# --- fold


def _fold_codes(
    codes: list[Tensor], kind: str, residual: list[Tensor], left: Tensor, right: Tensor, rank: int, name: str
) -> list[Tensor]:
    """Fold ``left @ right / rank`` into codes and residual, member by member."""
    old, split = [*codes, *residual], len(codes)
    new = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in old]
    stack = codes[0].shape[:-2]
    olds, news, (lefts, rights) = ([_members(tensor, stack) for tensor in group] for group in (old, new, (left, right)))
    for index in range(stack.numel()):
        member = [members[index] for members in olds]
        before = codes_from_tensors(kind, member[:split]), residual_from_tensors(member[split:])
        after = _fold_member(*before, lefts[index], rights[index], rank=rank, name=name)
        for members, tensor in zip(news, after, strict=True):
            members[index].copy_(tensor)
    return new


def _members(tensor: Tensor, stack: torch.Size) -> Tensor:
    """Flatten the axes of the stack into one leading axis."""
    return tensor.reshape(stack.numel(), *tensor.shape[len(stack) :])


def _fold_member(
    codes: Codes, residual: Residual, left: Tensor, right: Tensor, *, rank: int, name: str
) -> list[Tensor]:
    # Rows without a difference keep every bit. If the format ties rows together, only an unchanged weight does.
    is_changed = ((left != 0) & (right != 0).any(-1)).any(-1, keepdim=True)  # (out, 1)
    is_changed = is_changed.any() if is_tied(codes) else is_changed
    if _can_read(is_changed) and not is_changed.any():
        return [*code_tensors(codes), *code_tensors(residual)]
    wide = widest(left.dtype)
    total = _add(decode_exact(codes, residual, wide), left.to(wide) / rank, right.to(wide))
    check_finite(total, name)
    folded = encode(total, codes, again=True)
    after = code_tensors(folded)
    if isinstance(residual, Tensor | Int8Codes):
        after += code_tensors(encode_residual(total.sub_(decode(folded, wide)), residual))
    pairs = zip(after, [*code_tensors(codes), *code_tensors(residual)], strict=True)
    return [torch.where(is_changed.to(old.device), new.to(old.device), old) for new, old in pairs]


def _add(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left @ right`` in place.

    On CUDA up to 32 vectors are added one by one, because a matrix product may use TF32.
    """
    if total.is_cuda and left.shape[-1] <= 32:
        for k in range(left.shape[-1]):
            total.addr_(left[:, k], right[k])
        return total
    with without_autocast(total.device.type):
        return total.addmm_(left, right)


def _empty_folded(codes: list[Tensor], kind: str, residual: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (*codes, *residual)]


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

    If there are factors, they are merged into it first, as in `times_merged`.
    """
    base = codes_from_tensors(kind, codes)
    if b is None or a is None:
        weight = decode(base, x.dtype)
    else:
        out_features, in_features = shape_of(base)
        weight = b.new_empty(out_features, in_features + (b.shape[1] if with_b else 0))
        merged = weight[:, :in_features]
        decode_into(merged, base)
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
    out_features, in_features = shape_of(codes_from_tensors(kind, codes))
    b_features = b.shape[1] if with_b and b is not None else 0
    return x.new_empty(x.shape[0], out_features if transposed else in_features + b_features)


# --- vmap: the mapped axis becomes a stack axis


def _leading(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _lead(tensors: list[Tensor], dims: Any, size: int) -> list[Tensor]:
    dims = [None] * len(tensors) if dims is None else dims
    return [_leading(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]


def _mapped_dequantize(info: Any, dims: Any, codes: list[Tensor], kind: str, dtype: torch.dtype) -> Any:
    return torch.ops.dynlora_fn.dequantize(_lead(codes, dims[0], info.batch_size), kind, dtype), 0


def _mapped_fold(
    info: Any,
    dims: Any,
    codes: list[Tensor],
    kind: str,
    residual: list[Tensor],
    left: Tensor,
    right: Tensor,
    rank: int,
    name: str,
) -> Any:
    size = info.batch_size
    codes, residual = _lead(codes, dims[0], size), _lead(residual, dims[2], size)
    left, right = _leading(left, dims[3], size), _leading(right, dims[4], size)
    new = torch.ops.dynlora_fn.fold_codes(codes, kind, residual, left, right, rank, name)
    return new, [0] * len(new)


_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("fold_codes", _fold_codes, "CompositeExplicitAutograd")
_LIBRARY.impl("times_codes", _times_codes, "CompositeExplicitAutograd")
# Fake kernels and not meta kernels, because a residual may be on another device than the codes.
for _name, _fake in (
    ("dequantize", _empty_dequantized),
    ("fold_codes", _empty_folded),
    ("times_codes", _empty_times_codes),
):
    torch.library.register_fake(f"dynlora_fn::{_name}", _fake, lib=_LIBRARY)
torch.library.register_vmap("dynlora_fn::dequantize", _mapped_dequantize, lib=_LIBRARY)
torch.library.register_vmap("dynlora_fn::fold_codes", _mapped_fold, lib=_LIBRARY)

"""Custom operations that add to or scale a quantized weight, and encode it again.

They change codes and residual together. Only one dense weight of a stack is alive at a time, and a compiler does not
inline the operations (see `_ops`). Rounding has no derivative, so tensors that require a gradient or have a tangent are
refused, and the error names the weight.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._torch import FakeTensor, call_below_autograd, is_recorded, tree_leaves
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.bases._ops import LIBRARY, all_leading, leading
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.bases._residual import Residual, residual_codes, residual_from_tensors, residual_tensors

LIBRARY.define(
    "fold_codes(Tensor[] codes, str kind, Tensor[] residual, Tensor left, Tensor right, float divisor, str name)"
    " -> Tensor[]"
)
LIBRARY.define("add_to_codes(Tensor[] codes, str kind, Tensor[] residual, Tensor change, str name) -> Tensor[]")
LIBRARY.define("scale_codes(Tensor[] codes, str kind, Tensor[] residual, Tensor factor, str name) -> Tensor[]")


def decode_exact(codes: Format, residual: Residual, dtype: torch.dtype) -> Tensor:
    """Return codes plus residual as a dense weight, in newly allocated memory.

    The result is on the device of the codes.
    """
    total, error = codes.decode(dtype), residual_codes(residual)
    if error is not None:
        return total + error.decode(dtype).to(total.device)
    return total.clone() if total is next(iter(codes)) else total


def _can_read(tensor: Tensor) -> bool:
    """Return whether the host can read the values of a tensor.

    It cannot on the meta device, for fake tensors, and not while a CUDA graph is captured.
    """
    is_empty = tensor.is_meta or isinstance(tensor, FakeTensor)
    return not (is_empty or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


def check_finite(weight: Tensor, name: str) -> None:
    """Raise ValueError if a weight is not finite.

    The check waits for the device. On the meta device, for fake tensors, and while a CUDA graph is captured, nothing is
    checked.
    """
    if not _can_read(weight):
        return
    smallest, largest = torch.aminmax(weight)
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        raise ValueError(
            f"weight {name!r} is not finite, with values from {smallest.item()} to {largest.item()}; a base in low"
            " precision stores finite values only, so check the weight and its last update"
        )


# --- the three changes of one member: find the rows that change, and compute the new weight


def _fold_codes(
    codes: list[Tensor], kind: str, residual: list[Tensor], left: Tensor, right: Tensor, divisor: float, name: str
) -> list[Tensor]:
    """Fold ``left @ right / divisor`` into codes and residual."""

    def fold(codes: Format, residual: Residual, left: Tensor, right: Tensor) -> list[Tensor]:
        is_changed = ((left != 0) & (right != 0).any(-1)).any(-1, keepdim=True)  # (out, 1)
        wide = widest(left.dtype, right.dtype)
        return _encode_again(
            codes,
            residual,
            is_changed,
            lambda: _add_product(decode_exact(codes, residual, wide), left.to(wide) / divisor, right.to(wide)),
            name,
        )

    return _each_member(fold, codes, kind, residual, [left, right])


def _add_to_codes(codes: list[Tensor], kind: str, residual: list[Tensor], change: Tensor, name: str) -> list[Tensor]:
    """Add a dense difference to codes and residual."""

    def add(codes: Format, residual: Residual, change: Tensor) -> list[Tensor]:
        is_changed = (change != 0).any(-1, keepdim=True)  # (out, 1)
        wide = widest(change.dtype)
        return _encode_again(
            codes, residual, is_changed, lambda: decode_exact(codes, residual, wide).add_(change), name
        )

    return _each_member(add, codes, kind, residual, [change])


def _scale_codes(codes: list[Tensor], kind: str, residual: list[Tensor], factor: Tensor, name: str) -> list[Tensor]:
    """Multiply the weight by a factor, of shape () or (*stack)."""
    stack = codes[0].shape[:-2]
    factors = factor.reshape(factor.shape + (1,) * (len(stack) - factor.ndim)).expand(stack)

    def scale(codes: Format, residual: Residual, factor: Tensor) -> list[Tensor]:
        wide = widest(factor.dtype)
        return _encode_again(
            codes, residual, factor != 1, lambda: decode_exact(codes, residual, wide).mul_(factor), name
        )

    return _each_member(scale, codes, kind, residual, [factors])


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left @ right`` in place.

    On CUDA up to 32 vectors are added one by one, because a matrix product may use TF32.
    """
    if total.is_cuda and left.shape[-1] <= 32:
        for k in range(left.shape[-1]):
            total.addr_(left[:, k], right[k])
        return total
    with without_autocast(total.device.type):
        return total.addmm_(left, right)


# --- shared by the three changes


def _each_member(
    change: Callable[..., list[Tensor]],
    codes: list[Tensor],
    kind: str,
    residual: list[Tensor],
    operands: Sequence[Tensor],
) -> list[Tensor]:
    """Call ``change(codes, residual, *operands)`` for each member of a stack.

    Return the new tensors of codes and residual, with the axes of the stack.
    """
    old, split = [*codes, *residual], len(codes)
    new = _empty_like(codes, kind, residual)
    stack = codes[0].shape[:-2]
    olds, news, parts = ([_members(tensor, stack) for tensor in group] for group in (old, new, operands))
    for index in range(stack.numel()):
        member = [members[index] for members in olds]
        before = codes_from_tensors(kind, member[:split]), residual_from_tensors(member[split:])
        after = change(*before, *(members[index] for members in parts))
        for members, tensor in zip(news, after, strict=True):
            members[index].copy_(tensor)
    return new


def _members(tensor: Tensor, stack: torch.Size) -> Tensor:
    """Flatten the axes of the stack into one leading axis."""
    return tensor.reshape(stack.numel(), *tensor.shape[len(stack) :])


def _encode_again(
    codes: Format, residual: Residual, is_changed: Tensor, new_weight: Callable[[], Tensor], name: str
) -> list[Tensor]:
    """Return the tensors of codes and residual of a new weight.

    Rows that do not change keep every bit. If the format ties rows together, all rows are encoded again if one changes.
    """
    is_changed = is_changed.any() if codes.is_tied else is_changed
    old = [*codes, *residual_tensors(residual)]
    is_empty = not codes.shape.numel()  # on a process without rows
    if is_empty or (_can_read(is_changed) and not is_changed.any()):
        return old
    total = new_weight()
    check_finite(total, name)
    encoded, error = codes.encode(total, again=True), residual_codes(residual)
    new = list(encoded)
    if error is not None:
        new += error.encode_error(total.sub_(encoded.decode(total.dtype)))
    return [
        torch.where(is_changed.to(before.device), after.to(before.device), before)
        for after, before in zip(new, old, strict=True)
    ]


def _empty_like(codes: list[Tensor], kind: str, residual: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (*codes, *residual)]


# --- vmap: the mapped axis becomes a stack axis


def _mapped_fold(
    info: Any,
    dims: Any,
    codes: list[Tensor],
    kind: str,
    residual: list[Tensor],
    left: Tensor,
    right: Tensor,
    divisor: float,
    name: str,
) -> Any:
    size = info.batch_size
    codes, residual = all_leading(codes, dims[0], size), all_leading(residual, dims[2], size)
    left, right = leading(left, dims[3], size), leading(right, dims[4], size)
    new = torch.ops.dynlora_fn.fold_codes(codes, kind, residual, left, right, divisor, name)
    return new, [0] * len(new)


def _mapped_add(
    info: Any, dims: Any, codes: list[Tensor], kind: str, residual: list[Tensor], change: Tensor, name: str
) -> Any:
    size = info.batch_size
    codes, residual = all_leading(codes, dims[0], size), all_leading(residual, dims[2], size)
    new = torch.ops.dynlora_fn.add_to_codes(codes, kind, residual, leading(change, dims[3], size), name)
    return new, [0] * len(new)


def _mapped_scale(
    info: Any, dims: Any, codes: list[Tensor], kind: str, residual: list[Tensor], factor: Tensor, name: str
) -> Any:
    size = info.batch_size
    codes, residual = all_leading(codes, dims[0], size), all_leading(residual, dims[2], size)
    new = torch.ops.dynlora_fn.scale_codes(codes, kind, residual, leading(factor, dims[3], size), name)
    return new, [0] * len(new)


# --- autograd


def _refuse_gradients(name: str) -> Callable[..., list[Tensor]]:
    """Return the autograd kernel of an operation on codes, which refuses gradients.

    The last argument of the operation is the name of the weight.
    """

    def kernel(keys: Any, *args: Any) -> list[Tensor]:
        if is_recorded([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]):
            refuse("gradient, fold", name=args[-1])
        new: list[Tensor] = call_below_autograd(getattr(torch.ops.dynlora_fn, name).default, keys, *args)
        return new

    return kernel


for _name, _implementation, _mapped in (
    ("fold_codes", _fold_codes, _mapped_fold),
    ("add_to_codes", _add_to_codes, _mapped_add),
    ("scale_codes", _scale_codes, _mapped_scale),
):
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _refuse_gradients(_name), "Autograd", with_keyset=True)
    # Fake kernels instead of meta kernels, because a residual may be on another device than the codes.
    torch.library.register_fake(f"dynlora_fn::{_name}", _empty_like, lib=LIBRARY)
    torch.library.register_vmap(f"dynlora_fn::{_name}", _mapped, lib=LIBRARY)

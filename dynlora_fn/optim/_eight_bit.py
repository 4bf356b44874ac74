"""An optimizer's moments in 8 bit, as torchao holds them (arXiv:2110.02861), in plain tensors.

Blocks of 256 numbers, one after the other through the whole tensor, share a scale. The codes of both kinds hold zero
exactly, whatever the scale, so that a vector is reset without touching what shares its blocks.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn.bases import _torchao
from dynlora_fn.bases._torchao import decode_8bit, encode_8bit

_BLOCK = 256
_LEAST = 4096  # smaller tensors stay as they are, as those that the blocks do not divide: torchao's rule


class SignedMoment(NamedTuple):
    """The inner tensors of torchao's OptimState8bit, of means."""

    codes: UInt8[Tensor, "*shape"]
    scale: Float[Tensor, " blocks"]


class UnsignedMoment(NamedTuple):
    """The same, of means of squares."""

    codes: UInt8[Tensor, "*shape"]
    scale: Float[Tensor, " blocks"]


_Moment = SignedMoment | UnsignedMoment


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _values(is_signed: bool) -> tuple[float, ...]:
    """What each of the 256 codes stands for, beside the scale."""
    return tuple(_torchao.get_qmap_signed() if is_signed else _torchao.get_qmap_unsigned())


def _table(moment: _Moment) -> Tensor:
    values = _values(isinstance(moment, SignedMoment))
    return torch.tensor(values, dtype=torch.float32, device=moment.codes.device)


def empty_moment(leaf: Tensor, kind: type[_Moment]) -> Any:
    """Zeros for the moments of a tensor: codes if it is large enough, else float32 or the dtype of a wider tensor."""
    if leaf.numel() < _LEAST or leaf.numel() % _BLOCK:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
    zero = _values(kind is SignedMoment).index(0)
    codes = torch.full_like(leaf, zero, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return kind(codes, torch.zeros(leaf.numel() // _BLOCK, device=leaf.device))


def decode_moments(tree: Any) -> Any:
    """The tree with tensors for codes."""

    def decode(leaf: Any) -> Any:
        return decode_8bit(leaf.codes, _table(leaf), leaf.scale) if isinstance(leaf, _Moment) else leaf

    return tree_map(decode, tree, is_leaf=_is_moment)


def encode_moments(tree: Any, like: Any) -> Any:
    """The tree with codes wherever `like` has them."""

    def encode(old: Any, leaf: Tensor) -> Any:
        if not isinstance(old, _Moment):
            return leaf
        return type(old)(*encode_8bit(leaf.contiguous(), _table(old), _BLOCK))

    return tree_map(encode, like, tree, is_leaf=_is_moment)


def reset_moment(moment: _Moment, is_reset: Tensor) -> _Moment:
    """Exactly zero where `is_reset`, which broadcasts against the codes; all else keeps its bits."""
    zero = _values(isinstance(moment, SignedMoment)).index(0)
    return type(moment)(torch.where(is_reset, zero, moment.codes.int()).to(torch.uint8), moment.scale)


def _is_moment(leaf: Any) -> bool:
    return isinstance(leaf, _Moment)

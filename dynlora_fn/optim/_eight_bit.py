"""Moments of an optimizer in 8 bits, in plain tensors.

The format is torchao's (arXiv:2110.02861). Blocks of 256 consecutive entries share a scale. Both tables of values
contain zero, so a vector can be reset exactly without changing other entries of its blocks.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import ShardedFactors, is_factors, sides_of, with_sides
from dynlora_fn.bases import _torchao
from dynlora_fn.bases._torchao import decode_8bit, encode_8bit

_BLOCK = 256
_MIN_NUMEL = 4096  # torchao keeps smaller tensors in full precision, and tensors that blocks do not divide


class SignedMoment(NamedTuple):
    """A mean of gradients in 8 bits: the inner tensors of torchao's OptimState8bit."""

    codes: UInt8[Tensor, "*shape"]
    scale: Float[Tensor, " blocks"]


class UnsignedMoment(NamedTuple):
    """A mean of squared gradients in 8 bits: the inner tensors of OptimState8bit."""

    codes: UInt8[Tensor, "*shape"]
    scale: Float[Tensor, " blocks"]


_Moment = SignedMoment | UnsignedMoment


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _values(is_signed: bool) -> tuple[float, ...]:
    """Return the values of the 256 codes, before they are multiplied by a scale."""
    with torch.device("cpu"):  # torchao computes them with tensors
        return tuple(_torchao.get_qmap_signed() if is_signed else _torchao.get_qmap_unsigned())


def _table(moment: _Moment) -> Tensor:
    values = _values(isinstance(moment, SignedMoment))
    return torch.tensor(values, dtype=torch.float32, device=moment.codes.device)


def empty_moments(leaf: Any, kind: type[_Moment]) -> Any:
    """Return zeros for the moment of a tensor or of factors.

    Large tensors get codes. Other tensors get float32, or the tensor's dtype if that is wider. Shards that differ in
    size between processes never get codes, because blocks might divide them only on some processes.
    """
    if not isinstance(leaf, ShardedFactors):
        return tree_map(partial(_empty_moment, kind=kind), leaf)
    sharding = leaf.sharding
    b, a = (
        _empty_moment(side, kind, is_even=size % sharding.world_size == 0)
        for side, size in ((leaf.b, sharding.rows), (leaf.a, sharding.as_columns.rows))
    )
    return leaf._replace(b=b, a=a)


def _empty_moment(leaf: Tensor, kind: type[_Moment], *, is_even: bool = True) -> Any:
    if not is_even or leaf.numel() < _MIN_NUMEL or leaf.numel() % _BLOCK:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
    zero = _values(kind is SignedMoment).index(0)
    codes = torch.full_like(leaf, zero, dtype=torch.uint8, memory_format=torch.contiguous_format)
    return kind(codes, torch.zeros(leaf.numel() // _BLOCK, dtype=torch.float32, device=leaf.device))


def decode_moments(tree: Any) -> Any:
    """Decode all 8-bit moments of a tree to float32."""

    def decode(leaf: Any) -> Any:
        return decode_8bit(leaf.codes, _table(leaf), leaf.scale) if isinstance(leaf, _Moment) else leaf

    return tree_map(decode, tree, is_leaf=is_eight_bit)


def encode_moments(tree: Any, like: Any, name: str) -> Any:
    """Encode the sides of a moment that `like` has as codes.

    Scales are in float32, also for a moment that was computed in a wider dtype.

    Args:
        tree: The moment of one parameter, a tensor or factors.
        like: The moment before the update.
        name: The name of the parameter, for error messages.

    Raises:
        NotImplementedError: If a tensor to encode requires a gradient or has a tangent.
    """

    def encode(old: Any, leaf: Tensor) -> Any:
        if not isinstance(old, _Moment):
            return leaf
        if is_attached(leaf):
            raise NotImplementedError(
                f"a moment of {name!r} in 8 bits requires a gradient or has a tangent, which does not pass through"
                " rounding; use moments='float32', or detach the gradients of the update"
            )
        return type(old)(*encode_8bit(leaf.float().contiguous(), _table(old), _BLOCK))

    if is_factors(like):  # not `tree_map` of two trees, which Dynamo of torch 2.11 cannot compare
        return with_sides(tree, [*map(encode, sides_of(like), sides_of(tree))])
    return encode(like, tree)


def reset_moment(moment: _Moment, is_reset: Tensor) -> _Moment:
    """Set entries to exactly zero where `is_reset` is true, and keep all other bits.

    `is_reset` broadcasts against the codes.
    """
    zero = _values(isinstance(moment, SignedMoment)).index(0)
    return type(moment)(torch.where(is_reset, zero, moment.codes.int()).to(torch.uint8), moment.scale)


def moment_shape(moment: Any) -> tuple[int, ...]:
    """Return the shape of a moment, also of an 8-bit moment."""
    return tuple((moment.codes if is_eight_bit(moment) else moment).shape)


def is_eight_bit(leaf: Any) -> bool:
    """Return whether a moment is stored in 8 bits."""
    return isinstance(leaf, _Moment)

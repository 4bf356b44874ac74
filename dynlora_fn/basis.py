"""Vectors that are regenerated from ``(seed, side, index)`` instead of being stored.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain int64 tensor
operations: no state, no memory, the same bits on every device and for every number of threads, eager and compiled.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora_fn.types import Side

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SIDE_WORD = {"b": 0, "a": 1}

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product.

    By 16-bit halves, since a 64-bit product overflows int64, which Inductor does not compile faithfully on CPU.
    """
    low = (word & 0xFFFF) * constant
    middle = (word >> 16) * constant + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox-4x32-10: four random 32-bit words for each counter and key, which broadcast against each other.

    Args:
        counter: four int64 tensors with values in [0, 2**32).
        key: two int64 tensors with values in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).

    Example:
        >>> zero = torch.tensor(0)
        >>> [f"{word.item():08x}" for word in philox((zero, zero, zero, zero), (zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


class Request(NamedTuple):
    """Vectors number `indices` of one side of the basis named `seed`; of each basis of a stack, the same ones if
    `indices` has no stack axes."""

    seed: Int[Tensor, "*stack"]
    side: Side
    indices: Int[Tensor, "*stack count"]
    length: int  # numbers in a vector


def uniform(requests: Sequence[Request]) -> list[Float[Tensor, "*stack count length"]]:
    """The vectors of each request, uniform in [-1, 1). Every value is a multiple of 2**-23, hence exact in float32.

    All requests go through Philox together: one kernel when compiled, which for ten rounds is slow to compile.
    """
    words = [_words(request) for request in requests]
    *counter, key_low, key_high = (torch.cat([part.flatten() for part in parts]) for parts in zip(*words, strict=True))
    bits = torch.stack(philox((counter[0], counter[1], counter[2], counter[3]), (key_low, key_high)), dim=-1)
    units = (bits >> 8).to(torch.float32) * 2.0**-23 - 1  # (blocks of all requests, 4)
    shapes = [parts[0].shape for parts in words]
    return [
        part.reshape(*shape[:-1], 4 * shape[-1])[..., : request.length]
        for part, shape, request in zip(
            torch.split(units, [shape.numel() for shape in shapes]), shapes, requests, strict=True
        )
    ]


def _words(request: Request) -> list[Tensor]:
    """Counter and key words of each block of four numbers: six tensors (*stack, count, blocks)."""
    blocks = torch.arange(-(-request.length // 4), device=request.indices.device)
    side = torch.full_like(blocks, _SIDE_WORD[request.side])
    indices, seed = request.indices[..., None], request.seed[..., None, None]
    words = (blocks, indices & _MASK, (indices >> 32) & _MASK, side, seed & _MASK, (seed >> 32) & _MASK)
    return torch.broadcast_tensors(*words)  # type: ignore[no-untyped-call, no-any-return]


class Bounds(NamedTuple):
    """Half the width of the uniform distribution that the vectors of each side are drawn from."""

    b: float
    a: float


def basis_bounds(out_features: int, in_features: int, rank: int) -> Bounds:
    """The bounds of SwitchLoRA's initialisation (arXiv:2406.06564, eq. 3): sqrt(3) times the standard deviations.

    Both sides are non-zero, so that a vector that comes in meets a counterpart that can be trained at once.
    """
    gain = 1 / math.sqrt(3)  # of leaky_relu with a negative slope of sqrt(5)
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * gain**0.5
    std_a = (math.sqrt(out_features) * rank / in_features**1.5) ** 0.25 * gain**0.5
    return Bounds(b=math.sqrt(3) * std_b, a=math.sqrt(3) * std_a)

"""Generate basis vectors from ``(seed, side, index)`` instead of storing them.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain int64
tensor operations. It has no state and uses no memory. Its bits are the same on every device, for every number of
threads, eager and compiled.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynlora_fn._core._check import check_integer, check_number
from dynlora_fn._core._torch import are_immediate
from dynlora_fn._core._types import Side

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SIDE_WORD = {"b": 0, "a": 1}

# How many blocks of four numbers are drawn at a time, so that their words stay in a cache.
_TILE = 2**16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 32 x 32 bit product.

    The product is formed from 16-bit halves. A 64-bit product overflows int64, which Inductor compiles wrongly on CPU.
    """
    low = (word & 0xFFFF) * constant
    middle = (word >> 16) * constant + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Generate four random 32-bit words for each counter and key.

    This is Philox-4x32-10. Counters and keys broadcast against each other.

    Args:
        counter: The four words of the counters, int64 tensors with values in [0, 2**32).
        key: The two words of the keys, int64 tensors with values in [0, 2**32).

    Returns:
        Four int64 tensors with values in [0, 2**32).

    Example:
        >>> import torch
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


def _philox_of_grid(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Generate the words of `philox` for a grid of counters and keys, in eager mode.

    Counters and keys broadcast to the grid, and most operations are in place. A product wraps around in int64, which
    keeps all of its 64 bits: the low word and, above it, the high word. Where a word is not multiplied next, the bits
    above its 32 stay until a mask removes them.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(2):  # before the third round, most words still have only one row or one column
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 32 ^ (c1 ^ k0)) & _MASK, (product0 >> 32 ^ (c3 ^ k1)) & _MASK
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    high, c3 = torch.empty_like(c0), c3.expand_as(c0).clone(memory_format=torch.contiguous_format)
    for _ in range(8):
        c0.mul_(_MULTIPLIERS[0])
        c2.mul_(_MULTIPLIERS[1])
        c1.bitwise_xor_(torch.bitwise_right_shift(c2, 32, out=high)).bitwise_xor_(k0).bitwise_and_(_MASK)
        c3.bitwise_xor_(torch.bitwise_right_shift(c0, 32, out=high)).bitwise_xor_(k1).bitwise_and_(_MASK)
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def next_seeds(seeds: Sequence[Int[Tensor, "*stack"]], ranks: Sequence[int]) -> list[Int[Tensor, "*stack"]]:
    """Return the seeds of new bases for weights whose rank changes.

    A schedule numbers the vectors that enter from the rank on. At another rank, the old seed would give some of its
    vectors to a weight a second time.

    Args:
        seeds: The seeds of the weights, each with the stack axes of its weight.
        ranks: The new rank of each weight.
    """
    flat = [seed.flatten() for seed in seeds]
    rank = torch.cat([torch.full_like(seed, rank) for seed, rank in zip(flat, ranks, strict=True)])
    seed, zero = torch.cat(flat), torch.zeros_like(rank)
    key = seed & _MASK, (seed >> 32) & _MASK
    high, low, *_ = philox((rank, zero, zero, zero + len(_SIDE_WORD)), key)  # no vector has this last word
    new = torch.split((high >> 1) << 32 | low, [seed.numel() for seed in seeds])
    return [each.reshape(seed.shape).clone() for each, seed in zip(new, seeds, strict=True)]


class Request(NamedTuple):
    """The vectors of one side of a basis, named by their indices.

    `seed` names the basis, or a stack of bases. If `indices` has no stack axes, it applies to every basis of the stack.
    """

    seed: Int[Tensor, "*stack"]
    side: Side
    indices: Int[Tensor, "*#stack count"]
    length: int  # numbers in a vector


def uniform(requests: Sequence[Request]) -> list[Float[Tensor, "*stack count length"]]:
    """Return the vectors of each request, uniform in [-1, 1).

    Every value is a multiple of 2**-23, hence exact in float32. All requests go through Philox together, so a compiled
    step has one kernel for them: the ten rounds are slow to compile. In eager mode on a CPU the numbers are drawn in
    tiles. Otherwise each of about a hundred operations would write words for all numbers to memory.
    """
    by_length = sorted(range(len(requests)), key=lambda position: requests[position].length)
    ordered = [requests[position] for position in by_length]
    tables = [_vectors(request) for request in ordered]
    index, side, seed = (torch.cat([column.flatten() for column in columns]) for columns in zip(*tables, strict=True))
    sizes = [(table[0].numel(), -(-request.length // 4)) for table, request in zip(tables, ordered, strict=True)]
    draw = _draw_in_tiles if index.is_cpu and are_immediate([index, seed]) else _draw
    units = draw(sizes, index, side, seed)
    vectors = {}
    chunks = torch.split(units, [count * blocks for count, blocks in sizes])
    for position, chunk, table, (_, blocks) in zip(by_length, chunks, tables, sizes, strict=True):
        vectors[position] = chunk.reshape(*table[0].shape, 4 * blocks)[..., : requests[position].length]
    return [vectors[position] for position in range(len(requests))]


def _draw(sizes: Sequence[tuple[int, int]], index: Tensor, side: Tensor, seed: Tensor) -> Tensor:
    """Return four numbers for each block of each vector.

    They depend only on the block and on the index, side and seed of its vector, which are looked up for each block.
    Storing their words for every block would take three times the memory of the numbers.

    Args:
        sizes: For each request, the number of vectors and the number of blocks in a vector.
        index: The index of each vector, int64.
        side: The word of the side of each vector, int64.
        seed: The seed of each vector, int64.
    """
    vector, block = _positions(sizes, index.device)
    index, side, seed = index[vector], side[vector], seed[vector]
    words = philox((block.long(), index & _MASK, (index >> 32) & _MASK, side), (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack([(word >> 8).to(torch.float32) * 2.0**-23 - 1 for word in words], dim=-1)


def _draw_in_tiles(sizes: Sequence[tuple[int, int]], index: Tensor, side: Tensor, seed: Tensor) -> Tensor:
    """Return the numbers of `_draw`, drawn a few vectors at a time into one tensor."""
    units = torch.empty(sum(count * blocks for count, blocks in sizes), 4, dtype=torch.float32, device=index.device)
    columns = index & _MASK, (index >> 32) & _MASK, side, seed & _MASK, (seed >> 32) & _MASK
    table, vector, block = torch.stack(columns, dim=-1), 0, 0
    for length, group in itertools.groupby(sizes, key=lambda size: size[1]):
        count = sum(size[0] for size in group)
        grid = units[block : block + count * length].view(count, length, 4)
        rows = max(_TILE // length, 1)
        for tile, vectors in zip(
            torch.split(grid, rows), torch.split(table[vector : vector + count], rows), strict=True
        ):
            for start in range(0, length, _TILE):
                _fill(tile[:, start : start + _TILE], vectors, start)
        vector, block = vector + count, block + count * length
    return units


def _fill(tile: Tensor, vectors: Tensor, start: int) -> None:
    """Write the numbers of vectors into `tile` (count, blocks, 4).

    The tile begins at block `start` of each vector. A row of `vectors` has the words of index, side and seed.
    """
    low, high, side, key0, key1 = (column[:, None] for column in vectors.unbind(-1))
    block = torch.arange(start, start + tile.shape[1], device=tile.device)
    for position, word in enumerate(_philox_of_grid((block, low, high, side), (key0, key1))):
        tile[..., position] = word.bitwise_right_shift_(8).bitwise_and_(_MASK >> 8)
    tile.mul_(2.0**-23).sub_(1)


def _vectors(request: Request) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, side and seed of each vector: three tensors (*stack, count)."""
    index, seed = torch.broadcast_tensors(request.indices, request.seed[..., None])  # type: ignore[no-untyped-call]
    return index, torch.full_like(index, _SIDE_WORD[request.side]), seed


def _positions(sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the vector of each block of four numbers, and the block's place in it.

    `sizes` gives, for each request, the number of vectors and the number of blocks in a vector. Neighboring requests of
    equal length are treated as one.
    """
    vectors, blocks, first = [], [], 0
    for length, group in itertools.groupby(sizes, key=lambda size: size[1]):
        count = sum(size[0] for size in group)
        vector, block = (torch.arange(stop, dtype=torch.int32, device=device) for stop in (count, length))
        vectors.append((first + vector)[:, None].expand(count, length).flatten())
        blocks.append(block.expand(count, length).flatten())
        first += count
    return torch.cat(vectors), torch.cat(blocks)


class Bounds(NamedTuple):
    """The bound of each side, whose vectors are uniform in [-bound, bound)."""

    b: float
    a: float


def basis_bounds(out_features: int, in_features: int, rank: int, *, alpha: float = 1) -> Bounds:
    """Return the bounds of SwitchLoRA's initialization.

    Both bounds are above 0, so an incoming vector meets a counterpart that is not zero and gets a gradient at once. A
    bound is sqrt(3) times the standard deviation in arXiv:2406.06564, eq. 3, with ``gain = 1 / sqrt(3)``::

        std_b = (rank / sqrt(out * in)) ** (1 / 4) * sqrt(gain)
        std_a = (sqrt(out) * rank / in ** (3 / 2)) ** (1 / 4) * sqrt(gain)

    Both are divided by ``sqrt(alpha)``, so that ``alpha / rank * b @ a`` is of the same size for every alpha.

    Args:
        out_features: The number of rows of the weight.
        in_features: The number of columns of the weight.
        rank: The rank of the factors.
        alpha: The scale of the product, above 0. The weight is ``base + alpha / rank * b @ a``.

    Returns:
        The bounds of side b and side a.

    Raises:
        TypeError: If a size is not an integer, or `alpha` is not a number.
        ValueError: If a size is less than 1, or `alpha` is not finite and above 0.

    Example:
        >>> bounds = basis_bounds(16, 16, 4)
        >>> round(bounds.b, 4), round(bounds.a, 4)
        (0.9306, 0.9306)
    """
    out_features = check_integer("out_features", out_features, least=1)
    in_features, rank = check_integer("in_features", in_features, least=1), check_integer("rank", rank, least=1)
    gain = 1 / math.sqrt(3)  # the gain of leaky_relu with a negative slope of sqrt(5)
    std_b = (rank / math.sqrt(out_features * in_features)) ** 0.25 * gain**0.5
    std_a = (math.sqrt(out_features) * rank / in_features**1.5) ** 0.25 * gain**0.5
    root = math.sqrt(check_number("alpha", alpha, above=0))
    return Bounds(b=math.sqrt(3) * std_b / root, a=math.sqrt(3) * std_a / root)

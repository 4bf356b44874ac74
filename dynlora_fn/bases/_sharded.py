"""Gather the rows of a sharded base, or map a function over its tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from dynlora_fn._core._collectives import gather
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._formats import code_tensors, codes_from_tensors, kind_of
from dynlora_fn.bases._types import FoldedBase, LocalBase, Sharded


def gather_base(base: FoldedBase) -> LocalBase:
    """Return the base with all rows, its residual included.

    Collective if the base is sharded: call it on every process.
    """
    if not isinstance(base, Sharded):
        return base
    return map_rows(gather, base.base, base.sharding)


RowMap: TypeAlias = Callable[[Tensor, Sharding], Tensor]


def map_rows(change: RowMap, base: LocalBase, sharding: Sharding) -> LocalBase:
    """Apply `change` to every tensor that has the rows of the base."""
    if isinstance(base, Tensor):
        return change(base, sharding)
    kind, residual = kind_of(base.codes), tree_map(lambda leaf: change(leaf, sharding), base.residual)
    return base._replace(
        codes=codes_from_tensors(kind, map_code_rows(change, kind, code_tensors(base.codes), sharding)),
        residual=residual,
    )


def map_code_rows(change: RowMap, kind: str, tensors: Sequence[Tensor], sharding: Sharding) -> list[Tensor]:
    """Apply `change` to every tensor of codes that has the rows of the base.

    The scales of nf4, and their factors, have one axis in row order. Every process has equally many, so they are
    treated as one row for each process.
    """
    if kind != "nf4":
        return [change(tensor, sharding) for tensor in tensors]
    codes, *blocks, mean = tensors
    shards = codes.shape[-2] // sharding.rows_per_process  # all shards, or 1 if the codes are one shard
    processes = replace(sharding, rows=sharding.world_size)
    blocks = [change(block.reshape(*block.shape[:-1], shards, -1), processes).flatten(-2) for block in blocks]
    return [change(codes, sharding), *blocks, mean]

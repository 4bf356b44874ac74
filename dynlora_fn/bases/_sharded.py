"""Rows of a sharded base: gather them, or map a function over them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor

from dynlora_fn._core._collectives import gather
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Frozen, Sharding
from dynlora_fn.bases._formats import code_tensors, codes_from_tensors, kind_of
from dynlora_fn.bases._types import FoldedBase, LocalBase, Sharded


def gather_base(base: FoldedBase) -> LocalBase:
    """The base with all of its rows, and its residual with all of its own."""
    if not isinstance(base, Sharded):
        return base
    return map_rows(gather, base.base, base.sharding)


RowMap: TypeAlias = Callable[[Tensor, Sharding], Tensor]


def map_rows(change: RowMap, base: LocalBase, sharding: Sharding) -> LocalBase:
    """`change` of every tensor that has the base's rows."""
    if isinstance(base, Tensor):
        return change(base, sharding)
    kind, residual = kind_of(base.codes), tree_map(lambda leaf: change(leaf, sharding), base.residual)
    return base._replace(
        codes=codes_from_tensors(kind, map_code_rows(change, kind, code_tensors(base.codes), sharding)),
        residual=residual,
    )


def map_code_rows(change: RowMap, kind: str, tensors: Sequence[Tensor], sharding: Sharding) -> list[Tensor]:
    """The same of the tensors of codes. nf4's scales, and their factors, lie row after row in a single axis: a process
    has as many as any other, and its own are the row that it has."""
    if kind != "nf4":
        return [change(tensor, sharding) for tensor in tensors]
    codes, *blocks, mean = tensors
    held = codes.shape[-2] // sharding.rows_per_process  # the shares of all processes, or that of this one
    processes = replace(sharding, rows=sharding.world_size)
    blocks = [change(block.reshape(*block.shape[:-1], held, -1), processes).flatten(-2) for block in blocks]
    return [change(codes, sharding), *blocks, mean]


def factor_shardings(frozen: Mapping[str, Frozen | Tensor]) -> dict[str, Sharding]:
    """Of all sharded factors by name."""
    held = {
        name: leaf.base.sharding
        for name, leaf in frozen.items()
        if isinstance(leaf, Frozen) and isinstance(leaf.base, Sharded)
    }
    return {name: sharding for name, sharding in held.items() if sharding.columns is not None}

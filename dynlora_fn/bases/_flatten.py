"""The constants and tensors of a base that products read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._collectives import gather
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.bases._refusals import refuse_attached, refuse_mapped


class Layout(NamedTuple):
    """The constants with which codes are rebuilt from their tensors.

    A compiled graph can contain all of them.
    """

    kind: str  # `Format.kind` of the codes
    sharding: tuple[Any, ...] | None = None  # the fields of the `Sharding` of the base; None if it has all rows
    factor_sharding: tuple[Any, ...] | None = None  # the same for the factors of the product
    is_transposed: bool = False
    alpha: float = 1.0  # of the factors of the product


class Flattened(NamedTuple):
    """The layout and the tensors of the codes that a base stores."""

    layout: Layout
    tensors: list[Tensor]


def gather_codes(layout: Layout, tensors: Sequence[Tensor]) -> Format:
    """Rebuild the codes, with all rows.

    A sharded base is all-gathered in its storage format. In that case this is collective: call it on every process.
    """
    codes = codes_from_tensors(layout.kind, tensors)
    return codes.map_rows(gather_rows, Sharding(*layout.sharding)) if layout.sharding else codes


def refuse_differentiated(layout: Layout, tensors: Sequence[Tensor], what: str) -> None:
    """Refuse shards and codes that require a gradient or have a tangent.

    Products refuse them too, but do not know the name of the weight. A caller that does passes it in `what`.
    """
    if layout.sharding:
        refuse_attached("gradient, sharded base", tensors, what=what)
    if layout.kind != "plain":
        refuse_attached("gradient, codes", tensors, what=what, kind=layout.kind)


def gather_rows(shard: Tensor, sharding: Sharding) -> Tensor:
    """All-gather the rows of a base. Collective: call it on every process."""
    refuse_mapped("vmap, sharded base", shard)
    refuse_attached("gradient, sharded base", shard, what="the base")
    return gather(shard, sharding)

"""Split a base into constants and the tensors that products read."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._collectives import gather
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases._formats import Codes, code_tensors, codes_from_tensors, kind_of
from dynlora_fn.bases._sharded import map_code_rows
from dynlora_fn.bases._types import FoldedBase, Quantized, Sharded, Transposed


class Layout(NamedTuple):
    """How to rebuild codes from their tensors.

    All fields are constants, so a graph can contain them.
    """

    kind: str  # of the format of the codes
    sharding: tuple[Any, ...] | None = None  # the fields of `Sharding`, if these are the rows of this process
    factor_sharding: tuple[Any, ...] | None = None  # of the factors that are multiplied with the codes
    is_transposed: bool = False


def flatten_base(base: FoldedBase | Transposed) -> tuple[Layout, list[Tensor]]:
    """Return the layout and the tensors of the codes, as they are stored.

    `gather_codes` reverses it.
    """
    if isinstance(base, Transposed):
        layout, tensors = flatten_base(base.base)
        return layout._replace(is_transposed=True), tensors
    local, sharding = (base.base, astuple(base.sharding)) if isinstance(base, Sharded) else (base, None)
    codes = local.codes if isinstance(local, Quantized) else local
    return Layout(kind_of(codes), sharding), code_tensors(codes)


def gather_codes(layout: Layout, tensors: Sequence[Tensor]) -> Codes:
    """Return the codes with all rows.

    A sharded base is all-gathered in its storage format. Collective in that case: call it on every process.
    """
    if layout.sharding:
        tensors = map_code_rows(gather, layout.kind, tensors, Sharding(*layout.sharding))
    return codes_from_tensors(layout.kind, tensors)

"""A base as constants and the tensors that products read."""

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
    """How tensors make up what products see of a base: constants alone, so that it goes along with them in a graph."""

    kind: str  # of the codes
    sharding: tuple[Any, ...] | None = None  # the fields of it, if these are rows of this process alone
    is_transposed: bool = False


def flatten_base(base: FoldedBase | Transposed) -> tuple[Layout, list[Tensor]]:
    """The tensors of a base that products see, as they are held; `whole_codes` makes codes of them."""
    if isinstance(base, Transposed):
        layout, tensors = flatten_base(base.base)
        return layout._replace(is_transposed=True), tensors
    held, sharding = (base.base, astuple(base.sharding)) if isinstance(base, Sharded) else (base, None)
    codes = held.codes if isinstance(held, Quantized) else held
    return Layout(kind_of(codes), sharding), code_tensors(codes)


def gather_codes(layout: Layout, tensors: Sequence[Tensor]) -> Codes:
    """The codes, gathered if need be, in the very bytes that the processes hold."""
    if layout.sharding:
        tensors = map_code_rows(gather, layout.kind, tensors, Sharding(*layout.sharding))
    return codes_from_tensors(layout.kind, tensors)

"""Bytes that processes send in one step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import Factors, Frozen, Plans, Sharding, Trainable
from dynlora_fn.bases._flatten import flatten_base
from dynlora_fn.bases._sharded import factor_shardings, map_code_rows
from dynlora_fn.bases._types import Deferred, Sharded


class WireBytes(NamedTuple):
    """Bytes of a step that processes reduce, gather and scatter, by kind. By the ring algorithms, each of n processes
    sends ``2 (n - 1) / n`` of what is reduced and ``(n - 1) / n`` of what is gathered or scattered. Nothing is sent for
    switching, unless factors are sharded."""

    factors: int  # gradients, reduced
    full_rank: int  # likewise
    bases: int  # gathered
    gathered: int = 0  # sharded factors
    scattered: int = 0  # their gradients, reduced
    switched: int = 0  # rows of theirs, gathered to be folded into bases

    @property
    def reduced(self) -> int:
        return self.factors + self.full_rank


def wire_bytes(
    trainable: Trainable,
    frozen: Mapping[str, Frozen | Tensor] | None = None,
    *,
    gathers: int = 2,
    plan: Plans | None = None,
) -> WireBytes:
    """What data-parallel processes reduce and gather in a step, from the shapes and dtypes of its tensors alone.

    Args:
        trainable: what gradients are taken of.
        frozen: the rest, of which sharded bases are gathered.
        gathers: of each base in a step, and of sharded factors: two for each backward pass, three where `remat`
            computes its block again.
        plan: of a step that switches.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 64), rank=8, seed=0, targets=["weight"])
        >>> dl.parallel.wire_bytes(dl.partition(params).trainable)  # 4,352 by full-rank training
        WireBytes(factors=4096, full_rank=256, bases=0, gathered=0, scattered=0, switched=0)
    """
    shardings = factor_shardings(frozen or {})
    whole = [leaf for name, leaf in trainable.items() if isinstance(leaf, Factors) and name not in shardings]
    full_rank = [leaf for leaf in trainable.values() if isinstance(leaf, Tensor)]
    sharded = [_sharded(leaf.base) for leaf in (frozen or {}).values() if isinstance(leaf, Frozen)]
    bases = sum(_gathered_bytes(base) for base in sharded if base is not None)
    shares = own = 0
    for name, sharding in shardings.items():
        leaf = trainable[name]
        assert isinstance(leaf, Factors)
        shares += _padded_bytes(leaf.b, sharding) + _padded_bytes(leaf.a.mT, sharding.as_columns)
        if plan and name in plan:
            vectors = sum(side.slots.shape[-1] for side in (plan[name].b, plan[name].a))
            own += _padded_bytes(leaf.a.mT, sharding.as_columns) // leaf.a.shape[-2] * vectors
    return WireBytes(_bytes(whole), _bytes(full_rank), gathers * bases, gathers * shares, shares, own)


def _sharded(base: Any) -> Sharded | None:
    base = base.base if isinstance(base, Deferred) else base
    return base if isinstance(base, Sharded) else None


def _gathered_bytes(base: Sharded) -> int:
    """Of the shares of all processes, which are padded to the longest."""
    found = []

    def count(leaf: Tensor, sharding: Sharding) -> Tensor:
        found.append(_padded_bytes(leaf, sharding))
        return leaf

    layout, tensors = flatten_base(base)
    map_code_rows(count, layout.kind, tensors, base.sharding)
    return sum(found)


def _padded_bytes(leaf: Tensor, sharding: Sharding) -> int:
    each = leaf.shape[:-2].numel() * leaf.shape[-1] * leaf.element_size()
    return sharding.world_size * sharding.rows_per_process * each


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))

"""Count the bytes of the collectives of one step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_choice, check_integer, described
from dynlora_fn._core._check_plan import check_plans
from dynlora_fn._core._check_trees import check_trainable
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import (
    Frozen,
    FrozenLeaf,
    FrozenTensor,
    Plans,
    ShardedFactors,
    Sharding,
    Trainable,
    is_factors,
)
from dynlora_fn.bases._base import Base, as_base
from dynlora_fn.bases._formats import codes_from_tensors
from dynlora_fn.parallel._gloo import ONE_THREAD
from dynlora_fn.parallel._shards import ShardMap, full_shape, map_shards

_BACKENDS = ("nccl", "gloo", ONE_THREAD)


class WireBytes(NamedTuple):
    """The bytes of the collectives of one step, by kind.

    A field is the size of the tensors that are reduced or scattered, or that a gather returns. `sent` converts the
    fields into the bytes that each process sends. Switching sends nothing unless factors are sharded.
    """

    factors: int  # all-reduce of the gradients of factors that are not sharded
    full_rank: int  # all-reduce of the gradients of full-rank tensors
    bases: int  # all-gather of sharded bases
    gathered: int = 0  # all-gather of sharded factors
    scattered: int = 0  # reduce-scatter of their gradients
    switched: int = 0  # all-gather of the rows of sharded factors that a switch folds

    @property
    def reduced(self) -> int:
        """The bytes of all all-reduces."""
        return self.factors + self.full_rank

    def sent(self, world_size: int, *, backend: str) -> int:
        """Return the bytes that each process sends in the step.

        With ring algorithms, each of n processes sends::

            sent = (n - 1) / n * (2 * all-reduced + all-gathered + reduce-scattered)

        gloo has no reduce-scatter and sends an all-reduce in its place. For sharded factors that is a third more in
        all. Headers of messages do not count.

        Args:
            world_size: The number of processes, n.
            backend: "nccl", "gloo", or the name that `register_gloo` returns. `torch.distributed.get_backend` gives it.

        Returns:
            The bytes, rounded to an integer.

        Raises:
            TypeError: If `world_size` is not an integer.
            ValueError: If `world_size` is less than 1, or `backend` is unknown.

        Example:
            >>> wire = WireBytes(factors=0, full_rank=1024, bases=0, gathered=8192, scattered=4096)
            >>> wire.sent(4, backend="nccl"), wire.sent(4, backend="gloo")
            (10752, 13824)
        """
        world_size = check_integer("world_size", world_size, least=1)
        check_choice("backend", backend, _BACKENDS)
        scatters = 1 if backend == "nccl" else 2
        all_gathered = self.bases + self.gathered + self.switched
        in_rings = 2 * self.reduced + all_gathered + scatters * self.scattered
        return round(in_rings * (world_size - 1) / world_size)


def wire_bytes(
    trainable: Trainable,
    frozen: Mapping[str, FrozenLeaf] | None = None,
    *,
    gathers: int = 2,
    plan: Plans | None = None,
) -> WireBytes:
    """Return the bytes of the collectives of one data-parallel step.

    The count uses only shapes and dtypes: nothing is communicated and no value is read.

    Args:
        trainable: The trainable tree.
        frozen: The frozen tree. Default None means that nothing is sharded.
        gathers: How often each sharded base and each sharded factor is gathered in a step: 2 for a forward and a
            backward pass, and 3 if `remat` also computes the block again.
        plan: The plan of a step that switches. Default None means a step without a switch.

    Returns:
        The bytes by kind.

    Raises:
        TypeError: If a tree has a leaf of a wrong type, or `gathers` is not an integer.
        ValueError: If `gathers` is negative, or a plan is not valid.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 64), rank=8, seed=0, targets=["weight"])
        >>> dl.parallel.wire_bytes(dl.partition(params).trainable)  # full-rank training: 16,640
        WireBytes(factors=4096, full_rank=256, bases=0, gathered=0, scattered=0, switched=0)
    """
    _check_arguments(trainable, frozen, plan)
    gathers = check_integer("gathers", gathers, least=0)
    factors = [leaf for leaf in trainable.values() if is_factors(leaf) and not isinstance(leaf, ShardedFactors)]
    full_rank = [leaf for leaf in trainable.values() if isinstance(leaf, Tensor)]
    bases = sum(_gathered_bytes(as_base(leaf.base)) for leaf in (frozen or {}).values() if isinstance(leaf, Frozen))
    shards = switched = 0
    for name, leaf in trainable.items():
        if isinstance(leaf, ShardedFactors):
            b, a = _shard_bytes(name, leaf)
            shards += b + a
            plans = (plan[name].b, plan[name].a) if plan and name in plan else ()
            switched += a // leaf.a.shape[-2] * sum(side.slots.shape[-1] for side in plans)
    return WireBytes(_bytes(factors), _bytes(full_rank), gathers * bases, gathers * shards, shards, switched)


def _check_arguments(trainable: Any, frozen: Any, plan: Any) -> None:
    check_trainable("trainable", trainable)
    if plan is not None:
        check_plans("plan", plan)
    if frozen is None:
        return
    check_by_name("frozen", frozen, of="bases and tensors, such as `partition(params).frozen`")
    for name, leaf in frozen.items():
        if not isinstance(leaf, Frozen | FrozenTensor | Tensor):
            raise TypeError(f"`frozen` has {described(leaf)} for {name!r}; pass `partition(params).frozen`")


def _gathered_bytes(base: Base) -> int:
    """Return the bytes of a gather of a base, or 0 if it is not sharded.

    Residuals are not gathered.
    """
    if not base.sharding:
        return 0
    sizes: list[int] = []
    count = _count_into(sizes)
    layout, tensors = as_base(base.folded).flatten()
    codes = codes_from_tensors(layout.kind, tensors)
    codes.map_rows(lambda shard, sharding: count(shard, sharding, -2), base.sharding)
    return sum(sizes)


def _shard_bytes(name: str, factors: ShardedFactors) -> list[int]:
    """Return the bytes of a gather of each side of factors."""
    sizes: list[int] = []
    map_shards(_count_into(sizes), factors, name)
    return sizes


def _count_into(sizes: list[int]) -> ShardMap:
    """Return a map that appends the bytes of a gather of each shard.

    A gather pads the shards of all processes to the largest one.
    """

    def count(shard: Tensor, sharding: Sharding, axis: int) -> Tensor:
        padded = replace(sharding, rows=sharding.world_size * sharding.rows_per_process)
        sizes.append(full_shape(shard, padded, axis).numel() * shard.element_size())
        return shard

    return count


def _bytes(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))

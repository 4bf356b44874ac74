"""Change the rank of low-rank weights in the middle of a run."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from dynlora_fn._core._batches import batches
from dynlora_fn._core._check import check_choice, check_integer
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._tree import by_name
from dynlora_fn._core._types import Factors, LowRank, OneSidedFactors, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.optim._resize_state import resize_state
from dynlora_fn.optim._roles import Roles, check_roles
from dynlora_fn.switching._basis import next_seeds
from dynlora_fn.switching._weight import BasisSlice, Start, first_slice, merge, vectors_of

_BATCH = 2**20  # entries of factors whose vectors are drawn together


class Resized(NamedTuple):
    """Parameters at new ranks, and their optimizer state."""

    params: dict[str, Param]
    opt_state: Any


def resize(
    params: Params,
    opt_state: Any = None,
    *,
    rank: int | Mapping[str, int],
    start: Start = "switchlora",
    roles: Roles | None = None,
) -> Resized:
    """Change the rank of low-rank weights and of their optimizer state.

    The weights do not change, except for one rounding of each base. The first ``min(old, new)`` slots keep their
    vectors. Further slots get the vectors that `init` would draw, and excess slots are removed. With the new factors
    `b2` and `a2`, the difference is folded into the base::

        base += alpha * (b @ a / old - b2 @ a2 / new)

    Pending vectors of a deferred base are folded too.

    Where only `b` is trained, the whole product is folded and `b` starts with zeros. All vectors of `a` and all entries
    of the optimizer state are then new.

    Each weight also gets a new basis seed, because a schedule numbers vectors from the rank on and would otherwise use
    some of them twice. Continue with the same schedule, but create a pool or a dithered schedule again. Right after a
    resize, the schedule may switch a vector that is still frozen.

    The optimizer state keeps the entries of vectors that stay. A gradient contains the factor ``1 / rank``. So first
    moments are multiplied by ``old / new``, and second moments, which must be means of squares, by its square. New
    vectors start with zeros: no moment, no update counted, not frozen. A step of `compile_step` compiles again for the
    new shapes.

    Args:
        params: The parameters by name.
        opt_state: The optimizer state of all trainable parameters. Default None resizes only the parameters.
        rank: The new rank, from 1 to min(out, in), or a dict of new ranks by name. Weights that are not in the dict,
            and weights that have the rank already, are returned unchanged.
        start: The distribution of new vectors, as in `init`. With "lora" new vectors of `b` are zero.
        roles: The roles of the fields of your own states, as in `project_optimizer_state`. Default None means none.

    Returns:
        The new parameters by name, and the new state.

    Raises:
        TypeError: If a rank is not an integer.
        ValueError: If a rank or `start` is not valid, `rank` names a parameter that is not low-rank, factors are
            sharded, or a quantized weight is not finite. Also if the state belongs to another library, or has entries
            of a resized weight whose role is not declared or is "unchanged".
        NotImplementedError: If a quantized base or its factors require a gradient or have a tangent.

    Numerics: The difference is computed in float32 or a wider dtype of factors and base. The base is then rounded once,
    or quantized once (see `quantize`). 8-bit moments are encoded again. A moment that was too small for codes still has
    none.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, materialize
        >>> params = init({"w": torch.ones(8, 8)}, rank=2, seed=0, targets=["w"])
        >>> larger = resize(params, rank=4).params
        >>> larger["w"].factors.b.shape, torch.allclose(materialize(larger)["w"], torch.ones(8, 8))
        (torch.Size([8, 4]), True)
    """
    check_params("params", params)
    check_choice("start", start, get_args(Start))
    check_roles({} if roles is None else roles, "`roles`")
    low_rank = {name: param for name, param in params.items() if isinstance(param, LowRank)}
    ranks = by_name(rank, low_rank, "rank")
    changes = [_Change(name, low_rank[name], check_integer("rank", new, of=name)) for name, new in ranks.items()]
    for change in changes:
        _check(*change)
    resized = dict(_resize_all([change for change in changes if change.rank != change.old], start))
    new = {name: resized.get(name, param) for name, param in params.items()}
    return Resized(new, None if opt_state is None else resize_state(opt_state, low_rank, resized, roles=roles))


class _Change(NamedTuple):
    name: str
    param: LowRank
    rank: int  # the new one

    @property
    def old(self) -> int:
        return self.param.factors.b.shape[-1]

    @property
    def entries(self) -> int:
        """The number of entries of the factors with the new rank."""
        return self.param.seed.numel() * self.rank * sum(self.param.shape[-2:])


def _resize_all(changes: Sequence[_Change], start: Start) -> Iterator[tuple[str, LowRank]]:
    """Yield each resized weight with its name.

    The vectors of many weights are drawn together, as in `init`.
    """
    by_device: dict[torch.device, list[_Change]] = defaultdict(list)
    for change in changes:
        by_device[change.param.seed.device].append(change)
    for on_device in by_device.values():
        for batch in batches(on_device, lambda change: change.entries, most=_BATCH):
            seeds = next_seeds([change.param.seed for change in batch], [change.rank for change in batch])
            slices = [_added_slice(change, seed, start) for change, seed in zip(batch, seeds, strict=True)]
            for change, seed, added in zip(batch, seeds, vectors_of(slices), strict=True):
                yield change.name, _resize(change, seed, added)


def _added_slice(change: _Change, seed: Tensor, start: Start) -> BasisSlice:
    shape, dtype, alpha = change.param.shape[-2:], change.param.factors.b.dtype, change.param.alpha
    if isinstance(change.param.factors, OneSidedFactors):
        return first_slice(seed, shape, change.rank, "orthonormal", dtype, alpha=alpha)
    return first_slice(seed, shape, change.rank, start, dtype, from_slot=change.old, alpha=alpha)


def _resize(change: _Change, seed: Tensor, added: Factors) -> LowRank:
    name, param, rank = change
    if isinstance(param.factors, OneSidedFactors):
        merged = merge({name: param})[name]
        assert isinstance(merged, LowRank)
        base, factors = as_base(merged.base), param.factors._replace(b=added.b, a=added.a)
        new = merged._replace(factors=factors, seed=seed)
        return new._replace(base=base.with_folded(base.folded, divisor=new.divisor))
    b, a, old = param.factors.b, param.factors.a, change.old
    new_b, new_a = torch.cat([b[..., :rank], added.b], -1), torch.cat([a[..., :rank, :], added.a], -2)
    new = param._replace(factors=param.factors._replace(b=new_b, a=new_a), seed=seed)
    base = as_base(param.base)
    wide = widest(b.dtype, base.sum_dtype)
    staying, removed = b[..., :rank].to(wide) * (1 - old / rank), b[..., rank:].to(wide)
    # A deferred base folds at once, because it may have no room. So no fold is pending with the old rank as divisor.
    divisor, folds = param.divisor, base.pending_folds
    pending = [(fold.factors.b.to(wide) * (divisor / fold.divisor), fold.factors.a) for fold in folds]
    left = torch.cat([staying, removed, -added.b.to(wide) * (old / rank), *[b for b, _ in pending]], -1)
    right = torch.cat([a, added.a, *[a for _, a in pending]], -2)
    folded = as_base(base.folded).fold(left, right, divisor=divisor, name=name)
    return new._replace(base=base.with_folded(folded, divisor=new.divisor))


def _check(name: str, param: LowRank, rank: int) -> None:
    limit = min(param.shape[-2:])
    if not 1 <= rank <= limit:
        raise ValueError(
            f"`rank` is {rank} for {name!r} of shape {tuple(param.shape)}; "
            f"use at least 1 and at most min(out, in) = {limit}"
        )
    if param.factor_sharding:
        raise ValueError(f"`params` has sharded factors for {name!r}; call `unshard` first, and shard the result again")

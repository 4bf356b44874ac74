"""Store candidates in a pool, as in SwitchLoRA.

Outgoing vectors return to the pool with their trained values. `draw` makes `switch`'s `incoming`, and `put_back` takes
its `outgoing`. A pool has min(out, in) * (out + in) numbers for each weight, which is 1 to 2 times the weight's size.
So pools are in host memory by default. A step reads and writes only a few vectors.
"""

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._check import check_device, check_flag
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._types import Factors, LowRank, OneSidedFactors, Params, Plan, Plans, SidePlan
from dynlora_fn.bases._refusals import refuse
from dynlora_fn.switching._pool_types import Pool, SidePool, check_outgoing, check_pools
from dynlora_fn.switching._switch import find_sources, take_rows
from dynlora_fn.switching._weight import BasisSlice, vectors_of


def init_pool(params: Params, *, device: torch.device | str = "cpu") -> dict[str, Pool]:
    """Create a pool for every low-rank parameter.

    A pool contains the first min(out, in) vectors of the basis, including the vectors that the factors start from.

    Args:
        params: The parameters from `init`, before any switch.
        device: The device of the pools. Default "cpu" stores them in host memory.

    Returns:
        The pools by name.

    Raises:
        TypeError: If `params` has a wrong type, or `device` is neither a device nor a text.
        ValueError: If the factors of a weight are sharded, only `b` is trained, or the device is unknown.

    Example:
        >>> import torch
        >>> from dynlora_fn import init
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> init_pool(params)["w"].b.vectors.shape  # 4 candidates of side b
        torch.Size([4, 6])
    """
    check_params("params", params)
    check_device("device", device)
    return {name: _init_pool(name, param, device) for name, param in params.items() if isinstance(param, LowRank)}


def _init_pool(name: str, param: LowRank, device: torch.device | str) -> Pool:
    if param.factor_sharding:
        refuse("pool, sharded factors", name=name)
    if isinstance(param.factors, OneSidedFactors):
        refuse("pool, one side", name=name)
    shape, rank = param.shape[-2:], param.factors.a.shape[-2]
    rows = torch.arange(min(shape), device=device)
    seed, dtype = param.seed.to(device), param.factors.a.dtype
    (vectors,) = vectors_of([BasisSlice(seed, rows, rows, shape, rank, "switchlora", dtype, param.alpha)])
    slots = rows[:rank].expand(*seed.shape, rank)
    return Pool(
        b=SidePool(vectors.b.mT.contiguous(), (slots - rank // 2) % rank),
        a=SidePool(vectors.a, slots.clone()),
    )


@overload
def draw(pool: Pool, plan: Plan) -> Factors: ...
@overload
def draw(pool: Mapping[str, Pool], plan: Plans) -> dict[str, Factors]: ...
def draw(pool: Pool | Mapping[str, Pool], plan: Any) -> Factors | dict[str, Factors]:
    """Read the vectors that a plan names from the pool, as `incoming` of `switch`.

    The pool does not change. `put_back` then stores the outgoing vectors.

    Args:
        pool: The pool of one weight, or a dict of pools by name.
        plan: The plan of that weight, or a dict of plans by name. It must name idle rows. `Schedule` does, because it
            takes the rows in turn and never more than are idle.

    Returns:
        The vectors, laid out as factors, on the plan's device.

    Raises:
        TypeError: If the pool or the plan has a wrong type or dtype.
        ValueError: If the pool of a planned weight is missing, or the plan could take more vectors of a side than are
            idle.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, switch
        >>> from dynlora_fn.schedules import Schedule
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> pools, plan = init_pool(params), Schedule(interval=10)(0, params)
        >>> plan["w"].a.indices  # the rows of vectors 0 and 1, which are in the slots, are not read
        tensor([2])
        >>> torch.equal(draw(pools, plan)["w"].a, pools["w"].a.vectors[2:3])
        True
        >>> params, outgoing = switch(params, plan, incoming=draw(pools, plan))
        >>> pools = put_back(pools, plan, outgoing)
    """
    check_pools(pool, plan)
    if isinstance(pool, Pool):
        return _draw_sides(pool, plan)
    return {name: _draw_sides(pool[name], param_plan) for name, param_plan in plan.items()}


def _draw_sides(pool: Pool, plan: Plan) -> Factors:
    return Factors(b=_draw(pool.b, plan.b).mT, a=_draw(pool.a, plan.a))


def _draw(pool: SidePool, plan: SidePlan) -> Tensor:
    size, idle, count = pool.vectors.shape[-2], pool.vectors.shape[-2] - pool.held.shape[-1], plan.slots.shape[-1]
    if count > idle:
        raise ValueError(
            f"`plan` takes {count} vectors of a side, but only {idle} of {size} are idle; "
            "switch fewer in one step, or use a schedule with from_pool=True"
        )
    return take_rows(pool.vectors, plan.indices.to(pool.held.device) % size).to(plan.indices.device)


@overload
def put_back(pool: Pool, plan: Plan, outgoing: Factors, *, donate: bool = False) -> Pool: ...
@overload
def put_back(
    pool: Mapping[str, Pool], plan: Plans, outgoing: Mapping[str, Factors], *, donate: bool = False
) -> dict[str, Pool]: ...
def put_back(
    pool: Pool | Mapping[str, Pool],
    plan: Any,
    outgoing: Any,
    *,
    donate: bool = False,
) -> Pool | dict[str, Pool]:
    """Put the outgoing vectors of a switch back into the pool.

    Each vector is stored in the row that it was taken from, so no vector is lost. If active entries of a side name a
    slot twice, the first one counts, as in `switch`.

    Args:
        pool: The pool of one weight, or a dict of pools by name, that was passed to `draw`.
        plan: The plan that was passed to `draw` and `switch`.
        outgoing: The outgoing vectors that `switch` returned.
        donate: Whether to write into the memory of `pool`, which must not be used afterwards. Default False copies the
            pool.

    Returns:
        The new pool, or all pools by name. Pools without a plan are returned unchanged.

    Raises:
        TypeError: If the pool, the plan or the vectors have a wrong type or dtype.
        ValueError: If names or shapes of pool, plan and vectors do not fit each other.
        NotImplementedError: If vectors that are written into a donated pool require a gradient or have a tangent.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, switch
        >>> from dynlora_fn.schedules import every
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> pools, plan = init_pool(params), every(1, from_pool=True)(0, params)
        >>> pools["w"].a.held
        tensor([0, 1])
        >>> _, outgoing = switch(params, plan, incoming=draw(pools, plan))
        >>> put_back(pools, plan, outgoing)["w"].a.held
        tensor([2, 3])
    """
    check_flag("donate", donate)
    check_pools(pool, plan)
    check_outgoing(outgoing, pool, plan)
    if isinstance(pool, Pool):
        return _put_back_sides(pool, plan, outgoing, donate)
    new = {name: _put_back_sides(pool[name], plan[name], outgoing[name], donate) for name in plan}
    return {**pool, **new}


def _put_back_sides(pool: Pool, plan: Plan, outgoing: Factors, donate: bool) -> Pool:
    return Pool(b=_put_back(pool.b, plan.b, outgoing.b.mT, donate), a=_put_back(pool.a, plan.a, outgoing.a, donate))


def _put_back(pool: SidePool, plan: SidePlan, outgoing: Tensor, donate: bool) -> SidePool:
    if donate and is_attached(outgoing):
        raise NotImplementedError(
            "`outgoing` requires a gradient or has a tangent, which would not pass through the memory of a donated"
            " pool; pass donate=False, or detach it"
        )
    vectors, slot_rows = pool if donate else (pool.vectors.clone(), pool.held.clone())
    slots, indices, active = (leaf.to(slot_rows.device).expand(*slot_rows.shape[:-1], -1) for leaf in plan)
    if not slots.shape[-1]:
        return SidePool(vectors, slot_rows)
    # As `switch` does, only the first active entry of a slot counts.
    active = find_sources(SidePlan(slots, indices, active), slot_rows.shape[-1]).is_effective
    rows = slot_rows.gather(-1, slots)
    new_rows = torch.where(active, indices % vectors.shape[-2], rows)
    new_vectors = torch.where(active[..., None], outgoing.to(vectors), take_rows(vectors, rows))
    # An inactive entry may name a row that an active one writes. It repeats the first active entry instead.
    source = torch.where(
        active, torch.arange(active.shape[-1], device=slot_rows.device), active.int().argmax(-1, keepdim=True)
    )
    rows, slots, new_rows = (leaf.gather(-1, source) for leaf in (rows, slots, new_rows))
    vectors.scatter_(-2, rows[..., None].expand(*rows.shape, vectors.shape[-1]), take_rows(new_vectors, source))
    slot_rows.scatter_(-1, slots, new_rows)
    return SidePool(vectors, slot_rows)

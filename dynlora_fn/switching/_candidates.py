"""Generate the vectors that a plan names."""

from typing import Any, get_args, overload

from dynlora_fn._core._check import check_choice
from dynlora_fn._core._types import Factors, LowRank, OneSidedFactors, Params, Plan, Plans
from dynlora_fn.switching._orthonormal import indices_of
from dynlora_fn.switching._planned import check_planned, low_rank
from dynlora_fn.switching._weight import BasisSlice, Start, Vectors, vectors_of


@overload
def candidates(params: LowRank, plan: Plan, *, start: Start = "switchlora") -> Factors: ...
@overload
def candidates(params: Params, plan: Plans, *, start: Start = "switchlora") -> dict[str, Factors]: ...
def candidates(params: LowRank | Params, plan: Any, *, start: Start = "switchlora") -> Factors | dict[str, Factors]:
    """Generate the vectors that a plan names from the basis seed.

    Nothing is stored or sent. Every process generates the same bits.

    Args:
        params: One weight, or a dict of parameters by name.
        plan: The plan of that weight, or a dict of plans by name. Its `indices` name the vectors.
        start: The distribution, as in `init`. With "lora" the vectors of side b are zero. A weight that trains only `b`
            ignores it: its side b gets zeros, and its side a gets rows that are orthogonal to all others.

    Returns:
        The vectors, laid out as factors with `count` in place of `rank`, or a dict of them by name.

    Raises:
        TypeError: If a part of the plan has a wrong type or dtype.
        ValueError: If the plan names a parameter that is missing or not low-rank, its shapes do not fit, or
            `start` is unknown.

    Example:
        >>> import torch
        >>> from dynlora_fn import init, switch
        >>> from dynlora_fn.schedules import every
        >>> params = init({"w": torch.ones(6, 4)}, rank=2, seed=0, targets=["w"])
        >>> plan = every(1)(0, params)
        >>> incoming = candidates(params, plan)
        >>> incoming["w"].b.shape
        torch.Size([6, 2])
        >>> torch.equal(switch(params, plan).params["w"].factors.a, incoming["w"].a)  # what `switch` uses by default
        True
    """
    check_choice("start", start, get_args(Start))
    check_planned(params, plan)
    vectors: Factors | dict[str, Factors] = planned_vectors(params, plan, start)
    return vectors


def planned_vectors(params: LowRank | Params, plan: Any, start: Start) -> Any:
    """Generate the vectors of `candidates`, for a plan that was checked before."""
    if isinstance(params, LowRank):
        return vectors_of([_basis_slice(params, plan, start)])[0]
    if not plan:
        return {}
    slices = [_basis_slice(low_rank(params, name), param_plan, start) for name, param_plan in plan.items()]
    return dict(zip(plan, vectors_of(slices), strict=True))


def _basis_slice(param: LowRank, plan: Plan, start: Start) -> BasisSlice:
    shape, rank, dtype = param.shape[-2:], param.factors.a.shape[-2], param.factors.a.dtype
    vectors: Vectors = "orthonormal" if isinstance(param.factors, OneSidedFactors) else start
    return BasisSlice(param.seed, plan.b.indices, indices_of(param, plan.a), shape, rank, vectors, dtype, param.alpha)

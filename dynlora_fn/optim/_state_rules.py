"""Rules for the optimizer state of counterparts: reset, prune or transport it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._types import AnyFactors, Factors, Plan, SidePlan, sides_of, with_sides
from dynlora_fn.optim._eight_bit import is_eight_bit, moment_shape, reset_moment
from dynlora_fn.optim._roles import Role


def counterparts(plan_b: SidePlan, plan_a: SidePlan, rank: int) -> Factors:
    """Return masks of the vectors that are counterparts of switched vectors.

    The masks broadcast against the factors.
    """
    return Factors(
        b=_switched_slots(plan_a, rank)[..., None, :],
        a=_switched_slots(plan_b, rank)[..., :, None],
    )


def reset(
    leaf: AnyFactors,
    role: Role,
    plan: Plan,
    find_counterparts: Callable[[SidePlan, SidePlan, int], Factors],
    *,
    is_count_delayed: bool,
) -> AnyFactors:
    """Reset the state of the counterparts, in a field with a role.

    `is_count_delayed` starts counts at ``-plan.frozen_for``, so that they are zero at the thaw.
    """
    new = None
    if role == "frozen_for":
        new = plan.frozen_for
    elif role == "count" and is_count_delayed:
        new = -plan.frozen_for
    is_counterpart = find_counterparts(plan.b, plan.a, moment_shape(leaf.b)[-1])
    return with_sides(leaf, _replace_sides(sides_of(leaf), is_counterpart, new))  # type: ignore[no-any-return]


# With `allow_in_graph`, AOTAutograd traces a function instead of Dynamo, which takes longer for each operation.
@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _replace_sides(sides: tuple[Any, ...], is_replaced: Factors, value: Tensor | None) -> tuple[Any, ...]:
    value = torch.zeros((), device=is_replaced.b.device) if value is None else value
    return tuple([replace_where(side, mask, value) for side, mask in zip(sides, is_replaced, strict=False)])


def replace_where(side: Any, is_replaced: Tensor, value: Tensor | None = None) -> Any:
    """Set entries to `value` where `is_replaced` is true. None means zero.

    8-bit moments are always set to zero.
    """
    if is_eight_bit(side):
        return reset_moment(side, is_replaced)
    return torch.where(is_replaced, 0 if value is None else value.to(side), side)


def is_pruned(moment: Tensor, is_counterpart: Tensor, first_moments: Sequence[Tensor], share: float) -> Tensor:
    """Return a mask of the counterparts' entries to prune.

    They are among the smallest entries in `moment` and in each of `first_moments`.
    """
    is_counterpart = is_counterpart.expand(moment.shape)
    is_small = is_counterpart & _is_small(moment, is_counterpart, share)
    for first_moment in first_moments:
        is_small = is_small & _is_small(first_moment, is_counterpart, share)
    return is_small


def _is_small(moment: Tensor, is_counterpart: Tensor, share: float) -> Tensor:
    """Return a mask of the entries up to a quantile of the counterparts' magnitudes.

    `share` is the quantile. It is over all counterparts of one matrix together, and not over each vector.
    """
    # Entries of other vectors are -1 here, so they are sorted to the front.
    magnitudes = torch.where(is_counterpart, moment.abs(), -1).flatten(-2).sort(dim=-1).values
    count = is_counterpart.flatten(-2).sum(-1)
    last = (magnitudes.shape[-1] - count + (share * (count - 1)).floor().long()).clamp(max=magnitudes.shape[-1] - 1)
    return moment.abs() <= magnitudes.gather(-1, last[..., None])[..., None]


def transport(leaf: AnyFactors, before: AnyFactors, after: AnyFactors, is_counterpart: Factors) -> AnyFactors:
    """Project the moments of counterparts on the new vectors (rule "transport").

    Products are computed in float32, or in the dtype of the moments if that is wider.
    """

    def moved(side: Tensor, coefficients: Tensor) -> Tensor:
        dtype = widest(side.dtype)
        return (side.to(dtype) @ coefficients.to(dtype)).to(side.dtype)

    with without_autocast(leaf.b.device.type):
        b = moved(leaf.b, _projection_coefficients(before.a, after.a))
        b = torch.where(is_counterpart.b, b, leaf.b)
        if len(sides_of(leaf)) == 1:
            return leaf._replace(b=b)
        a = moved(leaf.a.mT, _projection_coefficients(before.b.mT, after.b.mT)).mT
        return leaf._replace(b=b, a=torch.where(is_counterpart.a, a, leaf.a))


def _projection_coefficients(before: Tensor, after: Tensor) -> Tensor:
    """Return the coefficients of the projections of the new rows on the old rows.

    With rows v they are ``(v v.T)^+ v v_new.T``, of shape (rank, rank).
    """
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    coefficients: Tensor = torch.linalg.pinv(before @ before.mT, hermitian=True) @ (before @ after.mT)
    return coefficients


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _switched_slots(plan: SidePlan, rank: int) -> Tensor:
    slots = torch.arange(rank, device=plan.slots.device)
    return ((plan.slots[..., None, :] == slots[:, None]) & plan.active[..., None, :]).any(-1)

"""Plans read from a schedule, step by step, and what must hold for them."""

from collections.abc import Callable, Iterator

import torch
from hypothesis import strategies as st

from dynlora_fn import Factors, LowRank, Plan, SidePlan


def weight(out_features: int, in_features: int, rank: int, stack: tuple[int, ...] = ()) -> LowRank:
    """Return a weight with shape and device only: a schedule reads nothing else."""
    base = torch.empty(()).expand(*stack, out_features, in_features)
    factors = Factors(
        torch.empty(()).expand(*stack, out_features, rank), torch.empty(()).expand(*stack, rank, in_features)
    )
    return LowRank(base, factors, torch.zeros(stack, dtype=torch.int64))


def plans_of(schedule: Callable, param: LowRank, steps: int) -> Iterator[Plan]:
    """Yield the plan of each step.

    Steps without a plan for the weight have an empty one.
    """
    nothing = SidePlan(*(torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool)))
    for step in range(steps):
        yield schedule(step, {"w": param}).get("w", Plan(nothing, nothing, torch.tensor(0)))


def switched(side: SidePlan) -> list[tuple[int, int]]:
    """Return slots with the indices of their new vectors."""
    return list(zip(side.slots[side.active].tolist(), side.indices[side.active].tolist(), strict=True))


ranks = st.integers(1, 12)


def assert_no_frozen_vector_is_switched(plans: Iterator[Plan], rank: int) -> None:
    """Count down, update by update, how long each vector is frozen."""
    frozen_for = {"b": [0] * rank, "a": [0] * rank}
    for step, plan in enumerate(plans):
        slots = {name: {slot for slot, _ in switched(getattr(plan, name))} for name in ("b", "a")}
        if plan.frozen_for:
            assert not slots["b"] & slots["a"], step
        for name, other in (("b", "a"), ("a", "b")):
            assert all(frozen_for[name][slot] == 0 for slot in slots[name]), step
            for slot in slots[name]:
                frozen_for[other][slot] = int(plan.frozen_for)
        frozen_for = {name: [max(left - 1, 0) for left in side] for name, side in frozen_for.items()}

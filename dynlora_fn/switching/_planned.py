"""Check that plans and incoming vectors fit the parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._check_plan import check_plan
from dynlora_fn._core._check_trees import check_names, check_one_or_more
from dynlora_fn._core._types import LowRank, Params, is_factors


def check_planned(params: Any, plan: Any, incoming: Any = None) -> None:
    """Raise if a plan does not fit the weights, or incoming vectors the plan.

    Args:
        params: One weight, or a dict of parameters by name.
        plan: The plan of that weight, or a dict of plans by name.
        incoming: The vectors that enter, or a dict of them by name. Default None checks only the plan.

    Raises:
        TypeError: If a type or dtype is wrong.
        ValueError: If a name, shape, device or slot does not fit.
    """
    check_one_or_more("params", params)
    if not isinstance(params, Mapping):
        check_plan("plan", "param", plan, params)
        if incoming is not None:
            check_vectors("incoming", "param", incoming)
        return
    check_by_name("plan", plan, of="plans")
    for name, param_plan in plan.items():
        check_plan("plan", name, param_plan, low_rank(params, name))
    if incoming is not None:
        check_vectors_by_name("incoming", incoming, plan)


def check_vectors_by_name(argument: str, vectors: Any, plan: Iterable[str]) -> None:
    """Raise if a value is not a dict of vectors with the names of the plans."""
    check_by_name(argument, vectors, of="vectors")
    check_names(argument, vectors, "plan", plan)
    for name, factors in vectors.items():
        check_vectors(argument, name, factors)


def check_vectors(argument: str, name: str, factors: Any) -> None:
    """Raise TypeError if a value is not a pair of floating matrices or stacks.

    `switch` and the pools compare shapes with the plan.
    """
    sides = (factors.b, factors.a) if is_factors(factors) else (None, None)
    if not all(isinstance(side, Tensor) and side.is_floating_point() and side.ndim >= 2 for side in sides):
        raise TypeError(f"`{argument}` has {described(factors)} for {name!r}; use Factors of floating matrices")


def low_rank(params: Params, name: str) -> LowRank:
    """Return the weight that a plan is for.

    Raises:
        ValueError: If the parameter is missing or full-rank.
    """
    param = params.get(name)
    if not isinstance(param, LowRank):
        kind = f"a {type(param).__name__}" if name in params else "not in `params`"
        raise ValueError(
            f"`plan` must be for low-rank parameters, got one for {name!r}, which is {kind}; remove it from `plan`"
        )
    return param

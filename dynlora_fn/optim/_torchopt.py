"""Project the states of torchopt, which lists tensors in the order of optree.

The table of types was checked with torchopt 0.7.3. Types are recognized by module and name, so torchopt is not
imported.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor

from dynlora_fn._core._types import Factors
from dynlora_fn.optim._containers import Path, Step, rebuild, render
from dynlora_fn.optim._project_factors import numbered_sides
from dynlora_fn.optim._roles import Role, Roles
from dynlora_fn.optim._visitor import Visitor

_ROLES: dict[str, Roles] = {
    "EmptyState": {},
    "MaskedNode": {},
    "MaskedState": {},
    "ScaleByAdadeltaState": {"mu": "second_moment", "nu": "second_moment"},  # `mu` is the mean of squares
    "ScaleByAdamState": {"mu": "first_moment", "nu": "second_moment", "count": "unchanged"},
    "ScaleByAdamaxState": {"mu": "first_moment", "nu": "second_moment", "t": "unchanged"},
    "ScaleByRAdamState": {"mu": "first_moment", "nu": "second_moment", "t": "unchanged"},
    "ScaleByRStdDevState": {"mu": "first_moment", "nu": "second_moment"},
    "ScaleByRmsState": {"nu": "second_moment"},
    "ScaleByRssState": {"sum_of_squares": "second_moment"},
    "ScaleByScheduleState": {"count": "unchanged"},
    "TraceState": {"trace": "first_moment"},
}


def is_torchopt(node: Any) -> bool:
    """Return whether a node is a state of torchopt."""
    return isinstance(node, tuple) and hasattr(node, "_fields") and type(node).__module__.split(".")[0] == "torchopt"


def torchopt_roles(node: Any, path: Path) -> Roles:
    """Return the roles of the fields of a state of torchopt.

    Raises:
        ValueError: If the type is not in the table.
    """
    kind = type(node).__name__
    if kind not in _ROLES:
        raise ValueError(
            f"`opt_state` has a {kind} of torchopt at {render(path) or 'its root'}, which is not supported; use one of "
            f"{', '.join(_ROLES)}"
        )
    return _ROLES[kind]


def project_torchopt_list(tensors: Any, role: Role, context: Visitor, path: Path) -> Any:
    """Project a list of the tensors of all parameters, in the order of optree.

    optree sorts the names of a dict, but not of an `OrderedDict`. `b` comes before `a`.

    Raises:
        ValueError: If the list does not fit `trainable`.
    """
    trainable = context.trainable
    if trainable is None:
        raise ValueError(f"`opt_state` has a list of tensors at {render(path)}; pass `trainable`")
    if not isinstance(trainable, OrderedDict):
        trainable = {name: trainable[name] for name in sorted(trainable)}
    sides, count = numbered_sides(trainable)
    if len(tensors) != count:
        raise ValueError(
            f"`opt_state` has {len(tensors)} tensors at {render(path)} and `trainable` has {count}; "
            "pass the parameters that the optimizer was initialized with"
        )
    new = list(tensors)
    for name, (b, a) in sides.items():
        if not (isinstance(new[b], Tensor) and isinstance(new[a], Tensor)):
            raise ValueError(
                f"`opt_state` has no tensors of {name!r} at {render(path)}[{b}] and [{a}];"
                " pass the state of `trainable`"
            )
        where = (*path, Step(False, b))
        leaf = context.visit(Factors(new[b], new[a]), role, name, where)
        new[b], new[a] = leaf.b, leaf.a
    return rebuild(tensors, new)

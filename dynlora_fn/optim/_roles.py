"""The roles of fields of optimizer states, and `register_state` to declare them."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeAlias, get_args

from dynlora_fn._core._check import described

Role: TypeAlias = Literal["first_moment", "second_moment", "count", "frozen_for", "unchanged"]
Roles: TypeAlias = Mapping[str, Role]

_REGISTERED: dict[type, Roles] = {}


def register_state(kind: type, roles: Roles) -> None:
    """Declare the roles of the fields of a type of optimizer state.

    `project_optimizer_state` then projects these fields wherever it finds the type in a state. Your own NamedTuple or
    dataclass may have a class attribute `roles` without annotation instead.

    ===============  =================================================================================================
    role             contents of the field, by parameter name
    ===============  =================================================================================================
    "first_moment"   A linear function of the gradients: a mean or a sum. It has the shapes of the factors.
    "second_moment"  Any other statistic of the gradients that starts at zero. It has the shapes of the factors, or one
                     entry for each vector as a count does.
    "count"          Updates of each vector: ``Factors(b=(*stack, 1, rank), a=(*stack, rank, 1))``.
    "frozen_for"     Updates for which each vector stays frozen, in the same shapes. See `freeze_counterparts`.
    "unchanged"      Anything that a switch does not change, such as a statistic that all vectors of a side share.
    ===============  =================================================================================================

    Fields without a role are searched for other states, so wrappers and chains need no declaration. Such fields must
    not contain factors directly.

    Args:
        kind: The type, a NamedTuple or a dataclass.
        roles: The role of each field that mirrors the parameters, by the name of the field.

    Raises:
        TypeError: If `kind` is not a type, or `roles` is not a dict.
        ValueError: If a role is unknown, `kind` does not have a field, or `kind` is registered with other roles.

    Example:
        >>> from typing import Any, NamedTuple
        >>> class Momentum(NamedTuple):
        ...     velocity: dict[str, Any]
        >>> register_state(Momentum, {"velocity": "first_moment"})
    """
    if not isinstance(kind, type):
        raise TypeError(f"`kind` is {described(kind)}; pass a type of states, a NamedTuple or a dataclass")
    check_roles(roles, f"`roles` of {kind.__name__}")
    known = set(_fields(kind))
    if unknown := sorted(set(roles) - known):
        raise ValueError(
            f"`roles` names {unknown}, but the fields of {kind.__name__} are {sorted(known)}; use their names"
        )
    if _REGISTERED.get(kind, roles) != roles:
        raise ValueError(f"{kind.__name__} is registered with the roles {dict(_REGISTERED[kind])}; register it once")
    _REGISTERED[kind] = dict(roles)


def declared_roles(node: Any) -> Roles:
    """Return the roles that the type of a record declares, or an empty dict."""
    kind = type(node)
    if kind in _REGISTERED:
        return _REGISTERED[kind]
    roles = getattr(kind, "roles", None)
    if not isinstance(roles, Mapping):
        return {}
    check_roles(roles, f"`roles` of {kind.__name__}")
    return roles


def check_roles(roles: Any, argument: str) -> None:
    """Raise if `roles` is not a dict whose values are roles."""
    if not isinstance(roles, Mapping):
        raise TypeError(f"{argument} is {described(roles)}; pass a dict of roles by field")
    for field, role in roles.items():
        if not isinstance(role, str) or role not in get_args(Role):
            raise ValueError(
                f"{argument} must be some of {', '.join(get_args(Role))}, got {role!r} for {field!r}; use one of them"
            )


def _fields(kind: type) -> tuple[str, ...]:
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return tuple(getattr(kind, "_fields", ()))

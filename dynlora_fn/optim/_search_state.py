"""Find the factors in an optimizer state by the declared roles of its fields."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._types import is_factors
from dynlora_fn.optim._containers import Path, Step, children, contains_tensors, hidden_attributes, rebuild, render
from dynlora_fn.optim._eight_bit import is_eight_bit
from dynlora_fn.optim._roles import Role, Roles, declared_roles
from dynlora_fn.optim._torch_optim import is_torch_optim, project_torch_optim
from dynlora_fn.optim._torchopt import is_torchopt, project_torchopt_list, torchopt_roles
from dynlora_fn.optim._visitor import Visitor


def project_state(node: Any, context: Visitor, path: Path) -> Any:
    """Project everything below a node that is in no field with a role.

    Raises:
        ValueError: If factors, a matrix or an unknown object is in no field with a role. The message names its path.
    """
    if node is None or isinstance(node, str | bytes | int | float | complex):
        return node
    if is_factors(node) or is_eight_bit(node) or (isinstance(node, Tensor) and node.ndim > 1):
        _refuse_undeclared(node, path)
    if is_torch_optim(node):
        context.check_foreign("torch.optim", path)
        return project_torch_optim(node, context, path)
    inside = children(node)
    if inside is None:
        return _without_tensors(node, path)
    _refuse_hidden(node, path)
    if is_torchopt(node):
        context.check_foreign("torchopt", path)
    declared = torchopt_roles(node, path) if is_torchopt(node) else declared_roles(node)
    return rebuild(node, [_project_child(node, declared, child, context, (*path, step)) for step, child in inside])


def _project_child(parent: Any, declared: Roles, child: Any, context: Visitor, path: Path) -> Any:
    step = path[-1]
    by_type = declared.get(step.key) if step.is_field else None
    by_user = context.roles.get(step.key) if _is_by_name(child) or children(child) is None else None
    if by_type and by_user and by_type != by_user:
        raise ValueError(
            f"`roles` has {by_user!r} for {step.key!r}, but {type(parent).__name__} declares {by_type!r} for "
            f"{render(path)}; remove it from `roles`"
        )
    role = by_type or by_user
    if role == "unchanged":
        return context.keep(child, path)
    if role is None:
        return project_state(child, context, path)
    if is_torchopt(parent) and isinstance(child, tuple | list):
        return project_torchopt_list(child, role, context, path)
    return _project_field(child, role, context, path, name=None)


def _project_field(node: Any, role: Role, context: Visitor, path: Path, *, name: str | None) -> Any:
    """Project everything below a node that is in a field with a role.

    `name` is the key of the node if its parent is a dict, and None otherwise.
    """
    if is_factors(node) and name is not None:
        return context.visit(node, role, name, path)
    is_leaf = isinstance(node, Tensor) or is_eight_bit(node)
    if is_leaf and name in context.plan:
        raise ValueError(
            f"`opt_state` must have factors of the planned parameter {name!r} at {render(path)} as {role!r}, got a "
            "tensor; if it does not belong to single vectors, declare it 'unchanged'"
        )
    if is_factors(node) or (isinstance(node, Tensor) and node.ndim > 0 and name is None):
        raise ValueError(
            f"`opt_state` has {_describe(node)} at {render(path)} outside a dict by parameter name; put it into one"
        )
    _check_is_of_parameter(node, name, context, path, is_leaf=is_leaf)
    inside = None if is_leaf else children(node)
    _refuse_hidden(node, path)
    if inside is None:
        return node if is_leaf else _without_tensors(node, path)
    is_dict = isinstance(node, Mapping)
    if any(is_factors(child) for _, child in inside):
        _refuse_mixed(inside, path)
    return rebuild(
        node,
        [
            _project_field(child, role, context, (*path, step), name=step.key if is_dict else None)
            for step, child in inside
        ],
    )


def _check_is_of_parameter(node: Any, name: Any, context: Visitor, path: Path, *, is_leaf: bool) -> None:
    """Raise ValueError if the state of a parameter is not directly under its name.

    Otherwise this state would silently stay unchanged, while other fields change.
    """
    if name in context.plan and children(node):
        raise ValueError(
            f"`opt_state` has a {type(node).__name__} at {render(path)} in place of the factors of {name!r}; store "
            "each kind of state in a field, by parameter name"
        )
    trainable = context.trainable
    is_number = isinstance(node, Tensor) and node.ndim == 0
    if is_leaf and not is_number and trainable is not None and name is not None and name not in trainable:
        raise ValueError(
            f"`opt_state` has {_describe(node)} at {render(path)}, but `trainable` has no parameter {name!r}; store "
            "the state by the names of `trainable`, or declare the field 'unchanged'"
        )


def _is_by_name(node: Any) -> bool:
    """Return whether a node is a dict by parameter name.

    Such a dict contains factors, or only leaves.
    """
    if not isinstance(node, Mapping) or is_torch_optim(node):
        return False
    leaves = [_is_leaf(child) for child in node.values()]
    return all(leaves) or any(is_factors(child) for child in node.values())


def _is_leaf(node: Any) -> bool:
    return is_factors(node) or is_eight_bit(node) or children(node) is None


def _refuse_mixed(inside: list[tuple[Step, Any]], path: Path) -> None:
    """Raise ValueError if a dict contains factors and containers.

    It would be unclear whether its keys are parameters or fields.
    """
    for step, child in inside:
        if not _is_leaf(child):
            raise ValueError(
                f"`opt_state` has factors and a {type(child).__name__} side by side at {render(path)}, so that "
                f"{step.key!r} may be a field or a parameter; put them in different dicts"
            )


def _without_tensors(node: Any, path: Path) -> Any:
    if not isinstance(node, Tensor) and contains_tensors(node):
        raise ValueError(
            f"`opt_state` has a {type(node).__name__} with tensors at {render(path) or 'its root'}, which cannot be "
            "searched; use dicts, lists, tuples or dataclasses"
        )
    return node


def _refuse_hidden(node: Any, path: Path) -> None:
    """Raise if a container has tensors in an attribute that is no field.

    They would stay without an error.
    """
    if torch.compiler.is_dynamo_compiling():
        return  # Dynamo cannot trace the question
    for name, value in hidden_attributes(node).items():
        if contains_tensors(value):
            raise ValueError(
                f"`opt_state` has a {type(node).__name__} at {render(path) or 'its root'} with tensors in its attribute"
                f" {name!r}, which is no field and would not change; store them in a field"
            )


def _refuse_undeclared(node: Any, path: Path) -> None:
    raise ValueError(
        f"`opt_state` has {_describe(node)} at {render(path) or 'its root'}, whose role is not declared; register "
        "the type of the state with `dl.optim.register_state`, or pass `roles` with the field above the dict by name"
    )


def _describe(node: Any) -> str:
    return f"a tensor of shape {tuple(node.shape)}" if isinstance(node, Tensor) else "factors"

"""Project the state dicts of `torch.optim`, which number their tensors.

The table of fields was checked with torch 2.13. Other fields are refused by name, such as fields of Rprop, ASGD, LBFGS
and of optimizers outside torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import is_traceable_wrapper_subclass
from dynlora_fn._core._types import Factors, is_factors
from dynlora_fn.optim._containers import Path, Step, rebuild, render
from dynlora_fn.optim._project_factors import numbered_sides
from dynlora_fn.optim._roles import Role
from dynlora_fn.optim._visitor import Visitor

# The field in the state of `b`, the field in the state of `a`, and their role.
_MIRRORED: dict[tuple[str, str], Role] = {
    ("exp_avg", "exp_avg"): "first_moment",  # Adam, AdamW, NAdam, RAdam, Adamax
    ("exp_avg_sq", "exp_avg_sq"): "second_moment",  # Adam, AdamW, NAdam, RAdam
    ("max_exp_avg_sq", "max_exp_avg_sq"): "second_moment",  # Adam, AdamW with amsgrad
    ("exp_inf", "exp_inf"): "second_moment",  # Adamax
    ("momentum_buffer", "momentum_buffer"): "first_moment",  # SGD, Muon; for RMSprop see `_role`
    ("square_avg", "square_avg"): "second_moment",  # RMSprop, Adadelta
    ("grad_avg", "grad_avg"): "first_moment",  # RMSprop, centered
    ("acc_delta", "acc_delta"): "second_moment",  # Adadelta
    ("sum", "sum"): "second_moment",  # Adagrad
    ("col_var", "row_var"): "second_moment",  # Adafactor: means over the entries of each vector
    ("row_var", "col_var"): "unchanged",  # Adafactor: means over all vectors, also at rank 1
}
# Fields that belong to a whole tensor. Adafactor has `variance` for tensors with one axis.
_OF_TENSORS = {"step", "mu_product", "variance"}
_KNOWN = _OF_TENSORS.union(*_MIRRORED)


def is_torch_optim(node: Any) -> bool:
    """Return whether a node is the state dict of a `torch.optim.Optimizer`."""
    if not (isinstance(node, Mapping) and isinstance(node.get("state"), Mapping)):
        return False
    return isinstance(node.get("param_groups"), Sequence) and not hasattr(node["param_groups"], "_fields")


def project_torch_optim(node: Mapping[str, Any], context: Visitor, path: Path) -> Any:
    """Project a state dict of `torch.optim`.

    Raises:
        ValueError: If the tensors of a planned weight cannot be found, or a field has no entry in the table.
    """
    path = (*path, Step(False, "state"))
    entries = {index: dict(entry) for index, entry in node["state"].items()}
    for name, (index_b, index_a) in _indices(node["param_groups"], context, path).items():
        # Without entries, the optimizer has not updated the weight yet. If it has a plan, the caller reports this.
        b, a = entries.get(index_b, {}), entries.get(index_a, {})
        _check_fields(b, a, name, path)
        for (field_b, field_a), usual in _MIRRORED.items():
            role = _role(field_b, usual, b)
            if isinstance(b.get(field_b), Tensor):
                leaf, where = Factors(b[field_b], a[field_a]), (*path, Step(False, index_b), Step(False, field_b))
                if role == "unchanged":
                    _check_shared(leaf, name, context, where)
                else:
                    new = context.visit(leaf, role, name, where)
                    b[field_b], a[field_a] = new.b, new.a
    state = rebuild(
        node["state"], [rebuild(entry, [*entries[index].values()]) for index, entry in node["state"].items()]
    )
    return rebuild(node, [state if key == "state" else value for key, value in node.items()])


def _role(field: str, role: Role, entry: Mapping[str, Any]) -> Role:
    """Return the role of a field.

    `momentum_buffer` of RMSprop accumulates steps, which are not linear in the gradients.
    """
    return "second_moment" if field == "momentum_buffer" and "square_avg" in entry else role


def _check_fields(b: Mapping[str, Any], a: Mapping[str, Any], name: str, path: Path) -> None:
    where = f"`opt_state` has at {render(path)} for {name!r}"
    if unknown := sorted((set(b) | set(a)) - _KNOWN):
        raise ValueError(
            f"{where} the fields {unknown}, whose meaning for single vectors is unknown; use an optimizer with fields "
            f"among {', '.join(sorted(_KNOWN))}"
        )
    fields_b, fields_a = ({field for field, value in side.items() if value is not None} for side in (b, a))
    if fields_b != fields_a:
        raise ValueError(f"{where} the fields {sorted(fields_b)} of `b` and {sorted(fields_a)} of `a`; step with both")
    for field, value in (*b.items(), *a.items()):
        if is_traceable_wrapper_subclass(value):
            raise ValueError(f"{where} {field!r} as {type(value).__name__}; only plain tensors can be projected")


def _check_shared(leaf: Factors, name: str, context: Visitor, path: Path) -> None:
    """Raise ValueError if Adafactor's means over all vectors do not fit the factors.

    They must have an entry for each row of `b` and each column of `a`.
    """
    param = (context.trainable or {})[name]
    assert is_factors(param)
    if leaf.b.shape[:-1] != param.b.shape[:-1] or leaf.a.shape[-1:] != param.a.shape[-1:]:
        raise ValueError(
            f"`opt_state` has at {render(path)} statistics of shapes {tuple(leaf.b.shape)} and {tuple(leaf.a.shape)}, "
            f"which do not fit {name!r}; pass `trainable` in the order of the optimizer"
        )


def _indices(groups: Any, context: Visitor, path: Path) -> dict[str, tuple[Any, Any]]:
    """Return the indices of `b` and `a` for each low-rank weight.

    They come from the names in the parameter groups (torch 2.6 or later). Without names they come from the order of
    `trainable`, for a single group.
    """
    if context.trainable is None:
        raise ValueError(
            f"`opt_state` numbers its tensors at {render(path)}; pass `trainable` in the order of the optimizer"
        )
    indices = [index for group in groups for index in group["params"]]
    names = [name for group in groups for name in group.get("param_names", group["params"])]
    sides, count = numbered_sides(context.trainable)
    if indices and all(isinstance(name, str) for name in names):
        by_name = dict(zip(names, indices, strict=True))
        wanted = [f"{name}.{side}" for name in sides if name in context.plan for side in "ba"]
        if missing := [name for name in wanted if name not in by_name]:
            raise ValueError(
                f"`opt_state` must name the factors of planned weights, got no {', '.join(missing)}; pass the state of"
                " an optimizer over `trainable`"
            )
        found = {name: (by_name.get(f"{name}.b"), by_name.get(f"{name}.a")) for name in sides}
        return {name: pair for name, pair in found.items() if None not in pair}
    if len(groups) != 1:
        raise ValueError(
            f"`opt_state` has {len(groups)} parameter groups without names, whose order may differ from `trainable`"
            "; create the optimizer with named tensors, such as ('w.b', b) and ('w.a', a) for the weight 'w'"
        )
    if len(indices) != count:
        raise ValueError(
            f"`opt_state` has {len(indices)} tensors and `trainable` has {count}; pass `trainable` in the order of the "
            "optimizer"
        )
    return {name: (indices[b], indices[a]) for name, (b, a) in sides.items()}

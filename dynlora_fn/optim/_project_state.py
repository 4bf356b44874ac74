"""Apply a switch to the optimizer state: rules for the vectors' counterparts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

from torch import Tensor

from dynlora_fn._core._tree import map_leaf
from dynlora_fn._core._types import AnyFactors, Factors, LowRank, Params, Plan, Plans, Trainable, is_factors
from dynlora_fn.optim._eight_bit import decode_moments
from dynlora_fn.optim._state_rules import counterparts, is_pruned, replace_where, reset, transport

Rule: TypeAlias = Literal["reset", "reset_thawed", "keep", "prune", "transport"]
State = TypeVar("State")

# The names of the mean gradient here, in torch.optim, in torchopt and in optax.
_FIRST_MOMENTS = {"mu", "exp_avg", "momentum_buffer", "trace", "velocity", "m"}


class Change(NamedTuple):
    """Store the parameters before and after a switch, for the rule "transport"."""

    before: Params
    after: Params


class _Context(NamedTuple):
    """Everything except the leaf that the new value of a leaf depends on."""

    plan: Plans
    rule: Rule
    prune: float
    change: Change | None
    leaves: list[tuple[str, str]]  # name and side of each leaf of the trainable tree, for states that number them
    projected: set[str]  # names of planned parameters that the rule was applied to
    first_moments: dict[str, AnyFactors]  # by name, collected for "prune"


def project_optimizer_state(
    opt_state: State,
    plan: Plans,
    *,
    rule: Rule = "reset",
    prune: float = 0.99,
    change: Change | None = None,
    trainable: Trainable | None = None,
) -> State:
    """Apply a rule to the optimizer state of the switched vectors' counterparts.

    Nothing else in the state changes. For each active entry of side a, the rule applies to the state of ``b[:, k]``.
    For side b it applies to the state of ``a[k]``. A switched vector keeps its slot's state, because its gradient
    depends on the counterpart and not on itself.

    ==============  ==================================================================================================
    rule            what happens to the counterparts
    ==============  ==================================================================================================
    "reset"         Moments and counts become zero. The counterparts are frozen for ``plan.frozen_for`` updates, during
                    which the count runs on (arXiv:2406.06564, section 3.3, as implemented).
    "reset_thawed"  As "reset", but the count starts at the thaw, so that the first update is a full one.
    "keep"          The state does not change.
    "prune"         The first moment loses a share of `prune` of its entries, the smallest in magnitude
                    (arXiv:2307.05695). Other moments lose such entries only where the first moment loses them. An entry
                    without its second moment would move by its first moment over `eps`.
    "transport"     The first moment becomes what it would have been with the new vectors, as far as it determines that.
                    With ``mu_b = G a.T / rank`` for an unknown G, ``mu_b (a a.T)^-1 a a_new.T`` is the moment of the G
                    of least norm. `mu_a` is treated in the same way. All other state is kept.
    ==============  ==================================================================================================

    Args:
        opt_state: The state, a tree of tuples, dicts and lists. It contains dicts by parameter name, whose `Factors`
            have the shapes ``(..., rank)`` on side b and ``(..., rank, .)`` on side a, as in `AdamWState`. Integer
            leaves are counts. First moments are called mu, exp_avg, momentum_buffer, trace, velocity or m. Dicts in a
            field or under a key called ``frozen_for`` are set to the plan's number of updates. With `trainable`, also
            a state that numbers its tensors: the state dict of a `torch.optim.Optimizer`, or lists of all tensors as
            in torchopt. Their counts belong to whole tensors and do not change.
        plan: The plans by name.
        rule: One of the rules in the table.
        prune: The share in [0, 1] of the counterparts' entries, in one moment and side of a weight, that become zero.
        change: The parameters before and after the switch, for "transport" only.
        trainable: The trainable parameters in the optimizer's order, if the state is by number instead of by name.

    Returns:
        The new state, with the structure, shapes and dtypes of the old one.

    Raises:
        ValueError: If `plan` is not by name, `rule` is unknown, or `prune` is not in [0, 1]. If `change` is missing for
            "transport" or passed with another rule. If the state has no factors of a planned parameter, or for
            "transport" no first moment, or an 8-bit one.

    Numerics: "transport" is computed in float32 or a wider dtype of the factors, and rounded to the moment's dtype. All
    other rules are exact.

    Example:
        >>> import torch
        >>> from dynlora_fn import Factors, Plan, SidePlan
        >>> from dynlora_fn.optim import sgd
        >>> trainable = {"w": Factors(b=torch.ones(3, 2), a=torch.ones(2, 3))}
        >>> opt_state = sgd().init(trainable)._replace(mu=trainable)
        >>> side = SidePlan(slots=torch.tensor([1]), indices=torch.tensor([2]), active=torch.tensor([True]))
        >>> none = side._replace(active=torch.tensor([False]))
        >>> plan = {"w": Plan(b=none, a=side, frozen_for=torch.tensor(5))}  # a[1] is switched
        >>> project_optimizer_state(opt_state, plan).mu["w"].b  # so the moment of b[:, 1] is reset
        tensor([[1., 0.],
                [1., 0.],
                [1., 0.]])
    """
    if isinstance(plan, Plan):
        raise ValueError("`plan` must be by parameter name, got a single Plan; pass a dict of plans")
    if rule not in get_args(Rule):
        raise ValueError(f"`rule` must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if not 0 <= prune <= 1:
        raise ValueError(f"`prune` must be in [0, 1], got {prune}")
    if (rule == "transport") != (change is not None):
        raise ValueError(f"`change` must be passed with rule 'transport' and with no other, got rule {rule!r}")
    leaves = [
        (name, side) for name, leaf in (trainable or {}).items() for side in (("b", "a") if is_factors(leaf) else ("",))
    ]
    context = _Context(plan, rule, prune, change, leaves, set(), {})
    if rule == "prune":
        _project(opt_state, context, ())  # collects the first moments, which decide what other moments lose
    projected: State = _project(opt_state, context, ())
    missing = sorted(set(plan) - context.projected)
    if missing and rule == "transport":
        raise ValueError(
            f"`opt_state` must have a first moment of every planned parameter, got none for {missing}; use another rule"
        )
    if missing:
        raise ValueError(
            f"`opt_state` must have the factors of every planned parameter, got none for {missing}; "
            "initialize the optimizer with all trainable parameters"
        )
    return projected


def _project(tree: Any, context: _Context, path: tuple[Any, ...]) -> Any:
    if is_factors(tree):
        name = path[-1]
        return _apply_rule(tree, name, _kind(tree, path), context) if name in context.plan else tree
    if isinstance(tree, Mapping):
        return _project_mapping(tree, context, path)
    if not isinstance(tree, tuple | list):
        return tree
    if hasattr(tree, "_fields"):
        return type(tree)(
            *(_project(leaf, context, (*path, key)) for key, leaf in zip(tree._fields, tree, strict=True))
        )
    if context.leaves and len(tree) == len(context.leaves) and all(isinstance(leaf, Tensor) for leaf in tree):
        return type(tree)(_project_listed(dict(enumerate(tree)), context, path).values())
    return type(tree)(_project(leaf, context, (*path, index)) for index, leaf in enumerate(tree))


def _project_mapping(tree: Mapping[Any, Any], context: _Context, path: tuple[Any, ...]) -> dict[Any, Any]:
    is_numbered = all(isinstance(key, int) and isinstance(entry, Mapping) for key, entry in tree.items())
    if context.leaves and tree and is_numbered:
        return _project_numbered(tree, context, path)
    return {key: _project(leaf, context, (*path, key)) for key, leaf in tree.items()}


def _project_numbered(tree: Mapping[int, Any], context: _Context, path: tuple[Any, ...]) -> dict[int, Any]:
    """Project torch.optim's ``{index: {"exp_avg": tensor, ...}}``, field by field."""
    new = {index: dict(entry) for index, entry in tree.items()}
    for field in {field for entry in tree.values() for field in entry}:
        column = {index: entry[field] for index, entry in tree.items() if field in entry}
        for index, leaf in _project_listed(column, context, (*path, field)).items():
            new[index][field] = leaf
    return new


def _project_listed(tree: Mapping[int, Any], context: _Context, path: tuple[Any, ...]) -> dict[int, Any]:
    """Project tensors that are stored by index.

    The two sides of a weight follow each other and are projected as `Factors`.
    """
    new = dict(tree)
    for index, (name, side) in enumerate(context.leaves):
        b, a = tree.get(index), tree.get(index + 1)
        if side == "b" and isinstance(b, Tensor) and isinstance(a, Tensor) and b.ndim > 1:
            new[index], new[index + 1] = _project(Factors(b, a), context, (*path, name))
    return new


def _kind(leaf: AnyFactors, path: Sequence[Any]) -> str:
    if "frozen_for" in path:
        return "frozen_for"
    if isinstance(leaf.b, Tensor) and not leaf.b.is_floating_point():
        return "count"
    return "first" if _FIRST_MOMENTS & {key for key in path if isinstance(key, str)} else "moment"


def _apply_rule(leaf: AnyFactors, name: str, kind: str, context: _Context) -> AnyFactors:
    plan, new = context.plan[name], leaf
    if context.rule in ("reset", "reset_thawed"):
        new = reset(leaf, kind, plan, is_count_delayed=context.rule == "reset_thawed")
    elif context.rule == "prune" and kind in ("first", "moment"):
        moments = decode_moments(leaf)
        if kind == "first":
            context.first_moments[name] = moments
        first_moments = context.first_moments.get(name, moments)
        pruned = map_leaf(partial(is_pruned, share=context.prune), moments, counterparts(leaf, plan), first_moments)
        new = map_leaf(replace_where, leaf, pruned)
    elif context.rule == "transport" and kind == "first":
        assert context.change is not None
        if not (isinstance(leaf.b, Tensor) and isinstance(leaf.a, Tensor)):
            raise ValueError(
                f"`rule` must not be 'transport' for 8-bit moments, got them for {name!r}; use adamw(moments='float32')"
            )
        before, after = context.change.before[name], context.change.after[name]
        assert isinstance(before, LowRank)
        assert isinstance(after, LowRank)
        new = transport(leaf, before.factors, after.factors, plan)
    if context.rule != "transport" or kind == "first":
        context.projected.add(name)
    return new

"""What a switch does to the state of an optimizer: rules for the counterparts of switched vectors."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from dynlora_fn._core._types import Factors, LowRank, Params, Plan, Plans, SidePlan, Trainable
from dynlora_fn.optim._eight_bit import SignedMoment, UnsignedMoment, decode_moments, reset_moment

Rule: TypeAlias = Literal["reset", "reset_thawed", "keep", "prune", "transport"]
State = TypeVar("State")

# What optimizers call the mean of gradients: here, in torch.optim, in torchopt and optax.
_FIRST_MOMENTS = {"mu", "exp_avg", "momentum_buffer", "trace", "velocity", "m"}


class Change(NamedTuple):
    """The parameters before and after a switch, that the rule "transport" goes by."""

    before: Params
    after: Params


class _How(NamedTuple):
    """All that a leaf's new value depends on, but for the leaf."""

    plan: Plans
    rule: Rule
    prune: float
    change: Change | None
    leaves: list[tuple[str, str]]  # name and side of each leaf of the trainable tree, for states that count them
    seen: set[str]
    first: dict[str, Factors]  # by name the first moment, where there is one


def project_optimizer_state(
    opt_state: State,
    plan: Plans,
    *,
    rule: Rule = "reset",
    prune: float = 0.99,
    change: Change | None = None,
    trainable: Trainable | None = None,
) -> State:
    """The state after a switch: that of the switched vectors' counterparts follows a rule, and nothing else changes.

    For each active entry of side a it is the state of ``b[:, k]``, for side b that of ``a[k]``. A switched vector keeps
    its slot's state, since its gradient depends on the counterpart and not on itself.

    ==============  ==================================================================================================
    rule            the counterparts'
    ==============  ==================================================================================================
    "reset"         moments and counts become zero, and they are frozen for ``plan.frozen_for`` updates, in which the
                    count runs on (arXiv:2406.06564, section 3.3, as implemented)
    "reset_thawed"  likewise, but the count starts when they thaw: the first update is then a full one
    "keep"          state stays
    "prune"         first moment loses a share of `prune` of its entries, the smallest in magnitude
                    (arXiv:2307.05695), and others lose likewise what is gone of the first: an entry without its second
                    moment would move by its first over `eps`
    "transport"     first moment becomes what it would have been with the new vectors, as far as it tells: with
                    ``mu_b = G a.T / rank`` for an unknown G, ``mu_b (a a.T)^-1 a a_new.T`` is that of the G of least
                    norm; likewise ``mu_a``. The rest stays
    ==============  ==================================================================================================

    Args:
        opt_state: any tree of tuples, dicts and lists that somewhere holds dicts by parameter name, with `Factors` of
            ``(..., rank)`` on side b and ``(..., rank, .)`` on side a, as `adamw`'s does, whose integers are counts and
            whose first moments are called mu, exp_avg, momentum_buffer, trace, velocity or m. Dicts in a field or under
            a key called ``frozen_for`` are set to the plan's number of updates. Given `trainable`, also states that
            have tensors by number: the state dict of a `torch.optim.Optimizer`, and lists of all of them as in
            torchopt's, whose counts are of whole tensors and stay.
        plan: by name.
        rule: see above.
        prune: share in [0, 1] of the counterparts' entries in one moment and side of a weight that become zero.
        change: parameters before and after the switch, for "transport".
        trainable: in the order that the optimizer has it in, if its state is by number instead of by name.

    Raises:
        ValueError: if the plan is for a parameter that the state has no factors of, or no first moment to transport.
    """
    if isinstance(plan, Plan):
        raise ValueError("`plan` must be by parameter name to be looked up in the state, got a single Plan")
    if rule not in get_args(Rule):
        raise ValueError(f"`rule` must be one of {', '.join(get_args(Rule))}, got {rule!r}")
    if not 0 <= prune <= 1:
        raise ValueError(f"`prune` must be in [0, 1], got {prune}")
    if (rule == "transport") != (change is not None):
        raise ValueError(f"`change` must be given for 'transport' and for nothing else, got {rule!r}")
    leaves = [
        (name, side)
        for name, leaf in (trainable or {}).items()
        for side in (leaf._fields if isinstance(leaf, Factors) else ("",))
    ]
    how = _How(plan, rule, prune, change, leaves, set(), {})
    if rule == "prune":
        _project(opt_state, how, ())  # sees the first moments, by which others go
    projected: State = _project(opt_state, how, ())
    if missing := set(plan) - how.seen:
        wanted = "a first moment" if rule == "transport" else "the factors"
        raise ValueError(f"`opt_state` must hold {wanted} of every planned parameter, got none for {sorted(missing)}")
    return projected


def _project(tree: Any, how: _How, path: tuple[Any, ...]) -> Any:
    if isinstance(tree, Factors):
        name = path[-1]
        return _follow(tree, name, _kind(tree, path), how) if name in how.plan else tree
    if isinstance(tree, Mapping):
        return _project_mapping(tree, how, path)
    if not isinstance(tree, tuple | list):
        return tree
    if hasattr(tree, "_fields"):
        return type(tree)(*(_project(leaf, how, (*path, key)) for key, leaf in zip(tree._fields, tree, strict=True)))
    if how.leaves and len(tree) == len(how.leaves) and all(isinstance(leaf, Tensor) for leaf in tree):
        return type(tree)(_project_listed(dict(enumerate(tree)), how, path).values())
    return type(tree)(_project(leaf, how, (*path, number)) for number, leaf in enumerate(tree))


def _project_mapping(tree: Mapping[Any, Any], how: _How, path: tuple[Any, ...]) -> dict[Any, Any]:
    is_numbered = all(isinstance(key, int) and isinstance(own, Mapping) for key, own in tree.items())
    if how.leaves and tree and is_numbered:
        return _project_numbered(tree, how, path)
    return {key: _project(leaf, how, (*path, key)) for key, leaf in tree.items()}


def _project_numbered(tree: Mapping[int, Any], how: _How, path: tuple[Any, ...]) -> dict[int, Any]:
    """torch.optim's ``{number: {"exp_avg": tensor, ...}}``: both sides of a weight as factors, and back."""
    new = {number: dict(entry) for number, entry in tree.items()}
    for field in {field for entry in tree.values() for field in entry}:
        column = {number: entry[field] for number, entry in tree.items() if field in entry}
        for number, leaf in _project_listed(column, how, (*path, field)).items():
            new[number][field] = leaf
    return new


def _project_listed(tree: Mapping[int, Any], how: _How, path: tuple[Any, ...]) -> dict[int, Any]:
    """One tensor by number: those of both sides of a weight as factors, and back."""
    new = dict(tree)
    for number, (name, side) in enumerate(how.leaves):
        b, a = tree.get(number), tree.get(number + 1)
        if side == "b" and isinstance(b, Tensor) and isinstance(a, Tensor) and b.ndim > 1:
            new[number], new[number + 1] = _project(Factors(b, a), how, (*path, name))
    return new


def _kind(leaf: Factors, path: Sequence[Any]) -> str:
    if "frozen_for" in path:
        return "frozen_for"
    if isinstance(leaf.b, Tensor) and not leaf.b.is_floating_point():
        return "count"
    return "first" if _FIRST_MOMENTS & {key for key in path if isinstance(key, str)} else "moment"


def _follow(leaf: Factors, name: str, kind: str, how: _How) -> Factors:
    plan, new = how.plan[name], leaf
    if how.rule in ("reset", "reset_thawed"):
        new = _reset(leaf, kind, plan, is_count_delayed=how.rule == "reset_thawed")
    elif how.rule == "prune" and kind in ("first", "moment"):
        numbers = decode_moments(leaf)
        if kind == "first":
            how.first[name] = numbers
        sides = zip(numbers, counterparts(leaf, plan), how.first.get(name, numbers), strict=True)
        b, a = (_is_pruned(own, is_own, first, how.prune) for own, is_own, first in sides)
        new = Factors(_filled(leaf.b, b), _filled(leaf.a, a))
    elif how.rule == "transport" and kind == "first":
        assert how.change is not None
        if not all(isinstance(side, Tensor) for side in leaf):
            raise ValueError(f"`rule` must not be 'transport' for moments in 8 bit, got it for those of {name!r}")
        before, after = how.change.before[name], how.change.after[name]
        assert isinstance(before, LowRank)
        assert isinstance(after, LowRank)
        new = _transport(leaf, before.factors, after.factors, plan)
    if how.rule != "transport" or kind == "first":
        how.seen.add(name)
    return new


def counterparts(leaf: Factors, plan: Plan) -> Factors:
    """Which vectors of each side are counterparts of switched ones; broadcasts against the factors."""
    b, a = (side if isinstance(side, Tensor) else side.codes for side in leaf)
    return Factors(
        b=_switched_slots(plan.a, b.shape[-1])[..., None, :],
        a=_switched_slots(plan.b, a.shape[-2])[..., :, None],
    )


def _reset(leaf: Factors, kind: str, plan: Plan, *, is_count_delayed: bool) -> Factors:
    new = torch.zeros((), device=plan.frozen_for.device)
    if kind == "frozen_for":
        new = plan.frozen_for
    elif kind == "count" and is_count_delayed:
        new = -plan.frozen_for
    b, a = (_filled(side, own, new) for own, side in zip(counterparts(leaf, plan), leaf, strict=True))
    return Factors(b, a)


def _filled(side: Any, is_filled: Tensor, value: Tensor | None = None) -> Any:
    """With the value, or zero, where `is_filled`; moments in 8 bit are never filled with anything else."""
    if isinstance(side, SignedMoment | UnsignedMoment):
        return reset_moment(side, is_filled)
    return torch.where(is_filled, 0 if value is None else value.to(side), side)


def _is_pruned(leaf: Tensor, is_own: Tensor, first: Tensor, share: float) -> Tensor:
    is_own = is_own.expand(leaf.shape)
    return is_own & _is_small(leaf, is_own, share) & _is_small(first, is_own, share)


def _is_small(leaf: Tensor, is_own: Tensor, share: float) -> Tensor:
    """Which entries are no larger than the last to go of the counterparts', of a matrix as a whole."""
    magnitudes = torch.where(is_own, leaf.abs(), -1).flatten(-2).sort(dim=-1).values  # those of others in front
    number = is_own.flatten(-2).sum(-1)
    last = (magnitudes.shape[-1] - number + (share * (number - 1)).floor().long()).clamp(max=magnitudes.shape[-1] - 1)
    return leaf.abs() <= magnitudes.gather(-1, last[..., None])[..., None]


def _transport(leaf: Factors, before: Factors, after: Factors, plan: Plan) -> Factors:
    is_own = counterparts(leaf, plan)
    b = (leaf.b @ _in_terms_of(before.a, after.a).to(leaf.b.dtype)).to(leaf.b.dtype)
    a = (leaf.a.mT @ _in_terms_of(before.b.mT, after.b.mT).to(leaf.a.dtype)).mT
    return Factors(b=torch.where(is_own.b, b, leaf.b), a=torch.where(is_own.a, a, leaf.a))


def _in_terms_of(before: Tensor, after: Tensor) -> Tensor:
    """Coefficients (rank, rank) of the new rows' projections in the old ones: ``(v v.T)^+ v v_new.T``."""
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    coefficients: Tensor = torch.linalg.pinv(before @ before.mT, hermitian=True) @ (before @ after.mT)
    return coefficients


def _switched_slots(plan: SidePlan, rank: int) -> Tensor:
    slots = torch.arange(rank, device=plan.slots.device)
    return ((plan.slots[..., None, :] == slots[:, None]) & plan.active[..., None, :]).any(-1)

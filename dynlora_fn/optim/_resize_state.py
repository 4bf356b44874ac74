"""Change the rank of the optimizer state of low-rank weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch

from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._types import AnyFactors, LowRank, OneSidedFactors, Trainable, is_factors, sides_of
from dynlora_fn.optim._containers import Path, render
from dynlora_fn.optim._eight_bit import decode_moments, empty_moments, encode_moments, is_eight_bit, moment_shape
from dynlora_fn.optim._roles import Role, Roles
from dynlora_fn.optim._search_state import project_state

State = TypeVar("State")

# By role, the exponents of old / new, because a gradient of factors contains 1 / rank.
_EXPONENTS: dict[Role, int] = {"first_moment": 1, "second_moment": 2}


def resize_state(
    opt_state: State, before: Mapping[str, LowRank], after: Mapping[str, LowRank], *, roles: Roles | None = None
) -> State:
    """Return the state of weights at other ranks, as `dynlora_fn.interop.resize` does.

    Args:
        opt_state: The state, with declared roles.
        before: The weights before the resize, by name.
        after: The resized weights by name.
        roles: The roles of fields whose types do not declare roles. Default None means no roles.

    Raises:
        ValueError: If the state has no factors of a resized weight, or factors whose role or shapes do not fit.
    """
    ranks = {name: (_rank(before[name]), _rank(param)) for name, param in after.items()}
    changes = {name: Ranks(*pair) for name, pair in ranks.items() if pair[0] != pair[1]}
    resizing = _Resizing(changes, roles or {}, set())
    resized: State = project_state(opt_state, resizing, ())
    if missing := sorted(set(changes) - resizing.visited):
        raise ValueError(
            f"`opt_state` must have the factors of every resized weight, got none for {missing}; pass the state of"
            " these weights"
        )
    return resized


class Ranks(NamedTuple):
    """The rank of a weight before and after."""

    old: int
    new: int


class _Resizing(NamedTuple):
    plan: Mapping[str, Ranks]
    roles: Roles
    visited: set[str]
    trainable: Trainable | None = None

    def visit(self, leaf: AnyFactors, role: Role, name: str, path: Path) -> AnyFactors:
        if name not in self.plan:
            return leaf
        ranks = self.plan[name]
        b, *others = map(moment_shape, sides_of(leaf))
        found = b[-1], *(a[-2] for a in others)
        if set(found) != {ranks.old}:
            raise ValueError(
                f"`opt_state` has factors of {name!r} at {render(path)} of the ranks {found}, but the weight has rank "
                f"{ranks.old}; pass the state of these parameters"
            )
        self.visited.add(name)
        if isinstance(leaf, OneSidedFactors):  # all vectors of `a` are new
            return leaf._replace(b=_resized(leaf.b, -1, Ranks(0, ranks.new), 1.0, name))
        scale = (ranks.old / ranks.new) ** _EXPONENTS.get(role, 0)
        return leaf._replace(b=_resized(leaf.b, -1, ranks, scale, name), a=_resized(leaf.a, -2, ranks, scale, name))

    def keep(self, node: Any, path: Path) -> Any:
        if any(is_factors(leaf) for leaf in tree_leaves(node, is_leaf=is_factors)):
            raise ValueError(
                f"`opt_state` has factors at {render(path)} with the role 'unchanged', which cannot be resized because "
                "their meaning is unknown; initialize the optimizer again"
            )
        return node

    def check_foreign(self, library: str, path: Path) -> None:
        raise ValueError(
            f"`opt_state` has a state of {library} at {render(path) or 'its root'}, which cannot be resized; "
            "initialize the optimizer again with the new parameters"
        )


def _rank(param: LowRank) -> int:
    return param.factors.b.shape[-1]


def _resized(side: Any, axis: int, ranks: Ranks, scale: float, name: str) -> Any:
    """Return one side with its vectors times `scale`, and zeros for new vectors."""
    staying = decode_moments(side).narrow(axis, 0, min(ranks))
    staying = staying * scale if scale != 1 else staying
    shape = list(staying.shape)
    shape[axis] = max(ranks.new - ranks.old, 0)
    resized = torch.cat([staying, staying.new_zeros(shape)], axis)
    return encode_moments(resized, empty_moments(resized, type(side)), name) if is_eight_bit(side) else resized

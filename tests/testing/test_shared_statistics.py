"""`check_state_projection` and statistics that all vectors of a side share, as Adafactor has them."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, testing
from dynlora_fn._core._types import is_factors
from dynlora_fn.testing import BrokenPromiseError, Shape, low_rank, low_rank_params, plan_of
from tests.support.foreign_states import torch_state, torchopt_state


class Adafactor(NamedTuple):
    """Means of squared gradients over the entries of each vector, and over all vectors."""

    vectors: dict[str, Any]
    shared: dict[str, Any]


ROLES = {"vectors": "second_moment", "shared": "unchanged"}


class Declared(NamedTuple):
    vectors: dict[str, Any]
    shared: dict[str, Any]
    roles = ROLES


def means(trainable: Any, kind: Any = Adafactor) -> Any:
    def of_vectors(leaf: Any) -> Any:
        if not is_factors(leaf):
            return leaf.abs()
        return Factors(leaf.b.abs().mean(-2, keepdim=True), leaf.a.abs().mean(-1, keepdim=True))

    def shared(leaf: Any) -> Any:
        if not is_factors(leaf):
            return leaf.abs()
        return Factors(leaf.b.abs().mean(-1, keepdim=True), leaf.a.abs().mean(-2, keepdim=True))

    return kind(*(tree_map(mean, dict(trainable), is_leaf=is_factors) for mean in (of_vectors, shared)))


@st.composite
def cases(draw: st.DrawFn, kind: Any) -> Any:
    param = draw(low_rank_params(storages=testing.PLAIN[:1]))
    state = means({"w": param.factors, "bias": testing.normal(0, 3)}, kind)
    return state, {"w": draw(testing.plans(param))}


def test_shared_statistics_stay():
    """Also at rank 1, where shapes do not tell them apart and the role does."""
    testing.check_state_projection(dl.project_optimizer_state, arguments=cases(Declared))
    project = partial(dl.project_optimizer_state, roles=ROLES)
    testing.check_state_projection(project, roles=ROLES, arguments=cases(Adafactor))


def test_shapes_tell_them_apart_from_rank_2():
    param = low_rank(Shape(4, 5, 3), (2,))
    project = partial(dl.project_optimizer_state, roles=ROLES)
    arguments = means({"w": param.factors}), {"w": plan_of(3, b=1, a=2)}
    testing.check_state_projection(project, arguments=arguments)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_projection_that_resets_them_is_found(rank):
    param = low_rank(Shape(4, 5, rank))
    plan = {"w": plan_of(rank, b=1, a=1)}

    def project(state: Any, plan: Any) -> Any:
        new = dl.project_optimizer_state(state, plan)
        zero = tree_map(torch.zeros_like, new.shared["w"])
        return new._replace(shared={**new.shared, "w": zero})

    with pytest.raises(
        BrokenPromiseError, match=r"shared\['w'\](\.b)? has changed and .*: . of . entries differ, by up"
    ):
        testing.check_state_projection(project, arguments=(means({"w": param.factors}, Declared), plan))


def trainable_of(rank: int, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    params: dict[str, LowRank | torch.Tensor] = {
        "w": low_rank(Shape(5, 6, rank), stack), "bias": testing.normal(1, 5), "other": low_rank(Shape(3, 4, 2), seed=1)
    }  # fmt: skip
    return dict(dl.partition(params).trainable)


STATES = {
    "Adafactor": torch_state(torch.optim.Adafactor),
    "AdamW": torch_state(torch.optim.AdamW, amsgrad=True),
    "RMSprop": torch_state(torch.optim.RMSprop, momentum=0.9, centered=True),
    "torchopt": torchopt_state("adam"),
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
@pytest.mark.parametrize(("rank", "stack"), [(1, ()), (3, ()), (2, (2,))])
def test_states_that_number_their_tensors_are_checked(make, rank, stack):
    trainable = trainable_of(rank, stack)
    state, plan = make(trainable), {"w": plan_of(rank, b=1, a=1)}
    project = partial(dl.project_optimizer_state, trainable=trainable)
    testing.check_state_projection(project, trainable=trainable, arguments=(state, plan))
    for wrong in (lambda state, plan: state, lambda state, plan: tree_map(_zeros, state)):
        with pytest.raises(BrokenPromiseError, match=r"and has .* instead of 0|has changed and"):
            testing.check_state_projection(wrong, trainable=trainable, arguments=(state, plan))


def _zeros(leaf: Any) -> Any:
    return torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def test_a_shared_statistic_of_torch_s_adafactor_must_stay():
    trainable = trainable_of(1)
    state, plan = STATES["Adafactor"](trainable), {"w": plan_of(1, b=1, a=1)}

    def project(state: Any, plan: Any) -> Any:
        new = dl.project_optimizer_state(state, plan, trainable=trainable)
        new["state"][0]["row_var"] = torch.zeros_like(new["state"][0]["row_var"])
        return new

    with pytest.raises(BrokenPromiseError, match=r"\['row_var'\] has changed and belongs to no counterpart"):
        testing.check_state_projection(project, trainable=trainable, arguments=(state, plan))


def test_trainable_is_asked_for():
    trainable = trainable_of(2)
    project = partial(dl.project_optimizer_state, trainable=trainable)
    arguments = STATES["Adafactor"](trainable), {"w": plan_of(2, b=1, a=1)}
    with pytest.raises(BrokenPromiseError, match=r"numbers its tensors at \['state'\]; pass `trainable`"):
        testing.check_state_projection(project, arguments=arguments)

"""Checkers find the bugs that are planted, and make them small."""

import re
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn import LowRank, Plan, testing
from dynlora_fn.testing import BrokenPromiseError, Shape, low_rank, low_rank_params, plans


def wrong_slot(param: LowRank, plan: Plan) -> LowRank:
    """Fold the differences of side a into the base with the next slot's counterpart."""
    rank = param.factors.a.shape[-2]
    new, outgoing = dl.switch(param, plan)
    incoming = dl.candidates(param, plan)
    difference = torch.where(plan.a.active[..., None], outgoing.a - incoming.a, 0)
    stack = param.shape[:-2]
    columns = [side.expand(*stack, -1)[..., None, :] for side in (plan.a.slots, (plan.a.slots + 1) % rank)]
    right, wrong = (param.factors.b.gather(-1, index.expand(*param.shape[:-1], -1)) for index in columns)
    return new._replace(base=new.base + (wrong - right) @ difference / rank)


def in_place(param: LowRank) -> LowRank:
    param.factors.b.zero_()
    return param


def drawn(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(torch.randn_like, param.factors))


def rounded(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(lambda leaf: leaf.float(), param.factors))


def by_value(param: LowRank) -> LowRank:
    return dl.merge(param) if param.factors.b.sum() > 0 else param


class Counting:
    """Each call gives another result."""

    calls = 0

    def __call__(self, param: LowRank) -> LowRank:
        self.calls += 1
        return param._replace(factors=tree_map(lambda leaf: leaf + self.calls, param.factors))


def infinite(param: LowRank) -> LowRank:
    """Divide by a norm of zero. The bound on roundings is then infinite too."""
    b, a = (side.abs() + 1 for side in param.factors)
    return param._replace(factors=param.factors._replace(b=b / 0, a=a))


class FiniteInTheGraph:
    """Return an infinite entry in eager mode, and a finite entry from a graph."""

    def __call__(self, param: LowRank) -> LowRank:
        base = param.base.clone()
        base[..., 0, 0] = 1.0 if torch.compiler.is_compiling() else torch.inf
        return param._replace(base=base)


def over_the_stack(param: LowRank) -> LowRank:
    return param._replace(factors=tree_map(lambda leaf: leaf - leaf.mean(), param.factors))


def plain(**settings: Any) -> st.SearchStrategy[LowRank]:
    return low_rank_params(storages=testing.PLAIN[:1], factor_dtypes=st.just(torch.float64), deferred=False, **settings)


def with_plan() -> st.SearchStrategy[Any]:
    return plain().flatmap(lambda param: st.tuples(st.just(param), plans(param)))


# By name: a checker, a transform that breaks its promise, and the checker's message.
BUGS = {
    "weight": (testing.check_preserves_weight, lambda param: param._replace(base=param.base + 1e-9), "off by up to"),
    "scale": (testing.check_preserves_weight, lambda param: dl.merge(param)._replace(factors=param.factors), "off by"),
    "infinite weight": (testing.check_preserves_weight, infinite, "off by up to inf"),
    "in place": (testing.check_pure, in_place, r"factors\.b has been written into"),
    "global generator": (testing.check_pure, drawn, "a random number was drawn from torch's global generator"),
    "dtype": (testing.check_keeps_structure, rounded, r"\.factors\.b is .*float32.* instead of .*float64"),
    "gradient": (
        testing.check_keeps_structure,
        lambda param: param._replace(base=param.base.clone().requires_grad_()),
        r"\.base now requires a gradient",
    ),
    "random": (testing.check_deterministic, drawn, r"factors\.b: \d+ of \d+ entries differ"),
    "control flow": (testing.check_compiles, by_value, "Data-dependent|data-dependent|recompile"),
    "recompile": (testing.check_compiles, Counting(), r"recompile|\.factors\.b"),
    "stack": (testing.check_vmap, over_the_stack, r"factors\.b: "),
    "raises": (testing.check_preserves_weight, lambda param: 1 / 0, "ZeroDivisionError: division by zero"),
    "nothing": (
        testing.check_preserves_weight,
        lambda param: None,
        "TypeError: `transform` returns NoneType; return the new weight",
    ),
}


@pytest.mark.parametrize(("check", "transform", "said"), BUGS.values(), ids=BUGS)
def test_bugs_are_found_and_told(check, transform, said):
    arguments = plain() if check is not testing.check_vmap else plain(stacks=st.just((2,)))
    with pytest.raises(BrokenPromiseError) as caught:
        check(transform, arguments=arguments)
    message = str(caught.value)
    assert re.search(r"promised: .*\nhappened: .*\n(.*\n)*smallest example: ", message), message
    assert re.search(said, message), message
    assert re.search(r"arguments=\(?(low_rank|LowRank)\(", message), message


def test_infinities_are_compared_with_a_tolerance():
    with pytest.raises(BrokenPromiseError, match="is off by inf"):
        testing.check_compiles(FiniteInTheGraph(), arguments=plain(), examples=1, backend="eager", tolerance=4.0)
    infinite_base = low_rank(Shape(4, 4, 2))._replace(base=torch.full((4, 4), torch.inf))
    testing.check_compiles(lambda param: param, arguments=infinite_base, backend="eager", tolerance=4.0)


def test_a_wrong_slot_shrinks_to_two_slots():
    """From weights up to 8 x 8 with plans for all slots, find the smallest with two slots to confuse."""
    with pytest.raises(BrokenPromiseError) as caught:
        testing.check_preserves_weight(wrong_slot, arguments=with_plan(), examples=200)
    message = str(caught.value)
    assert "promised: the weight does not change" in message
    assert "Shape(out_features=2, in_features=2, rank=2)" in message
    assert re.search(r"a=side_plan\(2, [12], \(\), 0, share_active=1\.0\)", message), message


def switched_side(opt_state: Any, plan: Any) -> Any:
    """Reset the switched vectors themselves instead of their counterparts."""
    return dl.project_optimizer_state(
        opt_state, {name: Plan(b=entry.a, a=entry.b, frozen_for=entry.frozen_for) for name, entry in plan.items()}
    )


def no_moments(opt_state: Any, plan: Any) -> Any:
    new = dl.project_optimizer_state(opt_state, plan)
    return new._replace(inner=new.inner._replace(mu=opt_state.inner.mu))


def one_too_many(opt_state: Any, plan: Any) -> Any:
    new = dl.project_optimizer_state(opt_state, plan)
    count = {**new.inner.count, "bias": torch.zeros_like(new.inner.count["bias"])}
    return new._replace(inner=new.inner._replace(count=count))


@pytest.mark.parametrize(
    ("project", "said"),
    [
        (
            switched_side,
            r"slot 0 (is the counterpart of a switched vector and has|has changed and is not a counterpart)",
        ),
        (no_moments, r"\.inner\.mu\['w'\]\.[ba], slot 0 is the counterpart of a switched vector and has"),
        (one_too_many, r"\.inner\.count\['bias'\] has changed and belongs to no counterpart"),
        (
            lambda opt_state, plan: opt_state._replace(inner=opt_state.inner._replace(nu=opt_state.inner.mu)),
            "has changed|is not",
        ),
        (lambda opt_state, plan: opt_state.inner.mu, "the structure is .*(.|\\n)* instead of"),
    ],
    ids=["switched side", "moments", "bias", "nu", "structure"],
)
def test_projections_that_miss_are_found(project, said):
    with pytest.raises(BrokenPromiseError, match=said):
        testing.check_state_projection(project, examples=100)


def test_what_a_step_keeps_to_itself_is_lost_at_a_restart():
    def make():
        steps = []

        def step(state, index):
            steps.append(index)
            return state + len(steps), state

        return torch.zeros(()), step

    with pytest.raises(
        BrokenPromiseError, match=r"interrupted after 1 steps(.|\n)*smallest example: .*\n.*arguments=\(1,\)"
    ):
        testing.check_resumes(make)


def test_a_state_that_is_not_saved_whole_is_found():
    def make():
        return torch.zeros(()), lambda state, index: (state + 1, None)

    with pytest.raises(BrokenPromiseError, match="equals an uninterrupted one"):
        testing.check_resumes(make, save=lambda state: None, load=lambda saved, template: template)


@pytest.mark.parametrize("transform", [lambda: None, lambda param, plan, other: None])
def test_what_takes_other_arguments_is_refused(transform):
    with pytest.raises(
        TypeError, match=r"`transform` has [03] arguments without a default; take a weight, or a weight and a plan"
    ):
        testing.check_pure(transform)


def test_given_arguments_are_summed_up():
    with pytest.raises(BrokenPromiseError, match=r"smallest example: \(LowRank\(base='\(8, 4\) float64', .*\),\)"):
        testing.check_preserves_weight(
            lambda param: param._replace(base=param.base + 1), arguments=low_rank(Shape(8, 4, 3))
        )


def merged_in_place(params: dict[str, Any]) -> dict[str, Any]:
    for name, param in params.items():
        params[name] = dl.merge(param) if isinstance(param, LowRank) else param + 0
    return params


def projected_in_place(opt_state: Any, plan: Any) -> Any:
    new = dl.project_optimizer_state(opt_state, plan)
    opt_state.inner.mu.update(new.inner.mu)
    return new._replace(inner=new.inner._replace(mu=opt_state.inner.mu))


def test_an_argument_whose_entries_are_replaced_is_found():
    with pytest.raises(BrokenPromiseError, match="has been replaced"):
        testing.check_pure(merged_in_place, arguments=testing.trees(), examples=20)
    with pytest.raises(BrokenPromiseError, match="has been replaced"):
        testing.check_state_projection(projected_in_place, examples=20)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (lambda params: {name: p if isinstance(p, LowRank) else 2 * p for name, p in params.items()}, "off by up to"),
        (lambda params: {name: p for name, p in params.items() if isinstance(p, LowRank)}, "'.*' is missing"),
    ],
    ids=["changed", "dropped"],
)
def test_full_rank_parameters_are_kept_too(transform: Any, said: str):
    with pytest.raises(BrokenPromiseError, match=said):
        testing.check_preserves_weight(transform, arguments=testing.trees(), examples=20)
    testing.check_preserves_weight(dl.merge, arguments=testing.trees(), examples=20)


def test_a_weight_that_loses_its_stack_is_found():
    with pytest.raises(BrokenPromiseError, match=r"shape \(.*\) is not \(1, "):
        testing.check_preserves_weight(
            lambda param: tree_map(lambda leaf: leaf[0], param), arguments=plain(stacks=st.just((1,)))
        )


def test_what_is_no_stack_is_refused():
    with pytest.raises(BrokenPromiseError, match=r"`arguments` has tensors whose first axes have the sizes \[2, 6\]"):
        testing.check_vmap(dl.merge, arguments=low_rank(Shape(6, 4, 2)))

"""Trees by parameter name: the trainable and the frozen part, and the tensors inside a leaf."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, combine, partition
from dynlora_fn._core._tree import by_name, inner_tensors
from dynlora_fn._core._types import Frozen
from dynlora_fn.interop import FrozenTensor
from dynlora_fn.testing import Shape, assert_same, low_rank, low_rank_params, normal, untouched

SHAPE = Shape(4, 6, 2)


def small_params() -> dict[str, LowRank | torch.Tensor]:
    return {"norm.weight": normal(1, 6), "q.weight": low_rank(SHAPE), "head.weight": normal(2, 3, 4)}


@given(st.lists(low_rank_params(), max_size=3), st.integers(0, 3), st.integers(0, 6))
def test_combine_restores_what_partition_took_apart(weights, full, frozen):
    params = {f"full.{at}": normal(at, at + 1) for at in range(full)}
    params |= {f"low.{at}": param for at, param in enumerate(weights)}
    with untouched(params):
        again = combine(*partition(params, frozen=list(params)[:frozen]))
    assert again.keys() == params.keys()
    for name, param in params.items():
        assert type(again[name]) is type(param)
        # The very tensors: nothing is copied.
        assert all(left is right for left, right in zip(tree_leaves(again[name]), tree_leaves(param), strict=True))


@given(
    st.permutations(range(6)),
    st.lists(st.sampled_from(["low-rank", "trained", "frozen", "plan"]), min_size=6, max_size=6),
)
def test_a_state_keeps_the_order_of_its_trees(order, kinds):
    """Kinds and places of parameters are drawn. The step of a compiled loop combines and partitions again."""
    made = {"low-rank": low_rank(SHAPE), "frozen": FrozenTensor(normal(0, 2))}
    params = {f"{at}": made.get(kinds[at], normal(1, 2)) for at in order}
    patterns = [name for name in params if kinds[int(name)] == "plan"]
    first = partition(params, frozen=patterns)
    again = partition(combine(*first), frozen=patterns)
    assert [list(tree) for tree in again] == [list(tree) for tree in first]


def test_bases_and_seeds_are_frozen_and_all_else_is_trained():
    params = small_params()
    trainable, frozen = partition(params)
    assert trainable.keys() == params.keys()
    assert isinstance(trainable["q.weight"], Factors)
    assert frozen.keys() == {"q.weight"}
    assert isinstance(frozen["q.weight"], Frozen)


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["*"], {"norm.weight", "head.weight"}),
        (["norm.weight"], {"norm.weight"}),
        (["h*", "n*"], {"norm.weight", "head.weight"}),
        (["q.*"], set()),  # factors are always trained
    ],
)
def test_globs_name_the_tensors_that_are_not_trained(patterns, wanted):
    params = small_params()
    trainable, frozen = partition(params, frozen=patterns)
    assert frozen.keys() == wanted | {"q.weight"}
    assert trainable.keys() == params.keys() - wanted


def test_a_stacked_name_is_matched_by_itself():
    params = {"layers.*.bias": normal(0, 2, 3), "layers.[0].bias": normal(1, 3)}
    assert partition(params, frozen=["layers.[0].bias"]).frozen.keys() == {"layers.[0].bias"}


def stacked_params() -> dict[str, LowRank | torch.Tensor | FrozenTensor]:
    return {
        "layers.*.bias": normal(0, 3, 4),
        "{1..2}.scale": normal(1, 2, 4),
        "layers.*.q.weight": low_rank(SHAPE, (3,)),
        "table": FrozenTensor(torch.arange(3)),
    }


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        (["layers.*.bias"], {"layers.*.bias"}),
        (["layers.?.bias", "2.*", "1.scale"], {"layers.*.bias", "{1..2}.scale"}),
        (["layers.[0-2].bias"], {"layers.*.bias"}),
        (["layers.[*].bias"], {"layers.*.bias"}),
        (["{1..2}.scale"], {"{1..2}.scale"}),
        (["layers.1.q.weight", "table"], set()),
    ],
)
def test_names_of_the_model_name_stacks(patterns, wanted):
    params = stacked_params()
    trainable, frozen = partition(params, frozen=patterns)
    assert frozen.keys() == wanted | {"layers.*.q.weight", "table"}
    assert trainable.keys() == params.keys() - wanted - {"table"}


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["layers.0.bias"], r"1 of 3 members of the stack 'layers\.\*\.bias', but not 'layers\.1\.bias'"),
        (["layers.[!0].bias"], r"2 of 3 members of the stack 'layers\.\*\.bias', but not 'layers\.0\.bias'"),
        (["*.scale", "layers.*", "layers.[12].*", "2.*"], None),
        (["2.*"], r"1 of 2 members of the stack '\{1\.\.2\}\.scale', but not '1\.scale'.*stack=False"),
        (["layers.3.bias"], r"`frozen` contains 'layers\.3\.bias', which matches no name"),
    ],
)
def test_a_part_of_a_stack_is_refused(patterns, message):
    if message is None:
        assert "{1..2}.scale" in partition(stacked_params(), frozen=patterns).frozen
        return
    with pytest.raises(ValueError, match=message):
        partition(stacked_params(), frozen=patterns)


def test_frozen_tensors_are_never_trained():
    params = {**small_params(), "table": FrozenTensor(torch.arange(4)), "layers.*.scale": FrozenTensor(normal(3, 2, 5))}
    trainable, frozen = partition(params)
    assert trainable.keys() == small_params().keys()
    again = combine(trainable, frozen)
    assert again["table"] is params["table"]
    members = dl.unstack(params)
    assert_same(members["layers.1.scale"], FrozenTensor(params["layers.*.scale"].tensor[1]))
    assert dl.materialize(params)["table"] is params["table"].tensor
    assert dl.materialize(params["table"]) is params["table"].tensor


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"`frozen` contains 'k\.\*', which matches no name; use .* of: .*'norm\.weight', 'q\.weight'"
    ):
        partition(small_params(), frozen=["*", "k.*"])


def test_combine_refuses_parts_that_do_not_belong_together():
    trainable, frozen = partition(small_params())
    with pytest.raises(ValueError, match=r"`frozen` does not fit `trainable` at 'q\.weight': factors need a base"):
        combine(trainable, {})
    with pytest.raises(
        ValueError, match=r"`frozen` does not fit `trainable` at 'norm\.weight': .* a tensor must not have one"
    ):
        combine(trainable, {**frozen, "norm.weight": frozen["q.weight"]})
    with pytest.raises(ValueError, match=r"`trainable` has no factors for the base 'q\.weight'"):
        combine({"norm.weight": trainable["norm.weight"]}, frozen)


def test_combine_refuses_a_tensor_that_is_both_trained_and_not():
    with pytest.raises(ValueError, match="both contain the tensor 'twice'"):
        combine({"twice": torch.zeros(2)}, {"twice": torch.ones(2)})


def test_a_value_for_another_name_is_refused():
    names = ["q", "layers.*.w"]
    assert by_name(0.1, names, "rate") == {"q": 0.1, "layers.*.w": 0.1}
    assert by_name({"layers.*.w": 0.1}, names, "rate") == {"layers.*.w": 0.1}
    for other in ("k", "layers.0.w", "*"):
        with pytest.raises(ValueError, match=rf"`rate` contains {re.escape(repr(other))}, .* 'q', 'layers\.\*\.w'"):
            by_name({"q": 0.1, other: 0.1}, names, "rate")


def test_memory_lies_in_the_tensors_within():
    plain = torch.zeros(3)
    assert inner_tensors(plain)[0] is plain
    params = dl.init(nn.Linear(8, 4, bias=False), rank=2, seed=0, targets=["weight"], base="int8")
    (tensor,) = dl.bases.to_torchao(params).values()
    inner = inner_tensors(tensor)
    assert len(inner) > 1
    assert all(type(leaf) is Tensor for leaf in inner)
    assert {leaf.dtype for leaf in inner} >= {torch.int8}

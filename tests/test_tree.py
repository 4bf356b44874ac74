"""Trees by parameter name: the trainable and the frozen part, and weights that repeat in one stack."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from dynlora_fn import Factors, LowRank, combine, init, materialize, partition, unstack
from dynlora_fn._core._stacking import Stack, find_stacks
from dynlora_fn._core._types import Frozen
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
        (["q.*"], set()),  # factors are trained always
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


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"`frozen` contains 'k\.\*', which matches no name; use .* of: .*norm\.weight, q\.weight"
    ):
        partition(small_params(), frozen=["*", "k.*"])


def test_combine_refuses_parts_that_do_not_belong_together():
    trainable, frozen = partition(small_params())
    with pytest.raises(ValueError, match=r"`frozen` does not fit `trainable` at 'q\.weight': factors need a base"):
        combine(trainable, {})
    with pytest.raises(
        ValueError, match=r"`frozen` does not fit `trainable` at 'norm\.weight': .* a tensor must have none"
    ):
        combine(trainable, {**frozen, "norm.weight": frozen["q.weight"]})
    with pytest.raises(ValueError, match=r"`trainable` has no factors for the base 'q\.weight'"):
        combine({"norm.weight": trainable["norm.weight"]}, frozen)


def test_combine_refuses_a_tensor_that_is_both_trained_and_not():
    with pytest.raises(ValueError, match="both contain the tensor 'twice'"):
        combine({"twice": torch.zeros(2)}, {"twice": torch.ones(2)})


def stack_of(*names: str, keys: str | None = None) -> dict[str, Stack]:
    return find_stacks(dict(zip(names, keys or "x" * len(names), strict=True)))


def test_names_that_differ_in_a_number_become_a_stack():
    assert stack_of("layers.1.w", "head", "layers.0.w") == {
        "layers.*.w": Stack(["layers.0.w", "layers.1.w"], (2,)),
        "head": Stack(["head"], ()),
    }
    assert stack_of(*(f"l.{n}.w" for n in range(12)))["l.*.w"].members[9:] == ["l.9.w", "l.10.w", "l.11.w"]


def test_two_numbers_become_two_axes_in_row_major_order():
    names = [f"layers.{layer}.experts.{expert}.w" for expert in range(3) for layer in range(2)]
    (pattern, stack), *others = stack_of(*names).items()
    assert not others
    assert pattern == "layers.*.experts.*.w"
    assert stack.shape == (2, 3)
    assert stack.members == sorted(names)


def test_a_ragged_grid_is_stacked_layer_by_layer():
    stacks = stack_of("l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1", "l.1.e.2")
    assert {pattern: stack.shape for pattern, stack in stacks.items()} == {"l.0.e.*": (2,), "l.1.e.*": (3,)}


@pytest.mark.parametrize("names", [["l.1.w", "l.2.w"], ["l.0.w", "l.2.w"], ["l.0.w"], ["0", "2"], ["l.00.w", "l.01.w"]])
def test_numbers_with_gaps_or_zeros_in_front_stay_by_themselves(names):
    assert stack_of(*names) == {name: Stack([name], ()) for name in names}


def test_other_shapes_are_not_stacked_with_the_rest():
    # The grid of one shape takes the name with the star, so that no two stacks share a name.
    stacks = stack_of("l.0.w", "l.1.w", "l.2.w", "l.3.w", keys="aabb")
    assert stacks == {
        "l.*.w": Stack(["l.0.w", "l.1.w"], (2,)),
        "l.2.w": Stack(["l.2.w"], ()),
        "l.3.w": Stack(["l.3.w"], ()),
    }


parts = st.sampled_from(["w", "e", "0", "1", "2", "3", "00", "01"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.integers(1, 2), max_size=12), st.booleans())
def test_unstack_gives_exactly_the_names_of_the_model(widths, stack):
    """Whatever the numbering: gaps, ragged grids, leading numbers, zeros in front, shapes that alternate."""
    model = {name: normal(at, 2, width) for at, (name, width) in enumerate(widths.items())}
    params = init(model, rank=1, seed=0, targets=["*"] if model else [], stack=stack, dtype=torch.float64)
    members = unstack(params)
    assert members.keys() == model.keys()
    for name, weight in model.items():
        # Two roundings of sums of magnitudes below 4 in float64: of the base, and of the weight from it.
        torch.testing.assert_close(materialize(members[name]), weight, rtol=0, atol=8 * torch.finfo(weight.dtype).eps)


@given(st.dictionaries(names, st.integers(1, 2), max_size=12))
def test_find_stacks_keeps_every_name_once_and_keys_apart(keys):
    stacks = find_stacks(keys)
    assert sorted(name for stack in stacks.values() for name in stack.members) == sorted(keys)
    for pattern, stack in stacks.items():
        assert prod(stack.shape) == len(stack.members)
        assert len(stack.shape) == pattern.split(".").count("*")
        assert len({keys[name] for name in stack.members}) == 1


def test_unstacked_members_are_views():
    params = {"l.*.w": low_rank(SHAPE, (2,)), "l.*.e.*.b": normal(0, 2, 3, 4), "head": normal(1, 2)}
    members = unstack(params)
    assert list(members) == ["l.0.w", "l.1.w", *(f"l.{n}.e.{e}.b" for n in range(2) for e in range(3)), "head"]
    assert_same(members["l.1.e.2.b"], params["l.*.e.*.b"][1, 2])
    for whole, part in zip(tree_leaves(params["l.*.w"]), tree_leaves(members["l.1.w"]), strict=True):
        assert_same(part, whole[1])
        assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

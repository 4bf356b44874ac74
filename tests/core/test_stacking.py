"""Weights that repeat are found by their names and put into one stack."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from dynlora_fn import init, materialize, unstack
from dynlora_fn._core._stacking import Stack, find_stacks
from dynlora_fn.testing import Shape, assert_same, low_rank, normal

SHAPE = Shape(4, 6, 2)


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


def test_other_numbers_than_from_zero_are_stacked_by_kind():
    keys = dict.fromkeys(["0.b", "1.b", "3.b", "4.b", "5.b", "7.w", "8.w"], "x")
    kinds = dict(zip(keys, "mnmmnmm", strict=True))
    stacks = find_stacks(keys, kinds)
    assert {pattern: len(stack.members) for pattern, stack in stacks.items()} == {
        "0.b": 1,
        "1.b": 1,
        "{3..4}.b": 2,
        "5.b": 1,
        "{7..8}.w": 2,
    }
    grid = dict.fromkeys(["0.b", "1.b"], "x")  # as ever
    assert list(find_stacks(grid, {"0.b": "m", "1.b": "n"})) == ["*.b"]


def test_a_ragged_grid_is_stacked_layer_by_layer():
    stacks = stack_of("l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1", "l.1.e.2")
    assert {pattern: stack.shape for pattern, stack in stacks.items()} == {"l.0.e.*": (2,), "l.1.e.*": (3,)}


@pytest.mark.parametrize("names", [["l.0.w", "l.2.w"], ["l.0.w"], ["l.7.w"], ["0", "2"], ["l.00.w", "l.01.w"]])
def test_numbers_with_gaps_or_zeros_in_front_stay_by_themselves(names):
    assert stack_of(*names) == {name: Stack([name], ()) for name in names}


@pytest.mark.parametrize(
    ("names", "stacks"),
    [
        (["l.1.w", "l.2.w"], {"l.{1..2}.w": (2,)}),
        (["3", "4", "5"], {"{3..5}": (3,)}),
        (["0", "1", "2"], {"*": (3,)}),
        (["0.w", "1.w"], {"*.w": (2,)}),
        ([f"{layer}.e.{expert}" for layer in (2, 3) for expert in range(3)], {"{2..3}.e.*": (2, 3)}),
        ([f"l.{layer}.e.{expert}" for layer in range(2) for expert in (1, 2)], {"l.*.e.{1..2}": (2, 2)}),
        # A number that does not vary is no axis, and one with gaps gives a stack for each run.
        (["l.0.net.3.w", "l.1.net.3.w"], {"l.*.net.3.w": (2,)}),
        (
            [f"l.{layer}.net.{at}" for layer in (1, 2) for at in (0, 2)],
            {"l.{1..2}.net.0": (2,), "l.{1..2}.net.2": (2,)},
        ),
        (["l.0", "l.1", "l.3", "l.4", "l.5", "l.9"], {"l.*": (2,), "l.{3..5}": (3,), "l.9": ()}),
        ([f"l.{layer}.e.{expert}" for layer in (0, 2) for expert in range(2)], {"l.0.e.*": (2,), "l.2.e.*": (2,)}),
    ],
)
def test_numbers_may_start_anywhere(names, stacks):
    got = stack_of(*names)
    assert {pattern: stack.shape for pattern, stack in got.items()} == stacks
    members = unstack({pattern: torch.zeros(*stack.shape, 1) for pattern, stack in got.items()})
    assert list(members) == [name for stack in got.values() for name in stack.members]
    assert sorted(members) == sorted(names)


def test_other_shapes_are_not_stacked_with_the_rest():
    # The grid of one shape takes the name with the star, so that no two stacks share a name.
    stacks = stack_of("l.0.w", "l.1.w", "l.2.w", "l.3.w", keys="aabb")
    assert stacks == {
        "l.*.w": Stack(["l.0.w", "l.1.w"], (2,)),
        "l.{2..3}.w": Stack(["l.2.w", "l.3.w"], (2,)),
    }


parts = st.sampled_from(["w", "e", "0", "1", "2", "3", "00", "01"])
names = st.lists(parts, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(names, st.integers(1, 2), max_size=12), st.booleans())
def test_unstack_gives_exactly_the_names_of_the_model(widths, stack):
    """Names may have gaps, ragged grids, leading numbers, zeros in front and alternating shapes."""
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
        assert len(stack.shape) == pattern.count("*") + pattern.count("{")
        assert list(unstack({pattern: torch.zeros(*stack.shape, 1)})) == stack.members
        assert len({keys[name] for name in stack.members}) == 1


def test_unstacked_members_are_views():
    params = {"l.*.w": low_rank(SHAPE, (2,)), "l.*.e.*.b": normal(0, 2, 3, 4), "head": normal(1, 2)}
    members = unstack(params)
    assert list(members) == ["l.0.w", "l.1.w", *(f"l.{n}.e.{e}.b" for n in range(2) for e in range(3)), "head"]
    assert_same(members["l.1.e.2.b"], params["l.*.e.*.b"][1, 2])
    for stacked, part in zip(tree_leaves(params["l.*.w"]), tree_leaves(members["l.1.w"]), strict=True):
        assert_same(part, stacked[1])
        assert part.untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "name", ["w*", "{a}.w", "a{1..2}.w", "{1..2}b", "{1..}", "{..2}", "{1..2", "{01..2}.w", "a.{.b"]
)
def test_other_braces_and_stars_are_no_axes(name):
    assert list(unstack({name: torch.zeros(2, 3)})) == [name]


def test_an_axis_after_other_braces_is_found():
    assert list(unstack({"{a}.{1..2}.*.w": torch.zeros(2, 1, 3)})) == ["{a}.1.0.w", "{a}.2.0.w"]


def test_a_name_with_a_range_is_refused():
    with pytest.raises(ValueError, match=r"parameter '\{1\.\.2\}\.w' contains a range"):
        find_stacks({"{1..2}.w": "8x8"})


def test_a_name_with_a_star_is_refused():
    with pytest.raises(ValueError, match=r"parameter 'layers\.\*\.w' contains a star"):
        find_stacks({"layers.*.w": "8x8", "head": "8x8"})


@pytest.mark.parametrize("names", [["w.*", "w.0"], ["w.1", "w.*"], ["w.*", "w.{1..2}"]])
def test_a_weight_by_its_name_and_in_a_stack_is_refused(names):
    params = {name: torch.zeros((2, 3) if name[2:] in ("*", "{1..2}") else 3) for name in names}
    with pytest.raises(ValueError, match=r"`params` has 'w\.[01]' by its name and in a stack"):
        unstack(params)

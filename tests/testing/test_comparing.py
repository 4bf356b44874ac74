"""What is compared: bits, kinds, structures, bounds, and what was written into."""

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn import testing
from dynlora_fn.testing import Shape, low_rank


def test_bits_kinds_and_structures_are_compared():
    tree = {"w": torch.tensor([0.0, 1.0])}
    testing.assert_same(tree, {"w": torch.tensor([0.0, 1.0])})
    for other in (
        {"w": torch.tensor([-0.0, 1.0])},
        {"w": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"w": torch.tensor([[0.0, 1.0]])},
        {"v": torch.tensor([0.0, 1.0])},
        {"w": 1},
    ):
        with pytest.raises(AssertionError):
            testing.assert_same(other, tree)
    testing.assert_same(torch.zeros(8, 3).T[:, :1], torch.zeros(3, 1))


def test_leaves_that_are_no_tensors_are_compared_as_values():
    testing.assert_same({"step": 3, "name": "w"}, {"step": 3, "name": "w"})
    with pytest.raises(AssertionError, match=r"\['step'\]: 3 is not 4"):
        testing.assert_same({"step": 3}, {"step": 4})


def test_a_bound_is_a_bound():
    testing.assert_within(torch.tensor([1.0]), torch.tensor([1.5]), 0.5)
    for got, bound in (([1.0], 0.49), ([float("nan")], 1.0), ([1.0, 2.0], 1.0)):
        with pytest.raises(AssertionError):
            testing.assert_within(torch.tensor(got), torch.tensor([1.5]), bound)


def test_what_is_written_into_is_named():
    tree = {"w": torch.zeros(2)}
    with pytest.raises(AssertionError, match=r"\['w'\] has been written into"), testing.untouched(tree):
        tree["w"].add_(0)


def test_the_bound_on_roundings_is_not_wide():
    """An error slightly beyond the roundings is found, on plain bases and in codes with a residual."""
    for storage, share in ((testing.Storage("float32"), 1e-5), (testing.Storage("int8", "bfloat16"), 1e-4)):
        param = low_rank(Shape(8, 8, 2), storage=storage, factor_dtype=torch.float32)
        merged = dl.merge(param)
        size = testing.exact_weight(param).abs().max()
        assert testing.rounding(param, merged).max() < share * size


def test_shapes_are_not_broadcast():
    for got in (torch.zeros(()), torch.zeros(1, 4), torch.zeros(4)):
        with pytest.raises(AssertionError, match=r"shape \(.*\) is not \(3, 4\)"):
            testing.assert_within(got, torch.zeros(3, 4), 1.0)


def test_infinities_and_imaginary_parts_are_compared():
    testing.assert_within(torch.tensor([torch.inf]), torch.tensor([torch.inf]), 0.0)
    for got, wanted in ((1 + 1j, 1 + 3j), (torch.inf, -torch.inf)):
        with pytest.raises(AssertionError):
            testing.assert_within(torch.tensor([got]), torch.tensor([wanted]), 0.1)
    with pytest.raises(AssertionError, match="off by up to inf"):
        testing.assert_within(torch.tensor([torch.inf]), torch.tensor([1.0]), torch.inf)


def test_what_is_no_number_equals_itself_only():
    testing.assert_same({"loss": float("nan")}, {"loss": float("nan")})
    for got, wanted in ((float("nan"), 1.0), (torch.tensor(1), 1)):
        with pytest.raises(AssertionError):
            testing.assert_same(got, wanted)


def test_what_is_replaced_added_or_removed_is_named():
    tree = {"w": torch.zeros(2), "step": 1}
    changes = {
        "replaced": lambda: tree.update(w=torch.zeros(2)),
        "removed": lambda: tree.pop("step"),
        "added": lambda: tree.update(v=torch.zeros(2)),
    }
    for what, change in changes.items():
        with pytest.raises(AssertionError, match=f"has been {what}"), testing.untouched(tree):
            change()


def test_another_order_of_a_dict_is_named():
    tree = {"w": torch.zeros(2), "step": 1}
    with pytest.raises(AssertionError, match=r"\['w'\] has been moved"), testing.untouched(tree):
        tree["w"] = tree.pop("w")


def test_gradients_of_arguments_are_named():
    leaf = torch.ones(2, requires_grad=True)
    for _ in range(2):  # the first gradient is a new tensor, and the second is added to it
        message = r"the `.grad` of \[0\]\['w'\] has changed"
        with pytest.raises(AssertionError, match=message), testing.untouched({"w": leaf}):
            leaf.square().sum().backward()
    with testing.untouched({"w": leaf, "square": leaf.square()}):
        torch.autograd.grad(leaf.square().sum(), leaf)


def test_tensors_of_inference_mode_can_be_checked():
    with torch.inference_mode():
        testing.check_pure(dl.merge, arguments=low_rank(Shape(4, 4, 2)))


def test_weights_are_weights():
    for function in (testing.exact_weight, testing.seen_weight):
        with pytest.raises(TypeError, match=r"`param` is a tensor .*; pass one LowRank"):
            function(torch.ones(2, 2))
    with pytest.raises(ValueError, match="`count` is 5, but rank 2 has only 2 slots"):
        testing.side_plan(2, 5)

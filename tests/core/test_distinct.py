"""A check reads one weight of each kind, and finds a wrong weight wherever it is."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from dynlora_fn import Factors, LowRank
from dynlora_fn._core._check_trees import check_mirrors, check_params
from dynlora_fn._core._distinct import distinct_names
from dynlora_fn._core._torch import FakeTensorMode
from dynlora_fn._core._types import Alpha, FixedSide, FrozenTensor, OneSidedFactors, ScaledFactors
from dynlora_fn.bases import quantize
from dynlora_fn.testing import Shape, low_rank, normal

B, A = normal(0, 6, 2), normal(1, 2, 4)
PARAM = low_rank(Shape(6, 4, 2), ())


class Subclass(Tensor):
    pass


class SubclassOfFactors(Factors):
    pass


# Pairs of leaves that some check distinguishes.
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "shapes": (B, normal(0, 5, 2)),
    "dtypes": (B, B.half()),
    "devices": (B, B.to("meta")),
    "a subclass": (B, B.as_subclass(Subclass)),
    "no tensor": (B, None),
    "tensor and factors": (B, Factors(B, A)),
    "shapes of a": (Factors(B, A), Factors(B, normal(1, 2, 5))),
    "dtypes of a": (Factors(B, A), Factors(B, A.half())),
    "devices of b": (Factors(B, A), Factors(B.to("meta"), A)),
    "no tensor as a": (Factors(B, A), Factors(B, None)),
    "a subclass as a": (Factors(B, A), Factors(B, A.as_subclass(Subclass))),
    "types of factors": (Factors(B, A), ScaledFactors(B, A, Alpha(1.0))),
    "a subclass of factors": (Factors(B, A), SubclassOfFactors(B, A)),
    "alphas": (ScaledFactors(B, A, Alpha(2.0)), ScaledFactors(B, A, Alpha(3.0))),
    "no alpha": (ScaledFactors(B, A, Alpha(2.0)), ScaledFactors(B, A, [2.0])),
    "fixed sides": (OneSidedFactors(B, (), FixedSide(4)), OneSidedFactors(B, (), FixedSide(5))),
    "bases": (PARAM, PARAM._replace(base=PARAM.base.half())),
    "a quantized base": (PARAM, quantize(PARAM, "int8")),
    "seeds": (PARAM, PARAM._replace(seed=PARAM.seed.int())),
    "factors of weights": (PARAM, PARAM._replace(factors=ScaledFactors(*PARAM.factors, Alpha(2.0)))),
    "a frozen tensor": (B, FrozenTensor(B)),
    "frozen tensors": (FrozenTensor(B), FrozenTensor(B.long())),
}


def repeated(leaf: Any, odd: Any, position: int) -> dict[str, Any]:
    return {f"{index}": odd if index == position else leaf for index in range(5)}


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_a_different_leaf_is_read_at_every_position_and_in_every_tree(pair, position):
    for leaf, odd in (pair, pair[::-1]):
        tree, uniform = repeated(leaf, odd, position), repeated(leaf, leaf, 0)
        for trees in ((tree,), (tree, uniform), (uniform, tree), (tree, tree)):
            names = list(distinct_names(*trees))
            assert str(position) in names
            assert names == sorted(names)


@pytest.mark.parametrize("leaf", [B, Factors(B, A), ScaledFactors(B, A, Alpha(2.0)), PARAM, FrozenTensor(B)])
def test_of_equal_leaves_only_the_first_is_read(leaf):
    copies = {name: tree_map(torch.clone, leaf) for name in "xyz"}
    assert list(distinct_names(copies)) == list(distinct_names(copies, dict(reversed(copies.items())))) == ["x"]
    both = copies | {"bias": normal(2, 3), "norm": normal(3, 3), "last": normal(4, 3)}
    assert list(distinct_names(both)) == ["x", "bias"]


@pytest.mark.parametrize("leaf", [B.as_subclass(Subclass), OneSidedFactors(B, (), FixedSide(4)), None, 3, [B]])
def test_leaves_of_other_types_are_all_read(leaf):
    assert list(distinct_names({"x": leaf, "y": leaf, "z": leaf})) == ["x", "y", "z"]


def test_trees_are_matched_by_name_and_not_by_order():
    like, tree = {"x": B, "y": B, "z": A}, {"z": A, "y": normal(2, 3, 2), "x": B}
    assert list(distinct_names(like, tree)) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="'y' of shape"):
        check_mirrors("grads", tree, "trainable", like)


def test_leaves_of_symbolic_sizes_are_all_read():
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = mode.from_tensor(B)
        assert list(distinct_names({"x": fake, "y": fake})) == ["x", "y"]
        wrapped: list[list[str]] = []
        vmap(lambda row: wrapped.append(list(distinct_names({"x": row, "y": row}))) or row)(fake)
    assert wrapped == [["x", "y"]]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_all_read():
    nested = torch.nested.nested_tensor([B, A])
    assert list(distinct_names({"x": nested, "y": nested, "z": B})) == ["x", "y", "z"]
    check_params("params", {"x": nested, "y": nested})


@pytest.mark.parametrize("other", [normal(0, 5, 2), B.long()], ids=["shape", "dtype"])
def test_a_leaf_that_is_changed_in_place_is_read_again(other):
    like = {name: Factors(B, A) for name in "xyz"}
    grads = {name: Factors(B.clone(), A.clone()) for name in "xyz"}
    check_mirrors("grads", grads, "trainable", like)
    grads["y"].b.data = other
    with pytest.raises((ValueError, TypeError), match="'y'"):
        check_mirrors("grads", grads, "trainable", like)


def test_inside_transforms_the_inner_shapes_are_read():
    def checked(b: Tensor, wrong: Tensor) -> Tensor:
        like = {"x": b, "y": b}
        check_mirrors("grads", {"x": b, "y": b.sin()}, "trainable", like)
        with pytest.raises(ValueError, match="'y' of shape"):
            check_mirrors("grads", {"x": b, "y": wrong}, "trainable", like)
        return b.sum()

    stacked = normal(2, 3, 6, 2)
    vmap(checked)(stacked, normal(3, 3, 6, 3))
    grad(checked)(B, normal(3, 6, 3))
    vmap(grad(checked), in_dims=(0, None))(stacked, stacked[0, :, :1])


def test_the_first_wrong_weight_is_named():
    wrong = PARAM._replace(seed=PARAM.seed.int())
    for names in (["0", "3"], ["3", "0"]):
        params: dict[str, LowRank] = dict.fromkeys([names[0], "1", names[1], "2"], PARAM)
        with pytest.raises(TypeError, match=f"as seed of '{names[0]}'"):
            check_params("params", params | dict.fromkeys(names, wrong))

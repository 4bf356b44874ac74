"""Weights and trees that mirror the trainable parameters: what is refused, by name, and what is taken."""

from functools import partial
from typing import Any

import pytest
import torch

from dynlora_fn import Factors, LowRank, partition
from dynlora_fn._core._check_trees import (
    check_factors,
    check_mirrors,
    check_mirrors_one,
    check_one_or_more,
    check_param,
    check_params,
    check_trainable,
)
from dynlora_fn.bases import quantize
from dynlora_fn.interop import FrozenTensor
from dynlora_fn.parallel import ShardedFactors, Sharding
from dynlora_fn.testing import Shape, low_rank

PARAM = low_rank(Shape(6, 4, 2), (3,))
B, A = PARAM.factors
META = torch.device("meta")


def with_factors(b: Any = B, a: Any = A) -> LowRank:
    return PARAM._replace(factors=Factors(b, a))


WRONG_WEIGHTS: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "`params` has None for 'w'; use a LowRank or a tensor"),
    "a frozen number": (FrozenTensor(3), TypeError, "use a LowRank or a tensor"),
    "factors in a tuple": (PARAM._replace(factors=(B, A)), TypeError, "in place of the factors of 'w'; use Factors"),
    "b of a list": (with_factors(b=[1.0]), TypeError, r"`params` has \[1.0\] as `b` of 'w'; use a tensor"),
    "a of integers": (with_factors(a=A.long()), TypeError, "dtype torch.int64 for `a` of 'w'; use a real floating"),
    "b of complex numbers": (with_factors(b=B.to(torch.complex64)), TypeError, "torch.complex64 for `b` of 'w'"),
    "other ranks": (with_factors(a=A[..., :1, :]), ValueError, r"of shapes \(3, 6, 2\) and \(3, 1, 4\); use"),
    "other ranks, b of 2 rows": (
        with_factors(B[:, :2, :1], A)._replace(base=PARAM.base[:, :2]),
        ValueError,
        r"of shapes \(3, 2, 1\) and \(3, 2, 4\)",
    ),
    "other stacks": (with_factors(a=A[:1]), ValueError, r"factors of 'w' of shapes \(3, 6, 2\) and \(1, 2, 4\)"),
    "a vector": (with_factors(B[0, :, 0], A[0, 0]), ValueError, r"of shapes \(6,\) and \(4,\); use"),
    "rank 0": (with_factors(B[..., :0], A[..., :0, :]), ValueError, r"of shapes \(3, 6, 0\) and \(3, 0, 4\)"),
    "no rows": (with_factors(b=B[:, :0]), ValueError, r"of shapes \(3, 0, 2\)"),
    "no columns": (with_factors(a=A[..., :0]), ValueError, r"and \(3, 2, 0\)"),
    "a elsewhere": (with_factors(a=A.to(META)), ValueError, "`a` of 'w' on meta, but the weight is on cpu; move"),
    "a seed of a number": (PARAM._replace(seed=3), TypeError, "`params` has 3 as seed of 'w'; use an int64 tensor"),
    "an int32 seed": (PARAM._replace(seed=PARAM.seed.int()), TypeError, "as seed of 'w'; use an int64 tensor"),
    "one seed": (PARAM._replace(seed=PARAM.seed[0]), ValueError, r"of shape \(\) for 'w' .*; use one of shape \(3,\)"),
    "a seed elsewhere": (PARAM._replace(seed=PARAM.seed.to(META)), ValueError, "the seed of 'w' on meta"),
    "no base": (PARAM._replace(base=None), TypeError, "`params` has None as base of 'w'; use a tensor or a base"),
    "a base of integers": (PARAM._replace(base=PARAM.base.long()), TypeError, "torch.int64 for the base of 'w'"),
    "a wider base": (PARAM._replace(base=PARAM.base[..., :3]), ValueError, r"a base of shape \(3, 6, 3\) for 'w'"),
    "a base elsewhere": (PARAM._replace(base=PARAM.base.to(META)), ValueError, "the base of 'w' on meta"),
}


@pytest.mark.parametrize(("param", "error", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_a_weight_whose_tensors_do_not_fit_is_refused(param, error, message):
    for check in (
        lambda: check_param("params", "w", param),
        lambda: check_params("params", {"other": PARAM, "w": param}),
        lambda: check_one_or_more("params", {"w": param}),
    ):
        with pytest.raises(error, match=message):
            check()


def test_weights_of_every_kind_are_taken():
    single = low_rank(Shape(6, 4, 2), base_dtype=torch.float32)
    params = {
        "stack": PARAM,
        "single": single,
        "codes": quantize(single, "int8"),
        "tensor": torch.ones(3),
        "integers": torch.ones(3, dtype=torch.int64),
        "frozen": FrozenTensor(torch.ones(2)),
    }
    check_params("params", params)
    check_one_or_more("params", PARAM)
    check_one_or_more("params", params["tensor"], or_tensor=True)
    check_one_or_more("params", params["frozen"], or_tensor=True)


@pytest.mark.parametrize("value", [None, 3, [PARAM], torch.ones(2), FrozenTensor(torch.ones(2))])
def test_neither_a_weight_nor_a_dict_of_them_is_refused(value):
    with pytest.raises(TypeError, match=r"`params` is .*; pass a LowRank or a dict of parameters by name"):
        check_one_or_more("params", value)


def test_a_shard_may_have_no_rows():
    sharding = Sharding("group", 8, 7, 3, 4)
    check_factors("params", "w", ShardedFactors(torch.ones(0, 2), torch.ones(2, 0), sharding))
    with pytest.raises(ValueError, match=r"of shapes \(0, 0\) and \(0, 1\)"):
        check_factors("params", "w", ShardedFactors(torch.ones(0, 0), torch.ones(0, 1), sharding))


TRAINABLE = partition({"w": PARAM, "bias": torch.ones(5), "z": torch.ones(2, dtype=torch.complex64)}).trainable
WRONG_LEAVES: dict[str, tuple[str, Any, str]] = {
    "a number": ("bias", 3.0, r"`trainable` has 3.0 for 'bias'; use factors or a tensor"),
    "a weight": ("w", PARAM, "`trainable` has LowRank.* for 'w'; use factors or a tensor"),
    "flags": ("bias", torch.ones(5, dtype=torch.bool), "dtype torch.bool for 'bias'; use a floating dtype"),
    "factors of integers": ("w", Factors(B.long(), A), "dtype torch.int64 for `b` of 'w'"),
}


@pytest.mark.parametrize(("name", "leaf", "message"), WRONG_LEAVES.values(), ids=WRONG_LEAVES)
def test_what_cannot_be_trained_is_refused(name, leaf, message):
    check_trainable("trainable", TRAINABLE)
    with pytest.raises(TypeError, match=message):
        check_trainable("trainable", {**TRAINABLE, name: leaf})


WRONG_MIRRORS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "a tensor for factors": ("w", B, ValueError, "`grads` has a Tensor for 'w', which is a Factors in `trainable`"),
    "None for factors": ("w", None, ValueError, "`grads` has None for 'w', which is a Factors in `trainable`"),
    "factors for a tensor": ("bias", Factors(B, A), ValueError, "a Factors for 'bias', which is a Tensor in"),
    "shards": ("w", ShardedFactors(B, A, Sharding("g", 1, 0, 6, 4)), ValueError, "has a ShardedFactors for 'w'"),
    "a list": ("w", Factors([1.0], A), TypeError, r"`grads` has \[1.0\] in 'w'; use a tensor"),
    "one column": (
        "w",
        Factors(B[..., :1], A),
        ValueError,
        r"'w' of shape \(3, 6, 1\), \(3, 2, 4\) for .*6, 2\)",
    ),
    "one row of a": ("w", Factors(B, A[..., :1, :]), ValueError, r"'w' of shape \(3, 6, 2\), \(3, 1, 4\) for"),
    "a scalar": ("bias", torch.ones(()), ValueError, r"'bias' of shape \(\) for a parameter of shape \(5,\)"),
    "integers": ("bias", torch.ones(5).long(), TypeError, "`grads` has dtype torch.int64 for 'bias'"),
    "integers in a": ("w", Factors(B, A.long()), TypeError, "`grads` has dtype torch.int64 for 'w'"),
    "complex": ("bias", torch.ones(5) * 1j, TypeError, "dtype torch.complex64 for 'bias' of dtype torch.float32"),
    "real": ("z", torch.ones(2), TypeError, "dtype torch.float32 for 'z' of dtype torch.complex64"),
    "elsewhere": ("w", Factors(B, A.to(META)), ValueError, "`grads` has 'w' on meta, but the weight is on cpu"),
}


@pytest.mark.parametrize(("name", "leaf", "error", "message"), WRONG_MIRRORS.values(), ids=WRONG_MIRRORS)
def test_a_leaf_of_another_parameter_is_refused(name, leaf, error, message):
    check_mirrors("grads", TRAINABLE, "trainable", TRAINABLE)
    for check in (
        lambda: check_mirrors("grads", {**TRAINABLE, name: leaf}, "trainable", TRAINABLE),
        lambda: check_mirrors_one("grads", name, leaf, "trainable", TRAINABLE[name]),
    ):
        with pytest.raises(error, match=message):
            check()


@pytest.mark.parametrize("case", ["a tensor for factors", "factors for a tensor", "shards", "one row of a", "a scalar"])
def test_types_and_shapes_are_checked_in_a_compiled_function(case):
    name, leaf, error, message = WRONG_MIRRORS[case]

    @partial(torch.compile, backend="eager")
    def check(leaf, like):
        check_mirrors_one("grads", name, leaf, "trainable", like)

    with pytest.raises(error, match=message):
        check(leaf, TRAINABLE[name])


@pytest.mark.parametrize("names", [{"w"}, {"w", "bias", "z", "more"}])
def test_names_that_only_one_tree_has_are_said(names):
    tree = {name: TRAINABLE.get(name, torch.ones(1)) for name in names}
    differing = sorted(names ^ TRAINABLE.keys())
    with pytest.raises(ValueError, match=f"names of `trainable`, but only one of them has \\[{differing[0]!r}"):
        check_mirrors("grads", tree, "trainable", TRAINABLE)


def test_other_dtypes_of_floating_numbers_are_taken():
    check_mirrors("grads", {**TRAINABLE, "bias": torch.ones(5, dtype=torch.bfloat16)}, "trainable", TRAINABLE)

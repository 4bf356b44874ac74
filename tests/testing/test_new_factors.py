"""Transforms that compute new factors: right ones pass in every precision, and small mistakes are found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule, run_state_machine_as_test
from torch import Tensor

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, testing
from dynlora_fn.testing import BrokenPromiseError, TransformMachine, eps, low_rank_params

Pair = tuple[Tensor, Tensor]


def wide(transform: Callable[[Tensor, Tensor], Pair]) -> Callable[[LowRank], LowRank]:
    """Return a transform of a weight that computes its factors in float32 at least, and rounds them to their dtype."""

    def transformed(param: LowRank) -> LowRank:
        b, a = param.factors
        dtype = torch.promote_types(b.dtype, torch.float32)
        new_b, new_a = transform(b.to(dtype), a.to(dtype))
        return param._replace(factors=Factors(new_b.to(b.dtype), new_a.to(a.dtype)))

    return transformed


def qr(b: Tensor, a: Tensor) -> Pair:
    q, r = torch.linalg.qr(b)
    return q, r @ a


def lq(b: Tensor, a: Tensor) -> Pair:
    q, r = torch.linalg.qr(a.mT)
    return b @ r.mT, q.mT


def balanced(b: Tensor, a: Tensor) -> Pair:
    scale = (a.norm(dim=-1) / b.norm(dim=-2)).sqrt()
    return b * scale[..., None, :], a / scale[..., None]


def by_svd(b: Tensor, a: Tensor) -> Pair:
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    rank = b.shape[-1]
    root = s[..., :rank].sqrt()
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


def rotated(b: Tensor, a: Tensor) -> Pair:
    rotation, _ = torch.linalg.qr(testing.normal(0, b.shape[-1], b.shape[-1], dtype=b.dtype))
    return b @ rotation, rotation.mT @ a


def scaled(b: Tensor, a: Tensor) -> Pair:
    return b * 3, a / 3


RIGHT = {"qr": qr, "lq": lq, "balanced": balanced, "svd": by_svd, "rotated": rotated, "scaled": scaled}


@pytest.mark.parametrize("transform", RIGHT.values(), ids=RIGHT)
def test_new_factors_may_be_rounded(transform):
    testing.check_preserves_weight(wide(transform))


@pytest.mark.parametrize("transform", RIGHT.values(), ids=RIGHT)
def test_new_factors_may_be_rounded_after_a_merge(transform):
    """Some of the weight has moved to the base before, so that both change."""

    def halved(param: LowRank) -> LowRank:
        half = Factors(param.factors.b / 2, param.factors.a)
        return wide(transform)(dl.switching.fold(param._replace(factors=half), *half))

    plain = low_rank_params(storages=testing.PLAIN, deferred=False)
    testing.check_preserves_weight(halved, arguments=plain)


def off_by(share: float) -> Callable[[Tensor, Tensor], Pair]:
    """Return QR with a mistake: the first vector of side a is too large by this share."""

    def mistaken(b: Tensor, a: Tensor) -> Pair:
        q, a = qr(b, a)
        return q, torch.cat([a[..., :1, :] * (1 + share), a[..., 1:, :]], dim=-2)

    return mistaken


@pytest.mark.parametrize(
    ("dtype", "multiple"), [(torch.bfloat16, 8), (torch.float32, 128), (torch.float64, 512)], ids=str
)
def test_a_mistake_a_few_times_the_rounding_is_found(dtype, multiple):
    arguments = low_rank_params(factor_dtypes=st.just(dtype), storages=testing.PLAIN[:1], deferred=False)
    with pytest.raises(BrokenPromiseError, match="times the bound"):
        testing.check_preserves_weight(wide(off_by(multiple * eps(dtype))), arguments=arguments, examples=50)


def test_factors_that_are_exact_are_held_to_it():
    """What is due to the dtype of the factors is found where only folds may round."""
    arguments = low_rank_params(factor_dtypes=st.just(torch.bfloat16), deferred=False)
    testing.check_preserves_weight(wide(qr), arguments=arguments)
    with pytest.raises(BrokenPromiseError, match="times the bound"):
        testing.check_preserves_weight(wide(qr), arguments=arguments, exact_factors=True)
    testing.check_preserves_weight(dl.switch, exact_factors=True)
    testing.check_preserves_weight(dl.merge, exact_factors=True)


def test_the_largest_breach_is_shown_beside_the_smallest_example():
    def wrong_in_large_ones(param: LowRank) -> LowRank:
        size = param.shape[-1]
        return param._replace(base=param.base + (1e3 if size > 3 else 1e-9))

    arguments = low_rank_params(storages=testing.PLAIN[:1], factor_dtypes=st.just(torch.float64), deferred=False)
    with pytest.raises(BrokenPromiseError) as caught:
        testing.check_preserves_weight(wrong_in_large_ones, arguments=arguments, examples=100)
    message = str(caught.value)
    assert "happened: off by up to 1.00e-09" in message
    assert "largest breach: off by up to 1.00e+03" in message
    assert "with (LowRank(base=" in message


def test_one_failure_does_not_hide_another():
    def wrong_in_two_ways(param: LowRank) -> LowRank:
        if param.shape[-1] > 2:
            raise ZeroDivisionError("in a branch for large ones")
        return param._replace(base=param.base + 1)

    arguments = low_rank_params(storages=testing.PLAIN[:1], factor_dtypes=st.just(torch.float64), deferred=False)
    with pytest.raises(BrokenPromiseError) as caught:
        testing.check_preserves_weight(wrong_in_two_ways, arguments=arguments, examples=100)
    message = str(caught.value)
    assert message.count("promised: ") == 1
    assert message.count("smallest example: ") == 2
    assert "happened: off by up to 1.00e+00" in message
    assert "happened: ZeroDivisionError: in a branch for large ones" in message


def test_the_machine_takes_new_factors():
    class WithQR(TransformMachine):
        @rule()
        def orthogonalize(self) -> None:
            params: dict[str, Any] = {
                name: wide(qr)(param) if isinstance(param, LowRank) else param for name, param in self.params.items()
            }
            self.keeps(params)

    run_state_machine_as_test(WithQR, settings=settings(max_examples=10, stateful_step_count=10, deadline=None))


def test_differences_are_told_in_place_of_tensors():
    got, wanted = torch.zeros(30, 40), torch.zeros(30, 40)
    got[2, 3], got[4, 5] = 0.5, -2
    with pytest.raises(AssertionError) as caught:
        testing.assert_same({"w": got}, {"w": wanted})
    assert str(caught.value) == "['w']: 2 of 1200 entries differ, by up to 2: -2.0 instead of 0.0 at (4, 5)"
    for left, right, told in (
        (torch.tensor([0.0, float("nan")]), torch.zeros(2), r"1 of 2 .* by up to inf: nan instead of 0.0 at \(1,\)"),
        (torch.tensor(-0.0), torch.tensor(0.0), r"1 of 1 .* by up to 0: -0.0 instead of 0.0 at \(\)"),
        (torch.tensor([2**62 + 1]), torch.tensor([2**62]), "4611686018427387905 instead of 4611686018427387904"),
        (torch.tensor([True]), torch.tensor([False]), "by up to 1: True instead of False"),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), "by up to 2: "),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn), "2 of 2 entries differ"),
    ):
        with pytest.raises(AssertionError, match=told):
            testing.assert_same(left, right)

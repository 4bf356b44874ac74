"""Derivatives through a change of codes are refused, and pass where no code changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, materialize, merge, switch
from dynlora_fn.bases import defer, fold_pending, quantize
from dynlora_fn.interop import resize
from dynlora_fn.optim import average, compensate
from dynlora_fn.switching import fold
from dynlora_fn.testing import Shape, assert_same, low_rank, normal, plan_of

CODED = Shape(8, 32, 4)
CODED_PLAN = {"w": plan_of(4, b=1, a=1)}
FOLDS: dict[str, Callable[[dict[str, LowRank]], Any]] = {
    "switch": lambda params: switch(params, CODED_PLAN).params,
    "merge": merge,
    "fold": lambda params: {"w": fold(params["w"], *params["w"].factors)},
    "decay": lambda params: dl.decay(params, params["w"].factors.b[0, 0].abs().clamp(max=0.5)),
    "average": lambda params: average(params, {"w": low_rank(CODED, factor_dtype=torch.float32)}, decay=0.5),
    "resize": lambda params: resize(params, rank=2).params,
    "compensate": lambda params: compensate(params, {"w": normal(1, 8, 32)}, lr=0.1),
    "the second deferred switch": lambda params: (
        switch(switch(defer(params, vectors=2), CODED_PLAN).params, CODED_PLAN).params
    ),
    "fold_pending": lambda params: fold_pending(switch(defer(params, vectors=2), CODED_PLAN).params),
    "to_torchao": lambda params: {"w": dl.bases.to_torchao(params["w"]).dequantize()},
}


def coded(kind: str, residual: str | None) -> dict[str, LowRank]:
    return quantize(
        {"w": low_rank(CODED, base_dtype=torch.float32, factor_dtype=torch.float32)}, kind, residual=residual
    )


def in_reverse(function: Callable[[Factors], Any], factors: Factors) -> None:
    grad(lambda factors: sum(leaf.float().sum() for leaf in function(factors)["w"].factors))(factors)


def in_forward(function: Callable[[Factors], Any], factors: Factors) -> None:
    jvp(lambda factors: function(factors)["w"].factors.b, (factors,), (factors,))


def by_autograd(function: Callable[[Factors], Any], factors: Factors) -> None:
    function(Factors(*(leaf.clone().requires_grad_() for leaf in factors)))


def by_duals(function: Callable[[Factors], Any], factors: Factors) -> None:
    with forward_ad.dual_level():
        function(Factors(*(forward_ad.make_dual(leaf, leaf) for leaf in factors)))


def below_vmap(function: Callable[[Factors], Any], factors: Factors) -> None:
    stack = Factors(*(torch.stack([leaf, leaf]) for leaf in factors))
    grad(lambda stack: torch.vmap(lambda factors: function(factors)["w"].factors.b.sum())(stack).sum())(stack)


def below_another(function: Callable[[Factors], Any], factors: Factors) -> None:
    """Differentiate by something else inside."""
    grad(lambda factors: grad(lambda x: (x * function(factors)["w"].factors.b).sum())(torch.ones(())))(factors)


MODES = [in_reverse, in_forward, by_autograd, by_duals, below_another]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FOLDS)
def test_what_changes_codes_must_not_be_differentiated(name, mode):
    param = coded("int8", "bfloat16")["w"]
    with pytest.raises(NotImplementedError, match=r"the base of '\w+' is in low precision, .*; detach it"):
        mode(lambda factors: FOLDS[name]({"w": param._replace(factors=factors)}), param.factors)


@pytest.mark.parametrize("mode", [*MODES, below_vmap])
@pytest.mark.parametrize(
    ("kind", "residual"),
    [("float8", "int8"), ("nf4", None), ("nvfp4", "bfloat16"), ("mxfp4", None), ("bfloat16", "bfloat16")],
)
def test_codes_of_every_kind_refuse_a_merge(kind, residual, mode):
    param = coded(kind, residual)["w"]
    with pytest.raises(NotImplementedError, match="the base of 'w' is in low precision"):
        mode(lambda factors: merge({"w": param._replace(factors=factors)}), param.factors)


@pytest.mark.parametrize("name", FOLDS)
def test_without_gradients_codes_change_as_ever(name):
    params = coded("int8", "bfloat16")
    wanted = FOLDS[name](params)
    attached = Factors(*(leaf.clone().requires_grad_() for leaf in params["w"].factors))
    with torch.no_grad():
        got = FOLDS[name]({"w": params["w"]._replace(factors=attached)})
    assert_same(
        got["w"], wanted["w"]._replace(factors=got["w"].factors) if isinstance(got["w"], LowRank) else wanted["w"]
    )


def test_gradients_by_the_input_and_other_weights_are_not_concerned():
    params, x = coded("int8", "bfloat16"), normal(0, 3, 32, dtype=torch.float32)
    got = grad(lambda x: dl.linear(x, merge(params)["w"]).sum())(x)
    torch.testing.assert_close(got, materialize(merge(params)["w"]).sum(0).expand(3, 32))


def test_pending_vectors_of_a_deferred_base_in_codes_have_gradients():
    param, x = coded("int8", "bfloat16")["w"], normal(0, 3, 32, dtype=torch.float32)
    dense = param.base.dequantize(torch.float32)

    def through(factors: Factors) -> Tensor:
        params = switch({"w": defer(param._replace(factors=factors), vectors=2)}, CODED_PLAN).params
        return dl.linear(x, params["w"]).square().sum()

    def plain(factors: Factors) -> Tensor:
        return (x @ (dense + factors.b @ factors.a / 4).mT).square().sum()

    for path_gradient, wanted in zip(grad(through)(param.factors), grad(plain)(param.factors), strict=True):
        torch.testing.assert_close(path_gradient, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("mode", [in_reverse, in_forward, by_autograd, by_duals])
def test_a_base_that_is_quantized_must_not_be_differentiated(mode):
    param = low_rank(CODED, base_dtype=torch.float32, factor_dtype=torch.float32)

    def quantized(factors: Factors) -> Any:
        return quantize({"w": merge(param._replace(factors=factors))}, "int8")

    with pytest.raises(NotImplementedError, match="the base of 'w' requires a gradient or has a tangent"):
        mode(quantized, param.factors)

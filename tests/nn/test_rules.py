"""Each operation on a low-rank weight equals that on the dense weight, and its gradients are projected."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

import dynlora_fn.nn
from dynlora_fn import LowRank, Plan, SidePlan, call, combine, materialize, partition, switch, value_and_grad
from dynlora_fn.bases import defer, quantize
from dynlora_fn.nn._rules import RULES
from dynlora_fn.testing import Shape, low_rank, normal
from tests.support.uses import TOLERANCE, Uses, dense, x

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])


MATRIX, STACK = (6, 4), (3, 6, 4)
# By name: the shape of the parameter, the shape of the low-rank weight, and what is done with it.
USES = {
    "linear": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), w, x(6))),
    "matmul": (MATRIX, MATRIX, lambda w: torch.matmul(x(2, 5, 6), w)),
    "@": (MATRIX, MATRIX, lambda w: x(5, 6) @ w),
    "@ from the left": (MATRIX, MATRIX, lambda w: w @ x(4, 5)),
    "@ batched": (MATRIX, MATRIX, lambda w: w @ x(2, 4, 5)),
    "@ vector": (MATRIX, MATRIX, lambda w: w @ x(4)),
    "vector @": (MATRIX, MATRIX, lambda w: x(6) @ w),
    "mm": (MATRIX, MATRIX, lambda w: torch.mm(x(5, 6), w)),
    "mv": (MATRIX, MATRIX, lambda w: torch.mv(w, x(4))),
    "method matmul": (MATRIX, MATRIX, lambda w: x(5, 6).matmul(w)),
    "addmm": (MATRIX, MATRIX, lambda w: torch.addmm(x(4), x(5, 6), w)),
    "addmm scaled": (MATRIX, MATRIX, lambda w: torch.addmm(x(5, 4), x(5, 6), w, beta=0.5, alpha=2)),
    "addmm from the left": (MATRIX, MATRIX, lambda w: torch.addmm(x(5), w, x(4, 5))),
    "baddbmm": (STACK, STACK, lambda w: torch.baddbmm(x(3, 5, 4), x(3, 5, 6), w)),
    "bmm": (STACK, STACK, lambda w: torch.bmm(x(3, 5, 6), w)),
    "bmm from the left": (STACK, STACK, lambda w: torch.bmm(w, x(3, 4, 5))),
    "stack @": (STACK, STACK, lambda w: x(2, 1, 5, 6) @ w),
    "T": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.T),
    "mT": (STACK, STACK, lambda w: x(3, 5, 4) @ w.mT),
    "t": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 6), w.t())),
    "transpose": (STACK, STACK, lambda w: torch.bmm(x(3, 5, 4), w.transpose(1, 2))),
    "transpose there and back": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), w.T.transpose(-1, -2))),
    "embedding": (MATRIX, MATRIX, lambda w: functional.embedding(IDS, w)),
    "embedding with padding": (MATRIX, MATRIX, lambda w: functional.embedding(IDS, w, padding_idx=3)),
    "embedding with padding from the end": (MATRIX, MATRIX, lambda w: functional.embedding(IDS, w, padding_idx=-3)),
    "einsum": (MATRIX, MATRIX, lambda w: torch.einsum("bi,oi->bo", x(5, 4), w)),
    "einsum, weight first, implicit": (MATRIX, MATRIX, lambda w: torch.einsum("oi, bi", w, x(5, 4))),
    "einsum, transposed": (MATRIX, MATRIX, lambda w: torch.einsum("...i,io->...o", x(2, 5, 6), w)),
    "einsum, a side summed": (MATRIX, MATRIX, lambda w: torch.einsum("bi,oi->b", x(5, 4), w)),
    "einsum, heads": (STACK, STACK, lambda w: torch.einsum("bsi,hdi->bhsd", x(2, 5, 4), w)),
    "einsum, ellipsis stack": (STACK, STACK, lambda w: torch.einsum("...bi,...oi->...bo", x(3, 5, 4), w)),
    "einsum, three operands": (MATRIX, MATRIX, lambda w: torch.einsum("bi,oi,bo->b", x(5, 4), w, x(5, 6))),
    "conv1d": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 2, 7), w, x(6), stride=2, padding=1)),
    "conv1d in groups": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 6, 7), w, groups=3, dilation=2)),
    "conv1d unbatched": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 7), w, padding="same")),
    "conv2d": ((6, 2, 3, 2), (6, 12), lambda w: functional.conv2d(x(2, 2, 7, 6), w, x(6), (2, 1), (1, 0))),
    "conv2d of each channel": ((6, 1, 3, 2), (6, 6), lambda w: functional.conv2d(x(2, 6, 7, 6), w, groups=6)),
    "conv3d": ((5, 2, 1, 2, 2), (5, 8), lambda w: functional.conv3d(x(1, 2, 3, 4, 4), w)),
    "rows": (MATRIX, MATRIX, lambda w: w[IDS]),
    "a row": (MATRIX, MATRIX, lambda w: w[2]),
    "a row from the end": (MATRIX, MATRIX, lambda w: w[-1, 1:3]),
    "slice of rows": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), w[1:5:2])),
    "slice of both": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 2), w[1:5, 2:])),
    "one of a stack": (STACK, STACK, lambda w: functional.linear(x(5, 4), w[1])),
    "one of a stack by tensor": (STACK, STACK, lambda w: functional.linear(x(5, 4), w[torch.tensor(1)])),
    "some of a stack": (STACK, STACK, lambda w: torch.bmm(w[torch.tensor([2, 0, 2, 1])], x(4, 4, 1))),
    "slice of a stack": (STACK, STACK, lambda w: torch.bmm(x(2, 5, 6), w[1:])),
    "unbind": (STACK, STACK, lambda w: sum(functional.linear(x(5, 4), matrix) for matrix in w.unbind())),
    "chunk": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), w.chunk(3)[1])),
    "chunk of columns": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 2), w.chunk(2, dim=-1)[1])),
    "split": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), torch.split(w, [2, 3, 1])[1])),
    "split in equal parts": (MATRIX, MATRIX, lambda w: functional.linear(x(5, 4), w.split(4)[1])),
    "heads by view": (MATRIX, MATRIX, lambda w: torch.einsum("bi,hdi->bhd", x(5, 4), w.view(3, -1, 4))),
    "heads by unflatten": (MATRIX, MATRIX, lambda w: torch.bmm(x(3, 5, 2), w.unflatten(0, (3, 2)))),
    "heads by reshape": (MATRIX, MATRIX, lambda w: x(3, 5, 2) @ torch.reshape(w, (3, 2, 4))),
    "fused rows": ((6, 4), (3, 2, 4), lambda w: functional.linear(x(5, 4), w, x(6))),
    "fused rows from the right": ((6, 4), (3, 2, 4), lambda w: x(5, 6) @ w),
    "fused columns": ((2, 12), (3, 2, 4), lambda w: torch.addmm(x(12), x(5, 2), w)),
    "fused columns as linear": ((2, 12), (3, 2, 4), lambda w: functional.linear(x(5, 12), w, x(2))),
    "fused rows cut": ((6, 4), (3, 2, 4), lambda w: functional.linear(x(5, 4), w.chunk(3)[1])),
    "fused rows cut elsewhere": ((6, 4), (3, 2, 4), lambda w: functional.linear(x(5, 4), w.split([2, 4])[1])),
    "fused columns cut": ((2, 12), (3, 2, 4), lambda w: x(5, 2) @ w.chunk(3, dim=1)[2]),
    "fused rows of a stack": ((3, 4, 5), (3, 2, 2, 5), lambda w: functional.linear(x(5, 5), w[2])),
    "fused rows of a stack at once": ((3, 4, 5), (3, 2, 2, 5), lambda w: torch.bmm(x(3, 2, 4), w)),
}


def setting(name: str) -> tuple[Uses, dict[str, LowRank]]:
    shape, (*stack, rows, columns), use = USES[name]
    return Uses(use, shape), {"weight": low_rank(Shape(rows, columns, 2), tuple(stack), seed=3)}


@pytest.mark.parametrize("name", USES)
def test_it_is_the_dense_weights(name):
    model, params = setting(name)
    leaf = dense(params["weight"], model.weight.shape).requires_grad_()
    wanted = functional_call(model, {"weight": leaf})
    got = call(model, params)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted.detach(), **TOLERANCE)

    cotangent = normal(11, *wanted.shape)
    (gradient,) = torch.autograd.grad(wanted, leaf, cotangent)
    trainable, frozen = partition(params)
    grads = value_and_grad(lambda tree: (call(model, combine(tree, frozen)) * cotangent).sum())(trainable).grads[
        "weight"
    ]
    (b, a), rank = params["weight"].factors, 2
    if name.startswith("fused columns"):
        gradient = gradient.unflatten(-1, (3, 4)).transpose(0, 1)
    gradient = gradient.reshape(*b.shape[:-1], a.shape[-1])
    torch.testing.assert_close(grads.b, gradient @ a.mT / rank, **TOLERANCE)
    torch.testing.assert_close(grads.a, b.mT @ gradient / rank, **TOLERANCE)


@pytest.mark.parametrize("name", USES)
def test_compiled_equals_eager(name):
    model, params = setting(name)
    trainable, frozen = partition(params)
    function = value_and_grad(lambda tree: call(model, combine(tree, frozen)).square().sum())
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(trainable), function(trainable), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", USES)
def test_an_ensemble_shares_the_base(name):
    model, params = setting(name)
    (trainable, frozen), members = partition(params), 3
    many = {"weight": type(trainable["weight"])(*(normal(5, members, *leaf.shape) for leaf in trainable["weight"]))}
    got = torch.vmap(lambda tree: call(model, combine(tree, frozen)))(many)
    for member in range(members):
        member_params = {"weight": type(trainable["weight"])(*(leaf[member] for leaf in many["weight"]))}
        torch.testing.assert_close(got[member], call(model, combine(member_params, frozen)), **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_is_that_of_the_dense_experts(dtype):
    """The operation takes no float64, and only rows of a multiple of 16 bytes."""
    rows, offsets = normal(0, 7, 16, dtype=dtype), torch.tensor([2, 2, 7], dtype=torch.int32)
    param = low_rank(Shape(16, 24, 3), (3,), base_dtype=dtype, factor_dtype=dtype)
    model = Uses(lambda w: functional.grouped_mm(rows, w, offs=offsets), (3, 16, 24))
    got, weight = call(model, {"weight": param}).double(), materialize(param).double()
    experts = torch.tensor([0, 0, 2, 2, 2, 2, 2])
    wanted = torch.einsum("ni,nio->no", rows.double(), weight[experts])
    torch.testing.assert_close(got, wanted, rtol=0, atol=4 * 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["linear", "einsum", "bmm", "conv2d", "embedding"])
def test_mixed_dtypes(name, autocast):
    """A base in bfloat16 and factors in float32."""
    model, params = setting(name)
    (base, factors, seed) = params["weight"]
    param = LowRank(base.bfloat16(), type(factors)(*(leaf.float() for leaf in factors)), seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = call(model, {"weight": param})
        wanted = functional_call(model, {"weight": dense(param, model.weight.shape).to(base.dtype)})
    torch.testing.assert_close(got.double(), wanted.double(), rtol=0, atol=40 * 2.0**-6)


def test_the_readme_names_every_operation_with_a_rule():
    readme = Path(dynlora_fn.nn.__file__).with_name("README.md").read_text()
    section = readme.split("## Operations with a rule")[1].split("\n## ")[0]
    spelled = {"__matmul__": "@", "__rmatmul__": "@", "__getitem__": "w[...]", "_grouped_mm": "grouped_mm"}
    # The getter of a property has no name; the property that it is bound to does.
    names = {(key.__self__ if key.__name__ == "__get__" else key).__name__ for key in RULES}
    assert set(re.findall(r"`(?:F\.)?([^`]+)`", section)) == {spelled.get(name, name) for name in names}


def test_what_a_rule_does_not_cover_is_refused():
    model, params = setting("fused rows")
    model.use = lambda w: w.split([1, 5])
    with pytest.raises(NotImplementedError, match=r"'weight'.*`split`.*0 to 1, within one of its parts of \[2, 2, 2\]"):
        call(model, params, fallback="raise")
    model, params = setting("bmm")
    model.use = lambda w: functional.embedding(IDS, w)
    with pytest.raises(NotImplementedError, match=r"'weight'.*`embedding`.*\(3, 6, 4\)"):
        call(model, params, fallback="raise")
    model, params = setting("conv2d")
    model.use = lambda w: functional.linear(x(5, 4), w)
    with pytest.raises(NotImplementedError, match=r"'weight'.*`linear`.*\(6, 2, 3, 2\)"):
        call(model, params, fallback="raise")


def test_a_shape_that_does_not_fit_is_refused_with_both():
    model, params = setting("linear")
    with pytest.raises(ValueError, match=r"`params` has shape \(6, 4\) for 'weight', which does not fit .* \(7, 4\)"):
        call(Uses(model.use, (7, 4)), params)


def waiting(param: LowRank) -> LowRank:
    """Return a weight with pending folds of two vectors of each side."""
    slots = torch.arange(2)
    side = SidePlan(slots, slots + 2, torch.tensor([True, True]))
    return switch(defer(quantize(param, "int8"), vectors=4), Plan(side, side, torch.tensor(0))).param


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("store", [partial(quantize, base="int8"), partial(quantize, base="float8"), waiting])
def test_a_base_in_low_precision_is_used_alike(name, store):
    model, params = setting(name)
    param = store(params["weight"])
    wanted = functional_call(model, {"weight": dense(param, model.weight.shape)})
    torch.testing.assert_close(call(model, {"weight": param}), wanted, **TOLERANCE)

"""Every path of `linear` is the plain product, with its gradients, under every composition of transforms."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, linear, value_and_grad
from dynlora_fn.bases import quantize
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn import _linear
from dynlora_fn.nn._view import View, transposed
from dynlora_fn.testing import Shape, assert_same, assert_within, eps, low_rank, normal, seeds, untouched
from tests.support import reference
from tests.support.strategies import plain_params
from tests.support.versions import skip_compiled_jacfwd

PATHS = ("factored", "merged", "dense")


@given(plain_params(stacks=st.just(())), st.sampled_from(PATHS), st.integers(0, 3), st.booleans(), seeds)
def test_every_path_is_the_dense_product(param, path, batch, has_bias, seed):
    out_features, in_features = param.base.shape
    dtype = reference.working_dtype(param)
    x, bias = normal(seed, batch, 2, in_features, dtype=dtype), normal(seed, out_features, dtype=dtype)
    with untouched(param, x):
        got = linear(x, param, bias if has_bias else None, path=path)
    assert got.dtype == dtype
    shift = bias.double() * has_bias
    wanted = x.double() @ reference.weight(param).T + shift
    # Each output adds up `in` products of x with base, and `rank` products of b with `in` products of x with a.
    roundings = 2 * in_features + param.factors.a.shape[-2] + 4
    bound = roundings * eps(dtype) * (x.double().abs() @ reference.magnitude(param).T + shift.abs())
    assert_within(got, wanted, bound)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4), (2, 2, 3, 4), (1, 2, 2, 3, 4)])
def test_the_output_may_be_changed_in_place(path, shape):
    param, x, bias = low_rank(Shape(6, 4, 2), seed=1), normal(2, *shape), normal(3, 6)

    def gradients(relu, **path):
        return value_and_grad(lambda factors: relu(linear(x, param._replace(factors=factors), bias, **path)).sum())(
            param.factors
        )

    assert_same(gradients(torch.relu_, path=path), gradients(torch.relu, path=path))


@given(plain_params(stacks=st.just(())), st.sampled_from(PATHS), seeds)
def test_gradients_are_those_of_the_dense_product(param, path, seed):
    out_features, in_features = param.base.shape
    rank, dtype = param.factors.a.shape[-2], reference.working_dtype(param)
    x, bias, cotangent = (normal(seed + n, *shape, dtype=dtype) for n, shape in enumerate(
        [(5, in_features), (out_features,), (5, out_features)]
    ))  # fmt: skip
    leaves = [leaf.clone().requires_grad_() for leaf in (x, *param.factors, bias)]
    output = linear(leaves[0], param._replace(factors=Factors(*leaves[1:3])), leaves[3], path=path)
    grads = torch.autograd.grad(output, leaves, cotangent)
    assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]
    b, a = (leaf.double() for leaf in param.factors)
    dense, size = cotangent.double().T @ x.double(), cotangent.double().abs().T @ x.double().abs()
    wanted = [
        cotangent.double() @ reference.weight(param),
        dense @ a.T / rank,
        b.T @ dense / rank,
        cotangent.double().sum(0),
    ]
    magnitudes = [
        cotangent.double().abs() @ reference.magnitude(param),
        size @ a.abs().T / rank,
        b.abs().T @ size / rank,
        cotangent.double().abs().sum(0),
    ]
    # At most three products in a row, and a gradient is rounded to the dtype of its leaf.
    work = (2 * (out_features + in_features + 5) + rank + 6) * eps(dtype)
    for got, value, magnitude in zip(grads, wanted, magnitudes, strict=True):
        assert_within(got, value, (work + eps(got.dtype)) * magnitude)


S = 3
SHAPE = Shape(8, 16, 2)
STACK = low_rank(SHAPE, (S,), 0)
X = normal(1, S, 5, 16)
ONE = tree_map(lambda leaf: leaf[0], STACK)


def transforms(stack: LowRank, path: str) -> dict[str, Any]:
    # Copies: Dynamo fails on the forward mode of views of one tensor, in `torch.nn.functional.linear` itself.
    member = tree_map(lambda leaf: leaf[0].clone(), stack)
    other = tree_map(lambda leaf: leaf[1].clone(), stack)

    def loss(factors: Factors, base: Any, x: Tensor) -> Tensor:
        return linear(x.tanh(), LowRank(base, factors, stack.seed[0]), path=path).square().sum()

    def output(factors: Factors) -> Tensor:
        return linear(X[0], member._replace(factors=factors), path=path)

    def tangent_of(tangent: Factors) -> Any:
        return jvp(lambda f: loss(f, member.base, X[0]), (member.factors,), (tangent,))[1]

    return {
        "grad": lambda: grad(loss)(member.factors, member.base, X[0]),
        "grad of the input": lambda: grad(loss, argnums=2)(member.factors, member.base, X[0]),
        "ensemble": lambda: torch.vmap(grad(loss))(stack.factors, stack.base, X),
        "ensemble of shared base": lambda: torch.vmap(grad(loss), in_dims=(0, None, None))(
            stack.factors, member.base, X[0]
        ),
        "per sample": lambda: torch.vmap(grad(loss), in_dims=(None, None, 0))(member.factors, member.base, X),
        "grad of vmap": lambda: grad(lambda f: torch.vmap(loss)(f, stack.base, X).sum())(stack.factors),
        "grad of vmap of samples": lambda: grad(
            lambda f: torch.vmap(loss, in_dims=(None, None, 0))(f, member.base, X).sum()
        )(member.factors),
        "grad of the input of vmap": lambda: grad(
            lambda x: torch.vmap(loss, in_dims=(None, None, 0))(member.factors, member.base, x).sum()
        )(X),
        "grad of grad": lambda: grad(lambda f: sum(leaf.sin().sum() for leaf in grad(loss)(f, member.base, X[0])))(
            member.factors
        ),
        "grad of grad of the input": lambda: grad(
            lambda x: sum(leaf.sin().sum() for leaf in grad(loss)(member.factors, member.base, x))
        )(X[0]),
        "vjp": lambda: vjp(output, member.factors)[1](X[0][:, :8]),
        "jacrev": lambda: jacrev(output)(member.factors),
        "jacfwd": lambda: jacfwd(output)(member.factors),
        "jvp": lambda: jvp(
            lambda f, x: loss(f, member.base, x), (member.factors, X[0].clone()), (other.factors, X[1].clone())
        ),
        "jvp of grad": lambda: jvp(lambda f: grad(loss)(f, member.base, X[0]), (member.factors,), (other.factors,)),
        "grad of jvp": lambda: grad(lambda f: jvp(lambda g: loss(g, member.base, X[0]), (f,), (other.factors,))[1])(
            member.factors
        ),
        "vmap of jvp": lambda: torch.vmap(tangent_of)(stack.factors),
    }


TRANSFORMS = list(transforms(STACK, "factored"))


def check_transform(name: str, stack: LowRank, path: str, is_compiled: bool) -> None:
    """Compare with the plain product with the dense base, eager."""
    transform = transforms(stack, path)[name]
    got = (torch.compile(transform, fullgraph=True, backend="aot_eager") if is_compiled else transform)()
    dense = stack._replace(base=as_base(stack.base).dequantize(torch.float64))
    for left, right in zip(tree_leaves(got), tree_leaves(transforms(dense, "factored")[name]()), strict=True):
        # Up to six products in a row of at most 16 terms each, of magnitude 1 and 30 twice over.
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-9)


def spread(cases: list[str]) -> list[Any]:
    """Return all transforms with all cases, eager and compiled. The suite compiles each transform with one case.

    So all pairs of a transform, a case and a way to run occur. `--compositions` compiles all.
    """
    return [
        pytest.param(
            name,
            case,
            is_compiled,
            id=f"{name}-{case}-{'compiled' if is_compiled else 'eager'}",
            marks=[pytest.mark.compositions] if is_compiled and (row + column) % len(cases) else [],
        )
        for row, name in enumerate(TRANSFORMS)
        for column, case in enumerate(cases)
        for is_compiled in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "is_compiled"), spread(["merged", "dense"]))
def test_every_path_is_the_plain_one_under_transforms(name, path, is_compiled):
    check_transform(name, STACK, path, is_compiled)


@pytest.mark.parametrize(
    ("name", "case", "is_compiled"), spread(["int8 factored", "int8 merged", "nf4 factored", "nf4 dense"])
)
def test_every_path_of_a_quantized_base_is_that_of_the_dense_one_under_transforms(name, case, is_compiled):
    if name == "jacfwd" and is_compiled:
        skip_compiled_jacfwd()
    kind, path = case.split()
    check_transform(name, quantize(STACK, kind), path, is_compiled)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["float8", "bfloat16"])
def test_every_path_of_every_base_is_that_of_the_dense_one(kind, path):
    for name in ("grad", "grad of the input", "grad of vmap"):
        check_transform(name, quantize(STACK, kind), path, is_compiled=True)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("path", ["merged", "dense"])
def test_every_path_is_the_plain_one_with_inductor(path):
    got = torch.compile(transforms(STACK, path)["grad"], fullgraph=True)()
    torch.testing.assert_close(got, transforms(STACK, "factored")["grad"](), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("kind", ["float64", "int8", "nf4", "bfloat16"])
@pytest.mark.parametrize("path", ["merged", "dense"])
def test_only_inputs_are_kept(path, kind, is_transposed):
    """The codes of a base in low precision are saved, also for a transposed weight."""
    saved = []
    param = ONE if kind == "float64" else quantize(ONE, kind)
    x = normal(1, 5, param.shape[-2] if is_transposed else param.shape[-1]).requires_grad_()
    param = param._replace(factors=Factors(*(leaf.clone().requires_grad_() for leaf in param.factors)))
    codes = param.base if isinstance(param.base, Tensor) else param.base.codes
    inputs = {leaf.data_ptr() for leaf in (x, *param.factors, *tree_leaves(codes))}
    param = transposed(View("w", (param,))).parts[0] if is_transposed else param
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x, param, path=path)
    assert {t.data_ptr() for t in saved} == inputs


@pytest.mark.parametrize("case", ["int8 factored", "int8 merged", "nf4 dense"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transposed_base_is_that_of_the_dense_one_under_transforms(name, case):
    kind, path = case.split()
    quantized = quantize(low_rank(Shape(16, 8, 2), (S,), 0), kind)
    (stack,) = transposed(View("w", (quantized,))).parts
    check_transform(name, stack, path, is_compiled=name == "grad")


@pytest.mark.parametrize("path", PATHS)
def test_the_factors_alone_may_be_trained(path):
    factors = Factors(*(leaf.clone().requires_grad_() for leaf in ONE.factors))
    output = linear(X[0], ONE._replace(factors=factors), path=path).sum()
    assert all(leaf.any() for leaf in torch.autograd.grad(output, factors))


def test_a_merged_weight_is_rounded_once():
    """A base and a product cancel, so the result is far below bfloat16's spacing at either."""
    exact = torch.tensor([[1 / 3]], dtype=torch.float32)
    param = LowRank(exact, Factors(b=torch.tensor([[-1.0]]), a=exact.bfloat16().float()), torch.tensor(0))
    with torch.autocast("cpu", torch.bfloat16):
        got = {path: linear(torch.ones(1, 1), param, path=path) for path in ("merged", "dense")}
    rounded_once = (exact - exact.bfloat16().float()).bfloat16()
    assert rounded_once.item() != 0
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, rounded_once) for value in got.values())


@pytest.mark.parametrize("path", PATHS)
def test_autocast_sets_the_dtype_of_the_products_alone(path):
    param = low_rank(Shape(8, 6, 2), base_dtype=torch.float32, factor_dtype=torch.float32)
    x, bias = normal(1, 5, 6, dtype=torch.float32), normal(2, 8, dtype=torch.float32)

    def loss(factors, x):
        with torch.autocast("cpu", torch.bfloat16):
            output = linear(x, param._replace(factors=factors), bias, path=path)
        assert output.dtype == torch.bfloat16
        return output.float().square().sum()

    grads, grad_x = grad(loss, argnums=(0, 1))(param.factors, x)
    assert all(leaf.dtype == torch.float32 for leaf in (*grads, grad_x))
    wanted = grad(lambda f: linear(x, param._replace(factors=f), bias).square().sum())(param.factors)
    for got, value in zip(grads, wanted, strict=True):
        # bfloat16 has 8 bits; three products in a row
        torch.testing.assert_close(got, value, rtol=0, atol=16 * 2**-8 * value.abs().max().item())


def test_batches_of_any_size_share_a_graph():
    param = low_rank(Shape(16, 16, 4))
    compiled = torch.compile(lambda x: linear(x, param), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (64, 128, 7):  # the last by another path
        x = normal(0, tokens, 16)
        torch.testing.assert_close(compiled(x), linear(x, param), rtol=1e-12, atol=1e-10)


def test_an_unknown_path_is_refused():
    with pytest.raises(ValueError, match="`path` must be 'factored', 'merged', 'dense' or None, got 'fast'"):
        linear(X[0], ONE, path="fast")


def test_the_module_takes_the_cheapest_path(monkeypatch):
    """`call` takes the path that `cheapest_path` returns for its shapes."""
    calls = []
    monkeypatch.setattr(_linear, "cheapest_path", lambda **sizes: calls.append(sizes) or "dense")
    model = nn.Linear(6, 4)
    for trained in ("both", "b"):
        params = dl.init(model, rank=2, seed=0, targets=["weight"], trained=trained)
        dl.call(model, params, torch.ones(3, 5, 6))
    sizes = {"tokens": 15, "out_features": 4, "in_features": 6, "rank": 2}
    assert calls == [sizes | {"is_one_sided": is_one_sided} for is_one_sided in (False, True)]


def test_a_product_without_gradients_takes_no_function():
    """Its result has the same bits as with them."""
    wanted = linear(X[0].clone().requires_grad_(), ONE, path="merged")
    assert type(wanted.grad_fn).__name__ == "_MergedBackward"
    got = linear(X[0], ONE, path="merged")
    assert got.grad_fn is None
    assert_same(got, wanted.detach())
    with torch.no_grad():
        assert linear(X[0].clone().requires_grad_(), ONE, path="merged").grad_fn is None

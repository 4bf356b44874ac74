"""Products, rules and other uses of a weight with an alpha are those of the dense weight."""

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn import Factors, call, combine, linear, partition, value_and_grad
from dynlora_fn.nn._register import REGISTERED
from dynlora_fn.testing import Shape, Storage, low_rank, normal
from tests.support.compositions import PATHS, error_of, functions
from tests.support.use_table import COVERED, USES
from tests.support.uses import TOLERANCE, Uses, dense

pytestmark = pytest.mark.filterwarnings("ignore:low-rank weight")
ALPHAS = (4.0, 0.3)


@pytest.mark.parametrize("name", USES)
def test_every_use_is_that_of_the_dense_weight(name):
    shape, (*stack, rows, columns), use = USES[name]
    model = Uses(use, shape)
    param = low_rank(Shape(rows, columns, min(2, rows, columns)), tuple(stack), seed=3, alpha=0.3)
    trainable, frozen = partition({"weight": param})

    def loss_fn(tree, fallback="raise" if name in COVERED else "dense"):
        output = call(model, combine(tree, frozen), fallback=fallback)
        return output.square().sum(), output

    def dense_loss_fn(tree):
        weight = dense(param._replace(factors=tree["weight"]), model.weight.shape)
        output = torch.func.functional_call(model, {"weight": weight})
        return output.square().sum(), output

    (_, got), grads = value_and_grad(loss_fn, has_aux=True)(trainable)
    (_, wanted), wanted_grads = value_and_grad(dense_loss_fn, via="autograd", has_aux=True)(trainable)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if "float()" in name or "cast" in name else TOLERANCE
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(grads["weight"][:2], wanted_grads["weight"][:2], rtol=1e-8, atol=10 * tolerance["atol"])


@pytest.mark.parametrize("waiting", [0, 2])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", [*PATHS, "@", "conv2d", "fused rows", "one of a stack"])
def test_products_are_those_of_the_dense_weight_under_every_transform(name, alpha, waiting):
    pair = functions(name, Storage("float64"), "input and factors", waiting, alpha)
    for names in [("grad",), ("jvp",), ("vmap",), ("hessian",), ("jvp", "jvp"), ("vmap", "grad")]:
        error = error_of(names, pair)
        assert error is None or error <= 1e-9, f"{' of '.join(names)} is wrong by {error}"


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
@pytest.mark.parametrize("storage", [Storage("int8", "int8"), Storage("bfloat16", None)], ids=str)
def test_bases_in_low_precision_take_all_paths(storage, path):
    param = low_rank(Shape(4, 32, 2), storage=storage, alpha=0.3)
    x = normal(0, 3, 32)
    torch.testing.assert_close(linear(x, param, path=path), x @ dl.materialize(param).mT)


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_a_power_of_two_gives_the_bits_of_a_larger_factor(path):
    """The scale is one division, which is exact where alpha is."""
    param = low_rank(Shape(8, 16, 3), base_dtype=torch.float32, factor_dtype=torch.float32, alpha=4.0)
    b, a = param.factors.b, param.factors.a
    plain, x = param._replace(factors=Factors(4 * b, a)), normal(0, 5, 16, dtype=torch.float32)
    assert torch.equal(linear(x, param, path=path), linear(x, plain, path=path))
    assert torch.equal(dl.materialize(param), dl.materialize(plain))


@pytest.mark.parametrize("path", ["factored", "merged", "dense"])
def test_a_compiled_product_is_the_eager_one(path):
    param = low_rank(Shape(4, 32, 2), alpha=0.3)
    trainable, frozen = partition({"w": param})
    x = normal(0, 3, 32)

    def loss(trainable, x):
        return linear(x, combine(trainable, frozen)["w"], path=path).square().sum()

    step = torch.func.grad_and_value(loss)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 2.0):
        with torch.compiler.set_stance("default" if scale == 1 else "fail_on_recompile"):
            (grads, value), (wanted_grads, wanted) = compiled(trainable, scale * x), step(trainable, scale * x)
            torch.testing.assert_close((value, grads["w"][:2]), (wanted, wanted_grads["w"][:2]))
            assert grads["w"].alpha == param.factors.alpha


def test_a_registered_rule_gets_a_weight_of_alpha_one():
    param = low_rank(Shape(4, 6, 2), alpha=0.3)
    dl.nn.register_rule(torch.Tensor.frexp, lambda weight: weight.base + weight.factors.b @ weight.factors.a / 2)
    try:
        got = call(Uses(torch.Tensor.frexp, (4, 6)), {"weight": param})
    finally:
        REGISTERED.pop(torch.Tensor.frexp)
    torch.testing.assert_close(got, dl.materialize(param))

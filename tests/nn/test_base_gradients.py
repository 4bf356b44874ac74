"""A plain base that is differentiated gets its gradient from every product.

Other bases are refused by name.
"""

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jvp, vjp
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from dynlora_fn import Factors, LowRank, call, linear
from dynlora_fn.bases import defer, quantize
from dynlora_fn.nn import _linear_functions
from dynlora_fn.testing import Shape, Storage, low_rank, normal
from tests.support.compositions import PATHS, RULES, composed, error_of, functions

SHAPE = Shape(6, 8, 2)
X = normal(1, 5, 8)
FULL = ("factored", "merged", "dense")


@pytest.mark.parametrize("name", [*PATHS, *RULES])
def test_every_product_gives_the_gradient_by_the_base(name):
    pair = functions(name, Storage("float64"), "base")
    for names in (("autograd",), ("jvp",), ("jvp", "grad"), ("grad", "jvp")):
        error = error_of(names, pair)
        assert error is not None
        assert error <= 1e-9, names


@pytest.mark.parametrize("name", [*PATHS, "embedding", "einsum", "conv1d", "fused rows cut"])
def test_a_gradient_by_a_base_in_bfloat16_is_rounded_to_it(name):
    pair = functions(name, Storage("bfloat16"), "base")
    for names in (("grad",), ("vmap", "jvp")):
        error = error_of(names, pair)
        assert error is not None
        assert error <= 2.0**-6, names


@pytest.mark.parametrize("path", FULL)
def test_all_gradients_are_right_beside_that_of_the_base(path):
    param, bias = low_rank(SHAPE), normal(2, 6)

    def loss(x, base, factors, bias, product):
        return product(x, base, factors, bias).sin().sum()

    def low_rank_product(x, base, factors, bias):
        return linear(x, LowRank(base, factors, param.seed), bias, path=path)

    def dense_product(x, base, factors, bias):
        return functional.linear(x, base + factors.b @ factors.a / 2, bias)

    arguments = (X, param.base, param.factors, bias)
    got = grad(loss, argnums=(0, 1, 2, 3))(*arguments, low_rank_product)
    wanted = grad(loss, argnums=(0, 1, 2, 3))(*arguments, dense_product)
    for left, right in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", FULL)
def test_a_gradient_by_the_base_has_its_dtype_under_autocast_too(path, dtype):
    param = low_rank(SHAPE, base_dtype=dtype, factor_dtype=torch.float32)
    base, x = param.base.clone().requires_grad_(), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = linear(x, param._replace(base=base), path=path)
    (gradient,) = torch.autograd.grad(output.float().sum(), base)
    assert gradient.dtype == dtype
    wanted = torch.ones(6, 1) @ x.sum(0, keepdim=True)
    torch.testing.assert_close(gradient.float(), wanted, rtol=0, atol=16 * 2**-8 * wanted.abs().max().item())


@pytest.mark.parametrize("path", FULL)
def test_a_compiled_product_gives_the_gradient_by_the_base(path):
    param = low_rank(SHAPE, base_dtype=torch.float32)

    def loss(base):
        return linear(X, param._replace(base=base), path=path).sin().sum()

    for transform in (grad(loss), lambda base: jvp(loss, (base,), (base.sin(),))):
        compiled = torch.compile(transform, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(param.base), transform(param.base), rtol=1e-6, atol=1e-6)
    base = param.base.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(base), base)
    torch.testing.assert_close(gradient, grad(loss)(param.base), rtol=1e-6, atol=1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.hidden = nn.Embedding(6, 8), nn.Linear(8, 6)

    def forward(self, ids):
        return self.hidden(self.table(ids))


IDS = torch.tensor([0, 3, 3, 5])


def test_a_model_is_differentiated_by_its_bases():
    """Hypergradients: `grad` by a base, through a step of gradient descent on the factors."""
    torch.manual_seed(0)
    model = Model().double()
    params = dl.init(model, rank=2, seed=0, targets=["*.weight"], dtype=torch.float64)
    params = {
        name: param._replace(factors=Factors(*(normal(7, *leaf.shape) for leaf in param.factors)))
        if isinstance(param, LowRank)
        else param
        for name, param in params.items()
    }
    trainable, frozen = dl.partition(params)
    bases = {name: param.base for name, param in params.items() if isinstance(param, LowRank)}

    def dense(tree, bases):
        weights = {name: bases[name] + tree[name].b @ tree[name].a / 2 for name in bases}
        return torch.func.functional_call(model, {**tree, **weights}, (IDS,))

    def low_rank_output(tree, bases):
        with_bases = {name: leaf._replace(base=bases[name]) if name in bases else leaf for name, leaf in frozen.items()}
        return call(model, dl.combine(tree, with_bases), IDS)

    def after_a_step(bases, output):
        def loss(tree):
            return output(tree, bases).sin().square().mean()

        return loss(tree_map(lambda leaf, gradient: leaf - 0.1 * gradient, trainable, grad(loss)(trainable)))

    got, wanted = grad(after_a_step)(bases, low_rank_output), grad(after_a_step)(bases, dense)
    for name, gradient in wanted.items():
        assert gradient.any()
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12)


def test_a_row_of_padding_gives_the_base_no_gradient():
    param = low_rank(SHAPE)
    model = nn.Embedding(6, 8, padding_idx=3).double()

    def loss(base):
        return call(model, {"weight": param._replace(base=base)}, IDS).sin().sum()

    gradient = grad(loss)(param.base)
    assert not gradient[3].any()
    assert gradient[0].any()
    torch.testing.assert_close(jacfwd(loss)(param.base), gradient)


KINDS = ("int8", "float8", "nf4", "nvfp4")  # no tensor of mxfp4 can require a gradient


def differentiated(param: LowRank) -> LowRank:
    def attach(leaf):
        return leaf.clone().requires_grad_() if leaf.dtype in (torch.float32, torch.float64, torch.bfloat16) else leaf

    return param._replace(base=tree_map(attach, param.base))


@pytest.mark.parametrize("waiting", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_are_differentiated_are_refused_by_name(kind, waiting):
    param = quantize(low_rank(Shape(32, 32, 2)), kind)
    param = differentiated(defer(param, vectors=waiting) if waiting else param)
    for model in (nn.Linear(32, 32), nn.Embedding(32, 32)):
        x = torch.ones(2, 32) if isinstance(model, nn.Linear) else IDS
        params = {**dict(model.named_parameters()), "weight": param}
        with pytest.raises(NotImplementedError, match=rf"the base of 'weight' in `params` in {kind} requires"):
            call(model, params, x)
    for path in FULL:
        with pytest.raises(NotImplementedError, match=rf"the base in {kind} requires a gradient or has a tangent"):
            linear(torch.ones(2, 32), param, path=path)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "vmap of jvp", "jvp below grad"])
def test_codes_are_refused_under_every_transform(transform):
    param = quantize(low_rank(Shape(32, 32, 2)), "int8")
    model, ones = nn.Linear(32, 32, bias=False), torch.ones(1, 32)

    def output(scale, x=ones):
        codes = param.base.codes._replace(scale=scale)
        return call(model, {"weight": param._replace(base=param.base._replace(codes=codes))}, x).sum()

    scale = param.base.codes.scale
    functions = {
        "grad": lambda: grad(output)(scale),
        "vjp": lambda: vjp(output, scale),
        "jvp": lambda: jvp(output, (scale,), (scale,)),
        "vmap of jvp": lambda: torch.vmap(lambda s: jvp(output, (s,), (s,)))(scale[None]),
        "jvp below grad": lambda: jvp(lambda s: grad(lambda x: output(s, x))(ones), (scale,), (scale,)),
    }
    with pytest.raises(NotImplementedError, match="the base of 'weight' in `params` in int8 requires"):
        functions[transform]()


def test_codes_are_refused_when_compiled():
    param = quantize(low_rank(Shape(32, 32, 2)), "int8")
    table = nn.Embedding(32, 32)
    for product in (
        lambda p: linear(torch.ones(2, 32), p, path="merged"),
        lambda p: call(table, {"weight": p}, IDS),
    ):

        def loss(scale, product=product):
            codes = param.base.codes._replace(scale=scale)
            return product(param._replace(base=param.base._replace(codes=codes))).sum()

        compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match="in int8 requires a gradient or has a tangent"):
            compiled(param.base.codes.scale)


@pytest.mark.parametrize("storage", [Storage("float64"), Storage("bfloat16"), Storage("int8", "int8")])
def test_a_base_that_is_not_differentiated_takes_the_usual_path(storage, monkeypatch):
    """Also where a transform passes the base on as an argument, and in forward mode by something else."""
    calls = []
    apply = _linear_functions._Merged.apply
    monkeypatch.setattr(_linear_functions._Merged, "apply", lambda *args: calls.append(args) or apply(*args))
    param = low_rank(Shape(8, 32, 2), storage=storage)
    x = normal(1, 3, 32)

    def loss(factors, base, x):
        return linear(x, LowRank(base, factors, param.seed), path="merged").sin().sum()

    for transform in (
        lambda: grad(loss)(param.factors, param.base, x),
        lambda: jvp(lambda x: grad(loss)(param.factors, param.base, x), (x,), (x,)),
        lambda: jacfwd(loss, argnums=2)(param.factors, param.base, x[:1]),
    ):
        calls.clear()
        transform()
        assert calls


def test_transposed_bases_of_a_composition_are_views():
    """The transpose of a plain base shares its memory and its gradient."""
    pair = functions("transposed, dense", Storage("float64"), "all of them")
    got, wanted = (composed(("grad", "jvp", "grad"), g)(torch.ones(3, dtype=torch.float64)) for g in pair)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)

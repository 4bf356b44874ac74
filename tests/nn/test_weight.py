"""What a low-rank weight answers when a module reads its attributes, and which derivatives pass through it."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional

from dynlora_fn import call, combine, init, materialize, partition, value_and_grad
from dynlora_fn.testing import assert_same, normal
from tests.support.weight_layers import gradients, setting


def test_a_weight_describes_itself_without_its_values():
    model, params = setting(lambda w: w)
    texts = []
    model.use = lambda w: texts.extend([repr(w), str(w), f"{w}"]) or w
    call(model, params, normal(0, 3, 4), fallback="raise")
    assert set(texts) == {"LowRankWeight('weight', shape=(6, 4), dtype=torch.float64, device=cpu)"}


def test_attributes_are_those_of_the_dense_weight():
    def attributes(w):
        return (
            *(w.shape, w.dtype, w.device, w.ndim, w.layout, w.itemsize, w.nbytes, w.is_cpu, w.is_meta, len(w)),
            *(
                w.stride(),
                w.stride(0),
                w.storage_offset(),
                w.is_contiguous(),
                w.element_size(),
                w.numel(),
                w.nelement(),
            ),
            *(w.dim(), w.size(), w.size(-1), w.is_complex(), w.is_signed(), w.type(), torch.is_floating_point(w)),
            *(torch.result_type(w, torch.ones(2).half()), w.new_zeros(2).dtype, torch.ones_like(w).stride()),
        )

    found = []
    model, params = setting(lambda w: found.append(attributes(w)) or w)
    call(model, params, normal(0, 3, 4), fallback="raise")
    assert found == [attributes(params["weight"].base)]


def test_low_precision_casts_round_once():
    model, params = setting(lambda w: w.to(torch.bfloat16).double())
    got = call(model, params, normal(0, 3, 4), fallback="raise")
    wanted = functional_call(model, materialize(params), (normal(0, 3, 4),))
    torch.testing.assert_close(got, wanted, rtol=0, atol=8 * 4 * 2.0**-8)


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        return torch.ones(6, 6, dtype=w.dtype) @ w

    @staticmethod
    def backward(ctx, grad):
        return torch.ones(6, 6, dtype=grad.dtype) @ grad


def test_the_gradient_of_a_custom_function_is_refused_on_request():
    model, params = setting(Total.apply)
    with pytest.raises(NotImplementedError, match=r"'weight'.*`autograd.Function`"):
        gradients(model, params, normal(0, 3, 4), via="autograd", fallback="raise")


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_dual_weight_has_its_tangent_where_it_requires_a_gradient_too(is_trained):
    model, params = setting(torch.exp)
    param, x = params["weight"], normal(0, 3, 4)
    with forward_ad.dual_level():
        b = forward_ad.make_dual(param.factors.b.clone().requires_grad_(is_trained), torch.ones_like(param.factors.b))
        dual = {**params, "weight": param._replace(factors=param.factors._replace(b=b))}
        got, wanted = call(model, dual, x), functional_call(model, materialize(dual), (x,))
        tangents = [forward_ad.unpack_dual(output).tangent for output in (got, wanted)]
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)


def below_torch_function(w):
    with torch._C.DisableTorchFunctionSubclass():
        return torch.mul(w, 2.0)


@pytest.mark.parametrize(
    ("use", "operation"), [(Total.apply, "autograd.Function"), (below_torch_function, "mul.Tensor")]
)
def test_a_tangent_that_would_be_lost_is_refused(use, operation):
    model, params = setting(use)
    param = params["weight"]
    with forward_ad.dual_level():
        b = forward_ad.make_dual(param.factors.b, torch.ones_like(param.factors.b))
        dual = {**params, "weight": param._replace(factors=param.factors._replace(b=b))}
        with pytest.raises(NotImplementedError, match=rf"'weight'.*`{operation}`, which loses its tangent"):
            call(model, dual, normal(0, 3, 4))


class Branches(nn.Linear):
    """A linear layer that asks whether its weight is trained."""

    def forward(self, x):
        return functional.linear(x, self.weight if self.weight.requires_grad else self.weight.detach() * 0)


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_weight_that_is_differentiated_requires_a_gradient(via):
    model = Branches(4, 6, bias=False, dtype=torch.float64)
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64))
    x = normal(0, 3, 4)
    function = value_and_grad(lambda tree: call(model, combine(tree, frozen), x).sum(), via=via)
    value, grads = function(trainable)
    assert value != 0
    assert grads["weight"].b.any()
    if via == "func":
        assert_same(torch.compile(function, backend="aot_eager", fullgraph=True)(trainable), function(trainable))
    assert call(model, combine(trainable, frozen), x).eq(0).all()


PARTS = {
    "T": lambda x, w: x @ w.T,
    "t": lambda x, w: x @ w.t(),
    "to": lambda x, w: functional.linear(x, w.to(x.dtype)),
    "slice": lambda x, w: functional.linear(x, w[1:3]),
    "multiple": lambda x, w: functional.linear(x, w * 2),
    "dense": lambda x, w: functional.linear(x, w.tanh()),
}


@pytest.mark.filterwarnings("ignore:low-rank weight")
@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_a_model_may_be_compiled(name):
    class Layer(nn.Linear):
        def forward(self, x):
            return self.use(x, self.weight)

    model, x = Layer(4, 6).double(), normal(1, 3, 4)
    params = init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64)
    trainable, frozen = partition(params)
    results = []
    for model.use in (PARTS[name], torch.compile(PARTS[name], backend="eager")):
        for via in ("func", "autograd"):
            results.append(
                value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum(), via=via)(trainable)
            )
    for result in results[1:]:
        torch.testing.assert_close(tuple(result), tuple(results[0]), rtol=1e-12, atol=1e-12)


def test_a_layer_with_attention_may_be_compiled():
    x = normal(1, 3, 5, 8)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double())
    params = init(model, rank=2, seed=0, targets=["*.in_proj_weight"], dtype=torch.float64)
    trainable, frozen = partition(params)

    def gradients():
        return value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum())(trainable).grads

    wanted = gradients()
    model[0].compile(backend="eager")
    torch.testing.assert_close(gradients(), wanted, rtol=1e-12, atol=1e-12)

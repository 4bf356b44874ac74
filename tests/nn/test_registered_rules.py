"""Rules that users register, and weights that are made dense for good."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from dynlora_fn import call, init, materialize, partition
from dynlora_fn.nn import dense, register_rule
from dynlora_fn.nn._register import REGISTERED
from dynlora_fn.testing import assert_same, normal
from tests.support.weight_layers import EPS, setting


@pytest.fixture
def registry():
    """Remove the rules that a test registers."""
    yield
    REGISTERED.clear()


@pytest.mark.usefixtures("registry")
def test_a_registered_rule_replaces_the_dense_weight():
    def low_rank_logsumexp(input, dim):
        return NotImplemented if dim else input.base.logsumexp(0) + input.factors.b.sum()

    register_rule(torch.logsumexp, low_rank_logsumexp)
    model, params = setting(lambda w: torch.logsumexp(w * 2, 0).expand(6, 4))
    (base, (b, _), _) = params["weight"]
    x = normal(0, 3, 4)
    got = call(model, params, x, fallback="raise")
    weight = (2 * base).logsumexp(0) + 2 * b.sum()
    wanted = functional.linear(x, weight.expand(6, 4), params["bias"])
    torch.testing.assert_close(got, wanted, rtol=0, atol=64 * EPS)
    model.use = lambda w: torch.logsumexp(w, 1)
    with pytest.raises(NotImplementedError, match="`logsumexp` with these arguments"):
        call(model, params, x, fallback="raise")


@pytest.mark.usefixtures("registry")
def test_a_registered_rule_may_return_a_weight():
    def doubled(input):
        return input._replace(base=2 * input.base, factors=input.factors._replace(b=2 * input.factors.b))

    register_rule(torch.Tensor.exp2, doubled)
    model, params = setting(lambda w: w.exp2())
    wanted = call(setting(lambda w: w * 2)[0], params, normal(0, 3, 4))
    torch.testing.assert_close(call(model, params, normal(0, 3, 4), fallback="raise"), wanted, rtol=0, atol=64 * EPS)


@pytest.mark.usefixtures("registry")
def test_a_registered_rule_may_return_several_weights():
    register_rule(torch.Tensor.hsplit, lambda input, sections: (input,) * sections + (input.base.sum(),))
    model, params = setting(lambda w: w.hsplit(2)[1])
    wanted = call(setting(lambda w: w)[0], params, normal(0, 3, 4))
    assert_same(call(model, params, normal(0, 3, 4), fallback="raise"), wanted)


@pytest.mark.usefixtures("registry")
def test_a_rule_for_a_method_written_in_python_applies_in_compiled_code():
    def columns(input, p="fro", dim=None, keepdim=False, dtype=None):
        return input.base.norm(dim=dim) + input.factors.b.sum()

    register_rule(torch.Tensor.norm, columns)
    model, params = setting(lambda w: w.norm(dim=0).expand(6, 4))
    x = normal(0, 3, 4)
    eager = call(model, params, x, fallback="raise")
    compiled = torch.compile(partial(call, model), backend="eager", fullgraph=True)(params, x, fallback="raise")
    (base, (b, _), _) = params["weight"]
    wanted = functional.linear(x, (base.norm(dim=0) + b.sum()).expand(6, 4), params["bias"])
    torch.testing.assert_close(eager, wanted, rtol=0, atol=64 * EPS)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=64 * EPS)


@pytest.mark.usefixtures("registry")
def test_a_rule_gets_the_weights_in_a_list():
    class Stacks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Parameter(torch.zeros(4, 4).double()) for _ in range(2))

        def forward(self):
            return torch.vstack([self.first, self.second])

    model = Stacks()
    params = init(model, rank=2, seed=0, targets=["first", "second"], stack=False, dtype=torch.float64)
    register_rule(torch.vstack, lambda weights: torch.cat([materialize(weight) for weight in weights]))
    assert_same(call(model, params, fallback="raise"), torch.cat([materialize(param) for param in params.values()]))


@pytest.mark.usefixtures("registry")
def test_an_error_of_a_registered_rule_is_raised():
    register_rule(torch.logsumexp, lambda input, dim: (input.base,)[dim + 1])
    model, params = setting(lambda w: torch.logsumexp(w, 0).expand(6, 4))
    with pytest.raises(IndexError, match="tuple index out of range"):
        call(model, params, normal(0, 3, 4))


@pytest.mark.parametrize(("argument", "values"), [("operation", ("exp", abs)), ("rule", (torch.exp, None))])
def test_what_cannot_be_called_is_no_rule(argument, values):
    with pytest.raises(TypeError, match=f"`{argument}` is "):
        register_rule(*values)


def test_dense_weights_are_trained_full_rank():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 6, 3)).double()
    params = init(model, rank=2, seed=0, targets=["*.weight"], dtype=torch.float64)
    assert {"*.weight", "2.weight"} <= set(params)
    got = dense(params, ["*.weight"], model=model)
    assert set(got) == set(params)
    for name, shape in (("*.weight", (2, 4, 4)), ("2.weight", (6, 4, 3))):
        assert got[name].shape == shape
        torch.testing.assert_close(got[name], materialize(params[name]).reshape(shape), rtol=0, atol=0)
        assert isinstance(partition(got).trainable[name], torch.Tensor)
    x = normal(0, 4, 4)
    torch.testing.assert_close(call(model, got, x), call(model, params, x), rtol=0, atol=256 * EPS)
    assert dense(params, ["2.bias"])["2.weight"] is params["2.weight"]


def test_dense_keeps_the_dtype_of_the_base_and_refuses_unknown_names():
    params = init(nn.Linear(4, 4, dtype=torch.bfloat16), rank=2, seed=0, targets=["weight"])
    assert dense(params, ["weight"])["weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`names` contains 'wieght'"):
        dense(params, ["wieght"])
    with pytest.raises(ValueError, match="`params` has 'weight', which the model does not have"):
        dense(params, ["weight"], model=nn.Sequential(nn.Linear(4, 4)))

"""What the dense weight answers, what is said about it, and what is refused in any case."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional

import dynlora_fn as dl
from dynlora_fn import call, combine, init, materialize, partition, remat, value_and_grad
from dynlora_fn.nn import DenseUse, dense, register_rule
from dynlora_fn.nn._register import REGISTERED
from dynlora_fn.testing import assert_same, normal

EPS = torch.finfo(torch.float64).eps


class Layer(nn.Linear):
    """A linear layer that passes its weight to a function first."""

    def __init__(self, use, out_features=6):
        super().__init__(4, out_features, dtype=torch.float64)
        self.use = use

    def forward(self, x):
        return functional.linear(x, self.use(self.weight), self.bias)


def setting(use):
    torch.manual_seed(0)
    model = Layer(use)
    return model, init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64)


def named(name, use):
    """Return a model whose low-rank weight has a name of its own, since each is warned about once."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, Layer(use))

        def forward(self, x):
            return self.get_submodule(name)(x)

    torch.manual_seed(0)
    model = Outer()
    return model, init(model, rank=2, seed=0, targets=["*.weight"], dtype=torch.float64)


def gradients(model, params, *args, via="func", **kwargs):
    trainable, frozen = partition(params)
    return value_and_grad(lambda tree: call(model, combine(tree, frozen), *args, **kwargs).square().sum(), via=via)(
        trainable
    )


# --- the warning


def test_it_is_said_once_for_each_weight_and_operation():
    model, params = named("said", lambda w: w.tanh().tanh() + w.cos())
    x = normal(0, 3, 4)
    with pytest.warns(UserWarning, match="low-rank weight") as caught:
        call(model, params, x)
    text = sorted(str(warning.message) for warning in caught)
    assert [message.split(",")[0] for message in text] == [
        f"low-rank weight 'said.weight' is made dense for `{operation}`" for operation in ("cos", "tanh")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, params, x)


def test_a_warning_that_is_an_error_stays_one():
    model, params = named("filtered", torch.tanh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match=r"'filtered.weight'.*`tanh`"):
                call(model, params, normal(0, 3, 4))


def test_it_is_said_while_a_step_is_compiled():
    model, params = named("compiled", torch.tanh)
    step = torch.compile(lambda x: call(model, params, x), backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"'compiled.weight'.*`tanh`"):
        step(normal(0, 3, 4))


def test_explain_names_weights_and_operations():
    model, params = named("explained", lambda w: w.tanh() + w.tanh() + (w + 1.0))
    model.register_buffer("steps", torch.tensor(0.0))
    explanation = dl.explain(params, tokens=3, model=model, args=(normal(0, 3, 4),))
    assert explanation.dense == [DenseUse("explained.weight", "tanh"), DenseUse("explained.weight", "add")]
    assert "explained.weight is made dense for `tanh`" in str(explanation)
    assert dl.explain(params, tokens=3).dense == []


def test_explain_changes_no_buffer_and_no_random_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    params, before, state = (
        init(model, rank=2, seed=0, targets=["0.weight"]),
        copy.deepcopy(model),
        torch.get_rng_state(),
    )
    dl.explain(params, tokens=3, model=model, args=(torch.ones(3, 4),))
    assert_same(dict(model.named_buffers()), dict(before.named_buffers()))
    assert_same(torch.get_rng_state(), state)


# --- refused


def test_an_unknown_fallback_is_refused():
    model, params = setting(torch.tanh)
    with pytest.raises(ValueError, match=r"`fallback` .* 'silent'"):
        call(model, params, normal(0, 3, 4), fallback="silent")


@pytest.mark.filterwarnings("ignore:low-rank weight")
def test_remat_passes_the_fallback_on():
    model, params = named("block", torch.tanh)
    x = normal(0, 3, 4)
    assert_same(call(remat(model, ["block"]), params, x), call(model, params, x))
    with pytest.raises(NotImplementedError, match=r"'weight'.*`tanh`"):
        call(remat(model, ["block"]), params, x, fallback="raise")


def fill(w):
    w.data = torch.zeros(6, 4)


def change_item(w):
    w[0] = 0


def delete_gradient(w):
    del w.grad


def multiply_in_place(w):
    w *= 2


IN_PLACE = {
    "mul_": lambda w: w.mul_(2),
    "mul_ or __imul__": multiply_in_place,
    "__setitem__": change_item,
    "data": fill,
    "grad": delete_gradient,
    "copy_": lambda w: w.copy_(torch.zeros(6, 4)),
    "clamp_": lambda w: w.data.clamp_(-1, 1),
    "zero_": lambda w: w.detach().zero_(),
    "add_": lambda w: w.T.add_(1),
    "fill_": lambda w: nn.init.constant_(w, 1.0),
    "relu": lambda w: functional.relu(w, inplace=True),
    "dropout": lambda w: functional.dropout(w, 0.5, True, True),
    "relu_": torch.relu_,
    "add": lambda w: torch.add(torch.ones(6, 4), 1, out=w),
    "sort": lambda w: torch.sort(torch.ones(6, 4), out=(w, torch.ones(6, 4).long())),
    "embedding": lambda w: functional.embedding(torch.tensor([1]), w, max_norm=1.0),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "_foreach_add_": lambda w: torch._foreach_add_([w], 1.0),
    "aten.mul_": lambda w: torch.ops.aten.mul_(w, 2),
    "aten.add.out": lambda w: torch.ops.aten.add.out(torch.ones(6, 4), torch.ones(6, 4), out=w),
}
BOUND = {
    "data_ptr": lambda w: w.data_ptr(),
    "untyped_storage": lambda w: w.untyped_storage(),
    "register_hook": lambda w: w.register_hook(print),
    "retain_grad": lambda w: w.retain_grad(),
    "backward": lambda w: w.backward(),
    "as_strided": lambda w: w.T.as_strided((4, 6), (1, 4)),
    "autograd.grad": lambda w: torch.autograd.grad(functional.linear(normal(1, 5, 4), w).sum(), w, allow_unused=True),
    "autograd.grad by keyword": lambda w: torch.autograd.grad(outputs=(w @ normal(1, 4)).sum(), inputs=[w]),
}


@pytest.mark.parametrize("name", IN_PLACE | BOUND)
@pytest.mark.parametrize("fallback", ["dense", "raise"])
def test_an_effect_that_would_be_lost_is_refused(name, fallback):
    use = (IN_PLACE | BOUND)[name]
    model, params = setting(use)
    reason = "changes it in place" if name in IN_PLACE else "needs its memory or its place in the autograd graph"
    with pytest.raises(NotImplementedError, match=rf"low-rank weight 'weight' is used in `.*`, which {reason}"):
        call(model, params, normal(0, 3, 4), fallback=fallback)


@pytest.mark.filterwarnings("ignore:low-rank weight")
def test_other_tensors_may_be_changed_in_place():
    def use(w):
        total = torch.zeros(6, 4, dtype=torch.float64)
        total += w
        total[0] = w[0]
        return total.add_(w).mul_(0.5)

    model, params = setting(use)
    wanted = functional_call(model, materialize(params), (normal(0, 3, 4),))
    torch.testing.assert_close(call(model, params, normal(0, 3, 4)), wanted, rtol=0, atol=64 * EPS)


# --- arguments in containers, and modules of torch


@pytest.mark.filterwarnings("ignore:low-rank weight")
@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize(
    "kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.ConvTranspose1d, nn.Bilinear, nn.EmbeddingBag]
)
def test_layers_of_torch_train_all_their_weights(kind, via):
    torch.manual_seed(0)
    sizes = {nn.ConvTranspose1d: (4, 6, 3), nn.Bilinear: (4, 4, 6)}.get(kind, (4, 6))
    model = nn.Sequential(kind(*sizes, dtype=torch.float64))
    x = normal(0, 2, 4, 4) if kind is nn.ConvTranspose1d else normal(0, 5, 4)
    args = (torch.tensor([[1, 2], [3, 0]]),) if kind is nn.EmbeddingBag else (x, x) if kind is nn.Bilinear else (x,)
    params = init(model, rank=2, seed=0, targets=["0.weight*"], dtype=torch.float64)

    def output(parameters, run):
        result = run(model[0], {name.removeprefix("0."): leaf for name, leaf in parameters.items()}, *args)
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    trainable, frozen = partition(params)
    got = value_and_grad(lambda tree: output(combine(tree, frozen), call), via=via)(trainable)

    def run_dense(layer, parameters, *args):
        shapes = {name: leaf.shape for name, leaf in layer.named_parameters()}
        dense = {name: leaf.reshape(shapes[name]) for name, leaf in parameters.items()}
        return functional_call(layer, dense, args)

    wanted = value_and_grad(lambda tree: output(materialize(combine(tree, frozen)), run_dense), via="autograd")(
        trainable
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:low-rank weight")
def test_a_weight_below_torch_function_keeps_its_gradient_by_autograd():
    def use(w):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.mul(w, 2.0)

    model, params = setting(use)
    got, wanted = (
        gradients(kind, params, normal(0, 3, 4), via="autograd") for kind in (model, setting(lambda w: w * 2)[0])
    )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(NotImplementedError, match=r"'weight'.*`mul.Tensor`, which does not pass `torch.func`"):
        gradients(model, params, normal(0, 3, 4))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return 2 * w * grad


@pytest.mark.filterwarnings("ignore:low-rank weight")
def test_a_custom_function_has_second_derivatives_by_autograd():
    model, params = setting(Square.apply)
    leaves = [leaf.requires_grad_() for leaf in partition(params).trainable["weight"]]

    def second(run):
        (first,) = torch.autograd.grad(run().square().sum(), leaves[:1], create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaves)

    x = normal(0, 3, 4)
    wanted = second(lambda: functional_call(model, materialize(params), (x,)))
    torch.testing.assert_close(second(lambda: call(model, params, x)), wanted, rtol=1e-9, atol=1e-9)


# --- rules of users, and dense weights


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


# --- what a module reads


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

"""What the dense weight answers, what is said about it, and what is refused in any case."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import dynlora_fn as dl
from dynlora_fn import call, combine, init, materialize, partition, remat, value_and_grad
from dynlora_fn.nn import DenseUse
from dynlora_fn.testing import assert_same, normal
from tests.support.weight_layers import EPS, gradients, named, setting

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


def test_explain_runs_a_model_that_assigns_buffers():
    class Assigns(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.mean, self.first = y.mean(0), y[0]
            return y - self.mean

    model = Assigns(4, 4)
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("first", None)
    mean, params = model.mean, init(model, rank=2, seed=0, targets=["weight"])
    assert dl.explain(params, tokens=3, model=model, args=(torch.ones(3, 4),)).dense == []
    assert model.mean is mean
    assert not mean.any()
    assert model.first is None


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

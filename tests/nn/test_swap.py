"""`call` leaves a model as it found it, whatever the model does."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynlora_fn import call, checkpoint_contexts, combine, compile_step, init, partition, remat, value_and_grad
from dynlora_fn.nn._swap import modules_of, places_of
from dynlora_fn.testing import assert_same, normal
from tests.support.modules import assert_restored, state_of


def low_rank_of(model, **settings):
    return init(model, **{"rank": 2, "seed": 0, "targets": [nn.Linear], "dtype": torch.float64, **settings})


def other_params(model, scale=2.0):
    """Return parameters of another model: all values times `scale`."""
    params = {name: parameter.detach() * scale for name, parameter in model.named_parameters()}
    return init(params, rank=2, seed=0, targets=["*weight"], dtype=torch.float64, stack=False)


def at_two_paths():
    layer = nn.Linear(4, 4).double()
    return nn.Sequential(layer, nn.Tanh(), layer)


class TwoNames(nn.Module):
    """One parameter under two names of one module."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Parameter(normal(0, 4, 4))

    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.first).tanh(), self.second)


def nested_at_two_paths():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    return nn.ModuleDict({"stem": block, "layers": nn.ModuleList([nn.Sequential(block, nn.Linear(4, 4).double())])})


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nested_at_two_paths()

    def forward(self, x):
        return self.parts["layers"][0](self.parts["stem"](x))


def with_buffers():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False))
    model.register_buffer("filled_later", None)
    model[2].register_parameter("absent", None)
    return model.append(model[1])


@pytest.mark.parametrize("make", [at_two_paths, TwoNames, nested_at_two_paths, Nested, with_buffers])
def test_each_module_has_its_slots_under_its_first_path_and_its_names_under_all(make):
    model = make()
    slots, names = places_of(modules_of(model))
    wanted = [
        (f"{path}.{key}" if path else key, module, key)
        for path, module in model.named_modules()
        for key in (*[key for key, tensor in module._parameters.items() if tensor is not None], *module._buffers)
    ]
    assert [(slot.name, slot.module, slot.key) for slot in slots] == wanted
    assert all(slot.tensor is getattr(slot.module, slot.key) for slot in slots)
    assert [slot.is_buffer for slot in slots] == [slot.key in slot.module._buffers for slot in slots]
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    assert names.keys() == dict(named).keys()
    assert all(names[name] is tensor for name, tensor in named)


@pytest.mark.parametrize("make", [at_two_paths, Nested])
def test_a_module_at_two_paths_is_put_back_once(make):
    model, x = make(), normal(1, 3, 4)
    before, output = state_of(model), model(x).detach()
    params = other_params(model)
    got = call(model, params, x)
    assert_restored(model, before)
    assert_same(model(x).detach(), output)
    twice = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(got, twice(x).detach(), rtol=0, atol=1e-14)  # a dozen roundings of numbers near 1


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_tied_parameter_has_one_weight_under_any_name(name):
    model, x = TwoNames(), normal(1, 3, 4)
    params = init(model, rank=2, seed=0, targets=["*"], dtype=torch.float64)
    before = state_of(model)
    torch.testing.assert_close(call(model, {name: params["first"]}, x), model(x).detach(), rtol=0, atol=1e-14)
    assert_restored(model, before)
    with pytest.raises(ValueError, match=r"different weights for 'first' and 'second', which are tied; pass only one"):
        call(model, {"first": params["first"], "second": torch.zeros(4, 4)}, x)
    assert_restored(model, before)


def test_a_module_at_two_paths_has_its_weights_under_both():
    model, x = Nested(), normal(1, 3, 4)
    params = other_params(model)
    got = call(model, params, x)
    first, second = "parts.stem.0.weight", "parts.layers.0.0.0.weight"
    assert_same(call(model, {second if name == first else name: param for name, param in params.items()}, x), got)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_module_at_two_paths_is_called_twice_in_one_step(backend):
    model, x = at_two_paths(), normal(1, 3, 4)
    trainable, frozen = partition(low_rank_of(model))

    def step(state):
        first = value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum())(state)
        second = value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum())(state)
        return state, (first.value, second.value)

    before = state_of(model)
    first, second = (compile_step(step, donate=False, backend=backend) if backend else step)(trainable)[1]
    assert_same(first, second)
    torch.testing.assert_close(first, model(x).square().sum().detach(), rtol=1e-13, atol=0)
    assert_restored(model, before)


def test_a_recomputed_module_at_two_paths_is_put_back():
    model, x = at_two_paths(), normal(1, 3, 4)
    before, (trainable, frozen) = state_of(model), partition(low_rank_of(model))
    again = remat(model, ["0"])
    assert again[0] is again[2]

    def grads(net):
        return value_and_grad(lambda tree: call(net, combine(tree, frozen), x).square().sum())(trainable)

    assert_same(tuple(grads(again)), tuple(grads(model)))
    assert_restored(model, before)


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.map = error, nn.Linear(4, 4).double()

    def forward(self, x):
        self.map(x)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, SystemExit, StopIteration, ZeroDivisionError])
def test_parameters_are_put_back_after_any_exception(error):
    model = nn.Sequential(nn.Linear(4, 4).double(), Fails(error))
    before = state_of(model)
    with pytest.raises((error, RuntimeError)):
        call(model, other_params(model), normal(1, 3, 4))
    assert_restored(model, before)


def test_an_lstm_keeps_its_list_of_weights():
    model, x = nn.LSTM(4, 3).double(), normal(1, 5, 4)
    output = model(x)[0].detach()
    call(model, {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}, x)
    assert all(
        weight is model._parameters[name]
        for name, weight in zip(model._flat_weights_names, model._flat_weights, strict=True)
    )
    assert_same(copy.deepcopy(model)(x)[0].detach(), output)


def test_a_recurrent_layer_does_not_move_passed_weights():
    """A stand-in for CUDA, where `flatten_parameters` moves all weights of a layer into one memory."""

    class Flattens(nn.LSTM):
        def flatten_parameters(self):
            for weight in self._flat_weights:
                weight.data_ptr()
            flattened.append(self)

    flattened = []
    model, x = Flattens(4, 3).double(), normal(1, 5, 4)
    params, count = init(model, rank=2, seed=0, targets=["weight_*"], dtype=torch.float64), len(flattened)
    got = call(model, params, x)[0]
    assert len(flattened) == count
    torch.testing.assert_close(got, model(x)[0], rtol=1e-12, atol=1e-12)
    assert len(flattened) > count  # as before, when the model is called directly


class Lazily(nn.Linear):
    def forward(self, x):
        yield super().forward(x)


def test_a_generator_is_refused():
    model = Lazily(4, 4).double()
    with pytest.raises(NotImplementedError, match="`model` returns a generator, which would run with the para"):
        call(model, low_rank_of(model), normal(1, 3, 4))


class Averages(nn.Module):
    """A layer that keeps an average, and writes it in place or assigns it."""

    def __init__(self, *, in_place):
        super().__init__()
        self.map, self.in_place = nn.Linear(4, 4).double(), in_place
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        y = self.map(x)
        mean = (self.mean + y.mean()) / 2
        if self.in_place:
            self.mean.copy_(mean.detach())
        else:
            self.mean = mean.detach()
        return y


@pytest.mark.parametrize("in_place", [True, False])
def test_a_buffer_keeps_what_the_model_writes(in_place):
    model, x = Averages(in_place=in_place), normal(1, 3, 4)
    direct = copy.deepcopy(model)
    trainable, frozen = partition(low_rank_of(model))
    for _ in range(2):
        value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum(), via="autograd")(trainable)
        direct(x)
    torch.testing.assert_close(model.mean, direct.mean, rtol=1e-13, atol=0)
    assert model.mean.any()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_buffer_that_would_be_lost_is_refused_by_name(backend):
    model, x = nn.Sequential(Averages(in_place=False)), normal(1, 3, 4)
    before, (trainable, frozen) = state_of(model), partition(low_rank_of(model))

    def step(state):
        return state, value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum())(state).value

    error = NotImplementedError if backend is None else torch._dynamo.exc.TorchDynamoException
    with pytest.raises(error, match=r"`model` assigns the buffer '0\.mean' in its forward pass"):
        (compile_step(step, donate=False, backend=backend) if backend else step)(trainable)
    assert_restored(model, before)


def test_a_buffer_that_gets_a_gradient_is_refused_by_name():
    """Each call would extend the graph of the one before."""

    class Accumulates(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            self.total.add_(y.sum())
            return y

    model, x = Accumulates(4, 4).double(), normal(1, 3, 4)
    model.register_buffer("total", torch.zeros((), dtype=torch.float64))
    trainable, frozen = partition(low_rank_of(model))
    with pytest.raises(NotImplementedError, match=r"`model` writes a value that requires a gradient into .* 'total'"):
        value_and_grad(lambda tree: call(model, combine(tree, frozen), x).sum())(trainable)
    assert not model.total.requires_grad


class Fills(nn.Linear):
    """A layer that assigns a buffer which has no tensor at first."""

    def __init__(self, value):
        super().__init__(4, 4)
        self.value = value
        self.register_buffer("cache", None)

    def forward(self, x):
        y = super().forward(x)
        if self.cache is None:
            self.cache = self.value(x, y)
        return y * self.cache


@pytest.mark.parametrize("differentiate", [value_and_grad, torch.func.grad])
def test_an_empty_buffer_is_filled_but_not_with_a_gradient(differentiate):
    model, x = Fills(lambda x, y: y.mean(0)).double(), normal(1, 3, 4)
    trainable, frozen = partition(low_rank_of(model))

    def loss_fn(tree):
        return call(model, combine(tree, frozen), x).square().sum()

    with pytest.raises(NotImplementedError, match="assigns the buffer 'cache'"):
        differentiate(loss_fn)(trainable)
    assert model.cache is None
    model.value = lambda x, y: x.mean(0)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="assigns the buffer 'cache'"):
        torch.compile(loss_fn, backend="eager", fullgraph=True)(trainable)  # the next call would not find it
    value_and_grad(loss_fn)(trainable)
    assert_same(model.cache, x.mean(0))


def test_a_buffer_of_one_sample_is_refused():
    model, x = Averages(in_place=False), normal(1, 3, 4)
    before, params = state_of(model), low_rank_of(model)
    with pytest.raises(NotImplementedError, match="assigns the buffer 'mean'"):
        torch.vmap(lambda row: call(model, params, row))(x)
    assert_restored(model, before)


def test_a_recomputed_block_does_not_assign_its_buffer():
    model, x = nn.Sequential(Averages(in_place=False)), normal(1, 3, 4)
    before = state_of(model)
    with pytest.raises(NotImplementedError, match="assigns the buffer 'mean'"):
        call(remat(model, ["0"]), low_rank_of(model), x)
    assert_restored(model, before)


class Assigns(nn.Linear):
    def forward(self, x):
        self.weight = nn.Parameter(torch.zeros_like(self.bias[:, None] * self.bias))
        return super().forward(x)


def test_a_parameter_that_the_model_assigns_is_refused_by_name():
    model = nn.Sequential(Assigns(4, 4).double())
    before = state_of(model)
    with pytest.raises(NotImplementedError, match=r"`model` assigns the parameter '0\.weight' in its forward pass"):
        call(model, other_params(model), normal(1, 3, 4))
    assert_restored(model, before)


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_batch_norm_trains_outside_of_transforms(via):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double(), normal(1, 5, 4)
    direct = copy.deepcopy(model)
    trainable, frozen = partition(low_rank_of(model))
    value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum(), via=via)(trainable)
    direct(x)
    for name, buffer in direct.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-13, atol=0)


class CallsItself(nn.Module):
    """A model whose forward pass calls a submodule with other parameters, once deep."""

    def __init__(self):
        super().__init__()
        self.map, self.other = nn.Linear(4, 4).double(), None

    def forward(self, x):
        inner = call(self.map, self.other, x) if self.other else 0
        return self.map(x) + inner


def test_a_call_inside_a_call_puts_back_the_outer_parameters():
    model, x = CallsItself(), normal(1, 3, 4)
    before = state_of(model)
    model.other = {name: tensor.detach() * 3 for name, tensor in model.map.named_parameters()}
    got = call(model, {name: tensor.detach() * 2 for name, tensor in model.named_parameters()}, x)
    torch.testing.assert_close(got, 5 * model.map(x).detach(), rtol=0, atol=1e-13)
    assert_restored(model, before)


class Forces(nn.Module):
    """A model that differentiates inside its forward pass, with a checkpoint that is computed again there."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4).double()
        self.contexts = checkpoint_contexts(self)

    def energy(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.map(x).tanh().sum(), x, use_reentrant=False, context_fn=self.contexts)

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (force,) = torch.autograd.grad(self.energy(x), x)
        return force


def test_a_block_may_be_computed_again_inside_the_forward_pass():
    model, x = Forces(), normal(1, 3, 4)
    params = {name: tensor.detach() * 2 for name, tensor in model.named_parameters()}
    twice = copy.deepcopy(model)
    twice.contexts = checkpoint_contexts(twice)
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(call(model, params, x), twice(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(1,), (4, 1), ()])
def test_a_full_rank_tensor_of_another_shape_is_refused(shape):
    model = nn.Linear(4, 4).double()
    params = {**low_rank_of(model), "bias": torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"`params` has shape .* for 'bias', which does not fit .* shape \(4,\)"):
        call(model, params, normal(1, 3, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_submodule_is_refused():
    model = nn.Sequential(torch.jit.trace(nn.Linear(4, 4).double(), normal(1, 3, 4)))
    with pytest.raises(ValueError, match="submodule '0' of `model` is a ScriptModule"):
        call(model, {name: tensor.detach() for name, tensor in model.named_parameters()}, normal(1, 3, 4))


def test_a_cache_of_parametrized_weights_has_those_of_the_call():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))).double()
    x, params = normal(1, 3, 4), {name: 2 * tensor.detach() for name, tensor in model.named_parameters()}
    wanted, own = call(model, params, x), model(x)
    with nn.utils.parametrize.cached():
        assert_same(model(x), own)
        assert_same(call(model, params, x), wanted)
        assert_same(model(x), own)

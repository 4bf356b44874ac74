"""Blocks of every kind have the values and gradients of the model without recomputation, or are refused by name."""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dynlora_fn import call, combine, compile_step, init, partition, remat, value_and_grad
from dynlora_fn.testing import assert_same, normal

X = normal(1, 5, 4)


class Block(nn.Module):
    """A layer between two functions, which stand for what a model does before and after it."""

    def __init__(self, before=lambda x: x, after=lambda x: x):
        super().__init__()
        self.layer, self.before, self.after = nn.Linear(4, 4), before, after

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


def network(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), *blocks).double()
    with torch.no_grad():
        for at, parameter in enumerate(net.parameters()):
            parameter.copy_(normal(at, *parameter.shape))
    return net


def gradients(model: nn.Module, via: str = "func", backend: str | None = None):
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=[nn.Linear], stack=False, dtype=torch.float64))

    def step(tree, x):
        result = value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum(), via=via)(tree)
        return tree, (result.value, result.grads)

    return (compile_step(step, donate=False, backend=backend) if backend else step)(trainable, X)[1]


def assert_equal(make, blocks=("1",), prepare=lambda model: None, **options):
    models = [make(), remat(make(), blocks)]
    for model in models:
        prepare(model)
    wanted, got = (gradients(model, **options) for model in models)
    assert_same(got, wanted)
    for left, right in zip(models[1].buffers(), models[0].buffers(), strict=True):
        assert_same(left, right)


class Pair(NamedTuple):
    hidden: Tensor
    other: Tensor


@dataclass
class Box:
    x: Tensor


RESULTS = {
    "list": (lambda h: [h, h * 2], lambda o: o[0] + o[1]),
    "dict": (lambda h: {"h": h, "g": h * 2}, lambda o: o["h"] + o["g"]),
    "nested": (lambda h: (h, [h * 2, (h * 3, None)]), lambda o: o[0] + o[1][0] * o[1][1][0]),
    "named": (lambda h: Pair(h, h * 2), lambda o: o.hidden + o.other),
    "none": (lambda h: (None, h), lambda o: o[1]),
    "number": (lambda h: (h, 3), lambda o: o[0] * o[1]),
    "integers first": (lambda h: (h.argmax(-1), h), lambda o: o[1] + o[0][:, None]),
    "unused": (lambda h: (h, h * 2), lambda o: o[1]),
    "twice": (lambda h: (h, h), lambda o: o[0] * o[1]),
    "view, changed in place": (lambda h: h.T, lambda o: o.mul_(2).T),
}


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize("name", RESULTS)
def test_a_block_returns_what_it_returns(name, via):
    after, before = RESULTS[name]
    assert_equal(lambda: network(Block(after=after), Block(before=before)), via=via)


@pytest.mark.parametrize("name", ["list", "nested", "none"])
def test_a_compiled_block_returns_what_it_returns(name):
    after, before = RESULTS[name]
    assert_equal(lambda: network(Block(after=after), Block(before=before)), backend="aot_eager")


@pytest.mark.parametrize("name", ["none", "integers first"])
def test_gradients_of_gradients_pass_what_is_no_floating_result(name):
    after, before = RESULTS[name]

    def curvature(model):
        params = {key: parameter.detach() for key, parameter in model.named_parameters()}
        slope = torch.func.grad(lambda tree: call(model, tree, X).square().sum())
        return torch.func.grad(lambda tree: sum(leaf.square().sum() for leaf in slope(tree).values()))(params)

    wanted, got = (
        curvature(model)
        for net in [network(Block(after=after), Block(before=before))]
        for model in (net, remat(net, ["1"]))
    )
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [nn.Identity(), nn.Flatten(0), nn.Tanh()])
def test_a_block_may_return_its_input(block):
    assert_equal(lambda: network(block, Block(before=lambda x: x.reshape(5, 4))))


class Keywords(nn.Module):
    def forward(self, *, x=None):
        return torch.ones(4).double() if x is None else x.tanh()


@pytest.mark.parametrize("has_tensor", [True, False])
def test_a_block_without_parameters_is_called_by_keyword(has_tensor):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Keywords()

        def forward(self, x):
            return self.inner(x=x) if has_tensor else x * self.inner()

    assert_equal(lambda: network(Outer(), Block()), blocks=["1.inner"])


HOOKS = {
    "after": lambda block: block.register_forward_hook(lambda module, args, output: output * 2 + 1),
    "before": lambda block: block.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 1,)),
    "keywords": lambda block: block.register_forward_hook(lambda module, args, kwargs, y: y * 2, with_kwargs=True),
    "gradient": lambda block: block.register_full_backward_hook(lambda module, grads, _: (grads[0] * 2,)),
}


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_a_block_apply_once(name, via):
    def make(on_result=False):
        net = network(Block(), Block())
        HOOKS[name](net[1])
        return net

    assert_equal(make, via=via)
    assert_equal(lambda: network(Block(), Block()), prepare=lambda net: HOOKS[name](net[1]), via=via)


def test_a_forward_pass_of_the_instance_is_computed_again():
    count = []

    def make():
        net = network(Block(), Block())
        forward = net[1].forward
        net[1].forward = lambda x: count.append(1) or forward(x) * 3
        return net

    assert_equal(make)
    assert len(count) == 1 + 2


def test_what_a_block_does_when_it_is_called_applies_once():
    class Called(Block):
        def __call__(self, x):
            return super().__call__(x) * 3

    assert_equal(lambda: network(Called(), Block()))


class Doubles(Block):
    def forward(self, x):
        return functional.dropout(super().forward(x), 0.5) if self.training else super().forward(x) * 2


@pytest.mark.parametrize("prepare", [lambda net: net.eval(), lambda net: setattr(net[1], "training", False)])
def test_a_block_is_set_to_evaluation(prepare):
    assert_equal(lambda: network(Doubles(), Block()), prepare=prepare)
    assert_equal(lambda: network(Doubles(), Block()), prepare=prepare, backend="aot_eager")


def test_a_copy_computes_its_own_modules():
    net = remat(network(Doubles(), Block()), ["1"])
    twin = copy.deepcopy(net)
    twin.eval()
    assert net[1].training
    wanted = gradients(network(Doubles(), Block()).eval())
    del net
    assert_same(gradients(twin), wanted)


class Averages(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        y = super().forward(x) / self.mean.clone()
        self.mean.mul_(0.5).add_(y.detach().abs().mean(0))
        return y


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize(
    "make", [lambda: nn.BatchNorm1d(4), Averages, lambda: nn.Sequential(Block(), nn.BatchNorm1d(4))]
)
def test_a_block_writes_its_buffers_once(make, via):
    model, again = network(make(), Block()), remat(network(make(), Block()), ["1"])
    for _ in range(3):
        assert_same(gradients(again, via), gradients(model, via))
        assert_same(list(again.buffers()), list(model.buffers()))


def test_a_block_may_run_twice_before_its_gradients():
    model, again = network(Averages()), remat(network(Averages()), ["1"])

    def value(net):
        params = {key: parameter.detach() for key, parameter in net.named_parameters()}
        return value_and_grad(lambda tree: (call(net, tree, X) * call(net, tree, 2 * X)).sum())(params)

    assert_same(tuple(value(again)), tuple(value(model)))


class Outer(nn.Module):
    """Two blocks that share what `kind` makes."""

    def __init__(self, kind, use):
        super().__init__()
        self.kind, self.use, self.first = kind, use, nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Inner(use), Inner(use)])

    def forward(self, x):
        shared = self.kind(self.first(x))
        for block in self.blocks:
            x = block(x, shared)
        return x


class Inner(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(4, 4), use

    def forward(self, x, shared):
        return self.use(self.layer(x), shared)


def change(x, shared):
    shared["x"] = x
    return x


def change_object(x, shared):
    shared.x = x
    return x


@pytest.mark.parametrize(
    ("kind", "use", "message"),
    [
        (lambda x: [], lambda x, shared: shared.append(x) or sum(shared), "an Inner that changes a list or dict"),
        (lambda x: {}, change, "changes a list or dict"),
        (Box, lambda x, shared: x * shared.x, "gets a Box with a tensor that requires a gradient"),
        (lambda x: Box(x.detach()), change_object, "changes a Box that it gets, .* use_cache=False"),
        (lambda x: x, lambda x, shared: Box(x), "returns a Box with tensors"),
        (lambda x: x * 1, lambda x, shared: shared.mul_(2) + x, "changes its argument in place"),
    ],
)
def test_what_would_lose_a_gradient_is_refused(kind, use, message):
    net = remat(network(Outer(kind, use)), ["1.blocks.*"])
    with pytest.raises(NotImplementedError, match=message.replace("an Inner", "a Inner")):
        gradients(net)


def test_a_cache_may_be_written_without_gradients():
    model = network(Outer(lambda x: [], lambda x, shared: shared.append(x) or sum(shared)))
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        assert_same(call(remat(model, ["1.blocks.*"]), params, X), call(model, params, X))


def test_blocks_may_be_nested_and_repeated():
    wanted = gradients(network(nn.Sequential(Block(), Block())))
    assert_same(gradients(remat(network(nn.Sequential(Block(), Block())), ["1", "1.0"])), wanted)
    assert_same(gradients(remat(remat(network(nn.Sequential(Block(), Block())), ["1"]), ["1"])), wanted)

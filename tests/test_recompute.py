"""Blocks that are computed again: the same values and gradients by either route, eager and in one graph."""

import pytest
import torch
from test_gathers import waits_for
from torch import nn
from torch._inductor.fx_passes.post_grad import reorder_for_locality
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.utils._pytree import tree_leaves

from dynlora_fn import call, combine, compile_step, init, linear, partition, remat, value_and_grad
from dynlora_fn.compile._order_remat_blocks import compute_in_turn
from dynlora_fn.testing import assert_same, normal

X = normal(1, 2, 5, 8)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("shift", torch.ones(8))
        self.drop = 0.0

    def forward(self, x, *, scale):
        heads = self.norm(x).unflatten(-1, (2, 4)).transpose(-2, -3)
        mixed = scaled_dot_product_attention(heads, heads, heads).transpose(-2, -3).flatten(-2)
        return x + dropout(self.layer(mixed).tanh() * scale + self.shift, self.drop) if self.drop else (
            x + self.layer(mixed).tanh() * scale + self.shift
        )  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.layers:
            x = block(x, scale=0.5)
        return self.head(x)


def make() -> tuple[nn.Module, dict, dict]:
    torch.manual_seed(0)
    model = Net().double()
    params = init(model, rank=2, seed=0, targets=["*.layer.weight"], dtype=torch.float64)
    return model, *partition(params)


def gradients(model, trainable, frozen, via="func", backend=None):
    x = normal(1, 2, 5, 8)

    def step(trainable, x):
        return trainable, tuple(
            value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().mean(), via=via)(trainable)
        )

    return (compile_step(step, donate=False, backend=backend) if backend else step)(trainable, x)[1]


@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("via", ["func", "autograd"])
def test_gradients_are_the_same_bit_for_bit(via, backend):
    model, trainable, frozen = make()
    wanted = gradients(model, trainable, frozen, via, backend)
    assert_same(gradients(remat(model, ["layers.*"]), trainable, frozen, via, backend), wanted)


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_block_is_computed_twice_and_the_rest_once(via, monkeypatch):
    model, trainable, frozen = make()
    shapes = []
    monkeypatch.setattr(products, "contract", lambda x, *rest: shapes.append(x.shape) or linear(x, *rest))
    gradients(remat(model, ["layers.[01]"]), trainable, frozen, via)
    assert len(shapes) == 3 + 2


def test_a_block_waits_for_the_gradient_that_reaches_it():
    """In the graph: else a compiler is free to compute it again at once, and to keep what it finds."""
    model, trainable, frozen = make()
    again = remat(model, ["layers.*"])
    loss = torch.func.grad(lambda tree, x: call(again, combine(tree, frozen), x).square().mean())
    nodes = make_fx(loss)(trainable, X).graph.nodes
    waiting = [node for node in nodes if node.target is torch.ops.dynlora_fn.late.default]
    assert len(waiting) == 3
    assert [ancestors(node.args[0]) < ancestors(node.args[1]) for node in waiting] == [True] * 3


def test_a_block_waits_for_all_that_is_made_of_the_one_after_it():
    """Whatever order the graph is written in: the gradients of that block's parameters keep what they are made of."""
    model, trainable, frozen = make()
    again = remat(model, ["layers.*"])
    loss = torch.func.grad(lambda tree, x: call(again, combine(tree, frozen), x).square().mean())
    made = make_fx(loss)(trainable, X)
    wanted = made(trainable, X)
    reorder_for_locality(made.graph)  # as Inductor does: gradients move to where they are put together
    late = [node for node in made.graph.nodes if node.target is torch.ops.dynlora_fn.late.default]
    products = [node for node in made.graph.nodes if node.target is torch.ops.aten.mm.default]
    own = [
        {node for node in products if one in waits_for(node) and not later & waits_for(node)}
        for one, later in zip(late, ({*late[1:]}, {late[2]}, set()), strict=True)
    ]
    assert all(not products <= waits_for(one) for products, one in zip(own, late[1:], strict=False))
    compute_in_turn(made.graph)
    made.graph.lint()
    after = [node for node in made.graph.nodes if node.target is torch.ops.dynlora_fn.after.default]
    assert len(after) == 3
    assert not any(products & waits_for(after[0]) for products in own)
    for products, one in zip(own, after[1:], strict=False):
        assert len(products) > 2
        assert products <= waits_for(one)
    made.recompile()
    assert_same(made(trainable, X), wanted)


def ancestors(node) -> set:
    return {node}.union(*(ancestors(source) for source in node.all_input_nodes))


def test_the_model_and_its_names_stay():
    model, _, _ = make()
    before = dict(model.named_parameters())
    blocks = list(model.layers)
    again = remat(model, ["layers.1"])
    assert dict(again.named_parameters()).keys() == before.keys()
    assert all(parameter is before[name] for name, parameter in again.named_parameters())
    assert list(model.layers) == blocks
    assert type(model.layers[1]) is Block
    assert isinstance(again.layers[1], Block)
    x = normal(1, 2, 5, 8)
    assert_same(again(x), model(x))


def test_blocks_take_part_in_compositions():
    """Per-sample gradients through a block that is computed again."""
    model, trainable, frozen = make()
    x = normal(2, 4, 5, 8)

    def loss(net):
        return lambda tree, row: call(net, combine(tree, frozen), row[None]).square().mean()

    got = torch.vmap(torch.func.grad(loss(remat(model, ["layers.*"]))), in_dims=(None, 0))(trainable, x)
    wanted = torch.vmap(torch.func.grad(loss(model)), in_dims=(None, 0))(trainable, x)
    for left, right in zip(tree_leaves(got), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)  # other kernels; gradients of magnitude 1


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_random_blocks_are_refused(backend):
    model, trainable, frozen = make()
    model.layers[1].drop = 0.5
    error = NotImplementedError if backend is None else torch._dynamo.exc.TorchDynamoException
    with pytest.raises(error, match=r"must draw no random numbers"):
        gradients(remat(model, ["layers.*"]), trainable, frozen, backend=backend)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`blocks` contains 'blocks\.\*', which matches no name"):
        remat(make()[0], ["blocks.*"])

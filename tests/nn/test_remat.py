"""Recomputed blocks have the same values and gradients by either route, eager and in one graph."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dynlora_fn import call, checkpoint_contexts, combine, compile_step, init, linear, partition, remat, value_and_grad
from dynlora_fn.nn import _products
from dynlora_fn.testing import assert_same, normal
from tests.support.blocks import Block, make


def gradients(model, trainable, frozen, via="func", backend=None):
    x = normal(1, 2, 5, 8)

    def step(trainable, x):
        return trainable, tuple(
            value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().mean(), via=via)(trainable)
        )

    return (compile_step(step, donate=False, backend=backend) if backend else step)(trainable, x)[1]


@pytest.mark.slow
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
    monkeypatch.setattr(_products, "contract", lambda x, *rest: shapes.append(x.shape) or linear(x, *rest))
    gradients(remat(model, ["layers.[01]"]), trainable, frozen, via)
    assert len(shapes) == 3 + 2


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
    """Per-sample gradients pass through a recomputed block."""
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
    with pytest.raises(error, match=r"`blocks` has a Block that draws random numbers in `aten"):
        gradients(remat(model, ["layers.*"]), trainable, frozen, backend=backend)


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"`blocks` contains 'blocks\.\*', which matches no name"):
        remat(make()[0], ["blocks.*"])


def test_a_checkpoint_without_contexts_is_refused_by_name():
    """It would be recomputed with the parameters of the model."""
    x = torch.ones(2, 4, dtype=torch.float64)

    settings = {}

    class Checkpointed(torch.nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False, **settings)

    model = Checkpointed(4, 4).double()
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64))

    def gradients_by(function):
        return value_and_grad(lambda tree: function(tree).square().sum(), via="autograd")(trainable).grads

    with pytest.raises(NotImplementedError, match=r"'weight' is used in `torch.utils.checkpoint`, .*contexts"):
        gradients_by(lambda tree: call(model, combine(tree, frozen), x))
    settings["context_fn"] = checkpoint_contexts(model)
    got = gradients_by(lambda tree: call(model, combine(tree, frozen), x))
    plain = torch.nn.Linear(4, 4).double()
    around = gradients_by(
        lambda tree: checkpoint(lambda tree: call(plain, combine(tree, frozen), x), tree, use_reentrant=False)
    )
    wanted = gradients_by(lambda tree: call(plain, combine(tree, frozen), x))
    assert_same(got, wanted)
    assert_same(around, wanted)


def test_a_checkpoint_recomputes_with_the_buffers_of_the_call():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return checkpoint(self.scaled, x, use_reentrant=False, **settings) if settings else self.scaled(x)

        def scaled(self, x):
            self.calls.add_(1)
            return torch.tanh(super().forward(x) * self.scale)

    settings, x = {}, torch.ones(2, 4, dtype=torch.float64)
    model = Scaled(4, 4).double()
    model.register_buffer("scale", torch.ones((), dtype=torch.float64))
    model.register_buffer("calls", torch.zeros(()))
    params = init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64)
    trainable, frozen = partition({**params, "scale": torch.tensor(3.0, dtype=torch.float64)}, frozen=["scale"])

    def gradients():
        def loss_fn(tree):
            return call(model, combine(tree, frozen), x).square().sum()

        return value_and_grad(loss_fn, via="autograd")(trainable).grads

    wanted = gradients()
    settings["context_fn"] = checkpoint_contexts(model)
    assert_same(gradients(), wanted)
    assert model.scale == 1
    assert model.calls == 3  # the block writes to the buffer of the model


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("via", ["func", "autograd"])
def test_a_reentrant_checkpoint_is_refused_by_name(via):
    """It would be recomputed with the parameters of the model, and its gradient would be zero without an error."""

    class Checkpointed(torch.nn.Linear):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=True)

    model = Checkpointed(4, 4)
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=["weight"]))
    function = value_and_grad(lambda tree: call(model, combine(tree, frozen), torch.ones(2, 4)).sum(), via=via)
    with pytest.raises(NotImplementedError, match=r"'weight' is used in .* with use_reentrant=True, .* use `remat`"):
        function(trainable)

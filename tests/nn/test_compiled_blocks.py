"""A model whose blocks are compiled one by one, while the step around them is eager."""

import copy

import pytest
import torch
from torch import nn

from dynlora_fn import LowRank, call, combine, init, partition, switch, value_and_grad
from dynlora_fn.bases import defer, quantize
from dynlora_fn.schedules import every
from dynlora_fn.testing import assert_same, normal

X = normal(0, 4, 6)
TARGETS = ["*.up.weight", "*.down.weight"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6, bias=False)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


@pytest.fixture
def models():
    """Return a model, and a copy of it with compiled blocks."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3))).double()
    compiled = copy.deepcopy(model)
    for block in compiled:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    yield model, compiled
    torch.compiler.reset()


def low_rank(model, **settings):
    return init(model, **{"rank": 2, "seed": 0, "targets": TARGETS, "dtype": torch.float64, **settings})


def changed(params, change):
    return {name: change(param) if isinstance(param, LowRank) else param for name, param in params.items()}


def gradients(model, params, via="autograd"):
    trainable, frozen = partition(params)
    return value_and_grad(lambda tree: call(model, combine(tree, frozen), X).square().sum(), via=via)(trainable)


WEIGHTS = {
    "stacked": low_rank,
    "unstacked": lambda model: low_rank(model, stack=False),
    "alpha": lambda model: low_rank(model, alpha=0.3),
    "another rank": lambda model: low_rank(model, rank=3),
    "one side": lambda model: low_rank(model, trained="b"),
    "some at full rank": lambda model: low_rank(model, targets=["*.up.weight"]),
    "int8": lambda model: changed(low_rank(model), lambda param: quantize(param, "int8")),
    "deferred": lambda model: changed(low_rank(model), lambda param: defer(param, vectors=4)),
}


@pytest.mark.parametrize("via", ["autograd", "func"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_values_and_gradients_are_those_of_the_eager_model(models, name, via):
    model, compiled = models
    params = WEIGHTS[name](model)
    assert_same(gradients(compiled, params, via), gradients(model, params, via))


def test_weights_of_another_kind_compile_the_blocks_again(models):
    model, compiled = models
    for name in ("stacked", "alpha", "int8", "stacked"):
        params = WEIGHTS[name](model)
        assert_same(gradients(compiled, params), gradients(model, params))


@pytest.mark.parametrize("name", ["stacked", "int8", "deferred"])
def test_a_switch_compiles_nothing(models, name):
    model, compiled = models
    params, schedule = WEIGHTS[name](model), every(1)
    gradients(compiled, params)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(2):
            params, _ = switch(params, schedule(step, params))
            assert_same(gradients(compiled, params), gradients(model, params))


def test_further_blocks_share_the_graphs(models):
    _, compiled = models
    gradients(compiled, low_rank(compiled))
    deeper = nn.Sequential(*compiled, *(copy.deepcopy(block) for block in compiled))
    with torch.compiler.set_stance("fail_on_recompile"):
        gradients(deeper, low_rank(deeper, stack=False))


def test_transforms_of_compiled_blocks_are_refused(models):
    _, compiled = models
    params = low_rank(compiled)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"is also wrapped within a torch\.compile function"):
        torch.func.vmap(lambda x: call(compiled, params, x))(X)

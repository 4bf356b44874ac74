"""The family as recipes: each runs, learns, and is what its paper says it is."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import LowRank, call, combine, init, materialize, partition, unstack, value_and_grad
from dynlora_fn.testing import assert_same, normal
from models import recipes
from models.mlp import MLP

STEPS = 60
X = normal(0, STEPS, 16, 8, dtype=torch.float32)
GOAL = normal(1, 8, 8, dtype=torch.float32) / 4
BATCHES = [(x, x @ GOAL) for x in X]
TARGETS = ["layers.*.weight"]


def model() -> nn.Module:
    torch.manual_seed(0)
    return MLP([8, 8, 8])


def loss(run: Any, batch: Any) -> Tensor:
    return (run(batch[0]) - batch[1]).square().mean()


def mean_loss(net: nn.Module, params: Any) -> float:
    return sum(loss(partial(call, net, params), batch).item() for batch in BATCHES) / STEPS


SETTINGS = {"targets": TARGETS, "rank": 2, "lr": 1e-2}
RECIPES = {
    "full rank": lambda net: recipes.full_rank(net, loss, BATCHES, lr=1e-2),
    "LoRA": lambda net: recipes.lora(net, loss, BATCHES, **SETTINGS),
    "chain of LoRA": lambda net: recipes.chain_of_lora(net, loss, BATCHES, **SETTINGS, links=3),
    "ReLoRA": lambda net: recipes.relora(net, loss, BATCHES, **SETTINGS, every=20, warmup=3),
    "SwitchLoRA": lambda net: recipes.switchlora(net, loss, BATCHES, **SETTINGS, interval=10),
    "SwitchLoRA with a pool": lambda net: recipes.switchlora(
        net, loss, BATCHES, **SETTINGS, interval=10, is_pooled=True
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_learns(name):
    net = model()
    before = mean_loss(net, dict(net.named_parameters()))
    params = RECIPES[name](net)
    assert mean_loss(net, params) < 0.9 * before
    rank = {name: torch.linalg.matrix_rank(change, rtol=1e-3).item() for name, change in changes(net, params).items()}
    if name == "LoRA":
        assert set(rank.values()) == {2}
    elif name != "full rank":
        assert min(rank.values()) > 2, "the change must be of a higher rank than the factors"


def test_a_merge_at_the_last_step_keeps_what_was_trained():
    """The update comes first. After the merge, its gradients would belong to factors that are gone."""
    net, settings = model(), {**SETTINGS, "warmup": 1}
    merged, plain = (recipes.relora(net, loss, BATCHES, **settings, every=every) for every in (STEPS, 2 * STEPS))
    torch.testing.assert_close(materialize(merged), materialize(plain), rtol=0, atol=1e-5)
    assert merged["layers.*.weight"].factors.b.count_nonzero() == 0


def changes(net: nn.Module, params: Any) -> dict[str, Tensor]:
    dense = materialize(unstack(params))
    return {name: (dense[name] - old).detach() for name, old in net.named_parameters() if old.ndim == 2}


def test_lora_trains_the_factors_alone():
    net = model()
    params = recipes.lora(net, loss, BATCHES, **SETTINGS)
    assert all(torch.equal(param, dict(net.named_parameters())[name]) for name, param in unstack(params).items()
               if isinstance(param, Tensor))  # fmt: skip


def test_accumulated_gradients_are_the_batch_s():
    net, (x, y) = model(), BATCHES[0]
    trainable, frozen = partition(init(net, rank=2, seed=0, targets=TARGETS))
    function = value_and_grad(recipes.loss_of(net, loss, frozen))
    got = recipes.accumulated(function, trainable, list(zip(x.split(4), y.split(4), strict=True)))
    torch.testing.assert_close(got, function(trainable, (x, y)).grads, rtol=1e-4, atol=1e-6)


def test_per_sample_gradients_are_those_of_batches_of_one():
    net, (x, y) = model(), BATCHES[0]
    params = init(net, rank=2, seed=0, targets=TARGETS)
    got = recipes.per_sample_gradients(net, loss, params, (x, y))
    trainable, frozen = partition(params)
    for sample in range(len(x)):
        grads = value_and_grad(recipes.loss_of(net, loss, frozen))(trainable, (x[sample, None], y[sample, None])).grads
        torch.testing.assert_close(tree_map(lambda leaf: leaf[sample], got), grads, rtol=1e-4, atol=1e-6)  # noqa: B023


@pytest.mark.parametrize(("seeds", "lrs"), [(range(8), [1e-2] * 8), ([3] * 8, [10.0**-power for power in range(1, 9)])])
def test_an_ensemble_is_as_many_runs(seeds, lrs):
    net = model()
    trainable, frozen = recipes.ensemble(net, loss, BATCHES[:20], targets=TARGETS, rank=2, seeds=seeds, lrs=lrs)
    for index, (seed, lr) in enumerate(zip(seeds, lrs, strict=True)):
        single, single_frozen = recipes.ensemble(
            net, loss, BATCHES[:20], targets=TARGETS, rank=2, seeds=[seed], lrs=[lr]
        )
        bases = [param.base for param in frozen.values() if not isinstance(param, Tensor)]
        assert_same(bases, [param.base for param in single_frozen.values() if not isinstance(param, Tensor)])
        member = tree_map(lambda leaf: leaf[index], trainable)  # noqa: B023
        torch.testing.assert_close(member, tree_map(lambda leaf: leaf[0], single), rtol=1e-3, atol=1e-5)
    shapes = {tuple(leaf.shape) for leaf in tree_leaves(trainable)}
    assert shapes == {(8, 2, 8, 2), (8, 2, 2, 8)}
    assert any(
        isinstance(param, LowRank) for param in combine(tree_map(lambda leaf: leaf[0], trainable), frozen).values()
    )


def test_relora_without_a_warm_up_starts_at_its_rate():
    trained = [recipes.relora(model(), loss, BATCHES[:3], **SETTINGS, every=2, warmup=steps) for steps in (0, 1)]
    assert_same(*trained)

"""Write an optimizer: RMSProp, as a pair of pure functions.

To add an optimizer to the library, with all its tests, see `dynlora_fn/optim/README.md`.
"""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.optim import Transform, Updates


class RMSPropState(NamedTuple):
    """The state: one tree that mirrors the trainable parameters."""

    square: dict[str, Any]


# A switch resets the state of some vectors. The role of a field says what the field means. Its name does not matter.
dl.optim.register_state(RMSPropState, {"square": "second_moment"})


def rmsprop(decay: float = 0.99, eps: float = 1e-8) -> Transform:
    """Create RMSProp. Without switches it equals `torch.optim.RMSprop`."""

    def init(trainable):
        return RMSPropState(tree_map(torch.zeros_like, trainable))

    def update(grads, opt_state, trainable, *, lr):
        square = tree_map(lambda mean, grad: decay * mean + (1 - decay) * grad**2, opt_state.square, grads)
        updates = tree_map(lambda grad, mean: -lr * grad / (mean.sqrt() + eps), grads, square)
        return Updates(updates, RMSPropState(square))

    # The wrapper keeps frozen vectors in place, whatever update is computed for them.
    return dl.optim.freeze_counterparts(Transform(init, update))


# A leaf of the trainable tree is a tensor or factors, and `tree_map` enters factors. So it maps `b`, `a` and tensors.
model = torch.nn.Linear(6, 4)
params = dl.init(model, rank=2, seed=0, targets=["weight"])
trainable, frozen = dl.partition(params)
optimizer = rmsprop()
opt_state = optimizer.init(trainable)


def loss_fn(trainable):
    """Return a loss that pulls the output towards 1."""
    return (dl.call(model, dl.combine(trainable, frozen), torch.ones(3, 6)) - 1).square().mean()


value_and_grad, losses = dl.value_and_grad(loss_fn), []
for _ in range(20):
    loss, grads = value_and_grad(trainable)
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
    trainable = dl.apply_updates(trainable, updates)
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f}, then {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

# A switch of slot 0 on side a resets and freezes its counterpart, b[:, 0], and nothing else.
plan = dl.schedules.every(1, count=1, freeze=1)(0, dl.combine(trainable, frozen))
slot = plan["weight"].a.slots
projected = dl.project_optimizer_state(opt_state, plan)
assert not projected.inner.square["weight"].b[:, slot].any()
assert opt_state.inner.square["weight"].b[:, slot].all()

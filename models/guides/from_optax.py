"""Come from optax: the same pairs of pure functions, for PyTorch.

| optax | here |
|---|---|
| `tx.init(params)`, `tx.update(grads, state, params)` | the same, with `lr=` passed to each update |
| `optax.apply_updates` | `apply_updates` |
| a schedule of the learning rate | a function of your own, whose value you pass as `lr=` |
| `optax.chain(clip_by_global_norm(1.0), adamw())` | call one after the other, as below |
| `optax.multi_transform`, `optax.masked` | `optim.multi_transform`, `partition(frozen=)` |
| `optax.ema(0.999)` of parameters | `optim.average(averaged, params, decay=0.999)`, of weights |
| `optax.add_decayed_weights` | `decay(params, lr * weight_decay)`, of weights |
| `optax.tree_utils.tree_map_params` | `optim.register_state`: fields of a state declare their roles |
| `jax.value_and_grad`, `jax.jit(donate_argnums=0)` | `value_and_grad`, `compile_step` |

`project_optimizer_state` has no equivalent in optax. After a switch, some entries of a state belong to other vectors,
and it resets them.
"""

import math
from functools import partial

import torch
from torch import nn

import dynlora_fn as dl


def chain(max_norm, inner):
    """Create an optimizer that clips gradients first, around another one."""

    def update(grads, opt_state, trainable, *, lr):
        clipped, _ = dl.optim.clip_by_global_norm(grads, max_norm)
        return inner.update(clipped, opt_state, trainable, lr=lr)

    return dl.optim.Transform(inner.init, update)


def cosine(step, *, peak=1e-2, steps=50):
    """Return the learning rate of a step as a tensor.

    A compiled step would compile again for each new Python number.
    """
    return torch.tensor(peak * (1 + math.cos(math.pi * step / steps)) / 2)


torch.manual_seed(0)
model = nn.Linear(8, 8)
params = dl.init(model, rank=2, seed=0, targets=["weight"])
trainable, frozen = dl.partition(params, frozen=["bias"])  # the bias is masked out
optimizer = chain(1.0, dl.optim.adamw())  # its state is the state of `adamw`
opt_state = optimizer.init(trainable)
schedule, x = dl.schedules.switchlora(total_steps=50, interval=20), torch.randn(16, 8)


def loss_of(frozen, trainable):
    """Return the loss, which is differentiated by `trainable` and not by `frozen`."""
    return (dl.call(model, dl.combine(trainable, frozen), x) - x.roll(1, -1)).square().mean()


losses = []
for step in range(50):
    loss, grads = dl.value_and_grad(partial(loss_of, frozen))(trainable)
    params = dl.combine(trainable, frozen)
    plan = schedule(step, params)
    params, _ = dl.switch(params, plan)
    opt_state = dl.project_optimizer_state(opt_state, plan)
    trainable, frozen = dl.partition(params, frozen=["bias"])
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=cosine(step))
    trainable = dl.apply_updates(trainable, updates)
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f}, then {losses[-1]:.3f}")
assert losses[-1] < losses[0]

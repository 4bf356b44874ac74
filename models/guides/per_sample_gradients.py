"""Compute gradients for each sample, and train several models at once.

Both use `torch.vmap`. `models/recipes.py` has both as training loops.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_map

import dynlora_fn as dl

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
params = dl.init(model, rank=2, seed=0, targets=["*.weight"])
trainable, frozen = dl.partition(params)
inputs, goals = torch.randn(32, 8), torch.randn(32, 4)


def loss_fn(trainable, x, goal):
    """Return the loss of one sample or of a batch."""
    return (dl.call(model, dl.combine(trainable, frozen), x) - goal).square().mean()


# Gradients for each sample: `torch.vmap` maps over inputs and goals, and not over the parameters.
# Inside `torch.vmap`, use `torch.func.grad`.
per_sample = torch.vmap(torch.func.grad(loss_fn), in_dims=(None, 0, 0))(trainable, inputs, goals)
print({name: tuple(grad.b.shape) for name, grad in per_sample.items() if isinstance(grad, dl.Factors)})

# Their mean is the gradient of the mean loss. For differential privacy, clip each gradient before the mean.
mean = tree_map(lambda leaf: leaf.mean(0), per_sample)
torch.testing.assert_close(mean, dl.value_and_grad(loss_fn)(trainable, inputs, goals).grads)

# An ensemble: members share the frozen bases, and each has separate factors and a learning rate.
rates = torch.tensor([1e-2, 3e-2, 1e-1])
optimizer = dl.optim.adamw()
members = tree_map(lambda leaf: leaf.expand(len(rates), *leaf.shape).clone(), trainable)
states = torch.vmap(optimizer.init)(members)


def step(trainable, opt_state, lr):
    """Return one member after one step."""
    loss, grads = dl.value_and_grad(loss_fn)(trainable, inputs, goals)
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
    return dl.apply_updates(trainable, updates), opt_state, loss


for _ in range(10):
    members, states, losses = torch.vmap(step)(members, states, rates)
print(f"losses of the members: {losses.tolist()}")

# The first member equals a single run, up to rounding.
single, state = trainable, optimizer.init(trainable)
for _ in range(10):
    single, state, loss = step(single, state, rates[0])
torch.testing.assert_close(losses[0], loss)

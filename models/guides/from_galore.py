"""Come from GaLore: a low-rank optimizer state, with and without dense gradients.

| GaLore (arXiv:2403.03507) | here |
|---|---|
| `rank` | `init(rank=)`, for all weights or by name |
| `update_proj_gap=200`, a new subspace every 200 steps | `schedules.switchlora`: a few vectors at each step |
| dense weights are trained | bases are frozen, so they may have 8 or 4 bits |
| dense gradients are computed and all-reduced | only gradients of factors are |
| moments of the projected gradient stay when the subspace changes | moments of counterparts are reset at a switch |

In the study, switched factors reach a lower loss at each of three sizes (`bench/results/quality.md`). Stay with GaLore
if weights must be dense, or if a change of the subspace must not reset any moment.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl

torch.manual_seed(0)
model = nn.Linear(64, 64)
params = dl.init(model, rank=8, seed=0, targets=["weight"])
optimizer, schedule = dl.optim.adamw(), dl.schedules.switchlora(total_steps=40, interval=20)
opt_state = optimizer.init(dl.partition(params).trainable)
x = torch.randn(32, 64)

# The state: two moments of rank * (out + in). GaLore has two of rank * in, and a projection of out * rank.
weight_state = sum(leaf.numel() for leaf in tree_leaves([opt_state.inner.mu["weight"], opt_state.inner.nu["weight"]]))
print(f"moments: {weight_state}, GaLore's with its projection: {2 * 8 * 64 + 64 * 8}, AdamW's: {2 * 64 * 64}")
assert weight_state == 2 * 8 * (64 + 64)


def loss_fn(weights):
    """Return the loss of dense weights."""
    return (nn.functional.linear(x, weights["weight"], weights["bias"]) - x.roll(1, -1)).square().mean()


# As in GaLore, compute dense gradients and project them. Most runs use `call` and gradients of factors instead, which
# cost less. Dense gradients allow `compensate`: it adds the part of the gradient outside the factors' span to the base.
losses = []
for step in range(40):
    loss, dense_grads = dl.value_and_grad(loss_fn)(dl.materialize(params))
    grads = dl.optim.project_gradients(dense_grads, params)  # equal to the gradients of the factors
    params = dl.optim.compensate(params, dense_grads, lr=1e-3)
    plan = schedule(step, params)
    params, _ = dl.switch(params, plan)
    opt_state = dl.project_optimizer_state(opt_state, plan)
    trainable, frozen = dl.partition(params)
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=1e-2)
    params = dl.combine(dl.apply_updates(trainable, updates), frozen)
    losses.append(loss.item())
print(f"loss: {losses[0]:.3f}, then {losses[-1]:.3f}")
assert losses[-1] < losses[0] / 2

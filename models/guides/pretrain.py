"""Pre-train a small LLaMA with switched factors.

The loop has what a real run needs: two optimizers, clipping, weight decay and a learning rate that falls.
`python -m models.pretrain` adds data, checkpoints, several processes and reports.
"""

from pathlib import Path

import torch
from torch import nn

import dynlora_fn as dl
from models.llama import TARGETS, Llama, config

STEPS = 30

torch.manual_seed(0)
model = Llama(config("llama-tiny", vocabulary=256))
text = torch.tensor(list(Path(__file__).read_bytes()))  # a token is a byte

# Attention and feed-forward weights become low-rank. Embedding, norms and head stay full-rank tensors and are trained
# too. The two layers have weights of equal shapes, so each name with a star is one stack of two weights.
params = dl.init(model, rank=8, seed=0, targets=TARGETS)
print(f"trained: {sorted(params)}")

# Muon computes one step for the weight, and not for each factor. AdamW trains the full-rank tensors.
optimizer = dl.optim.multi_transform(
    {"muon": dl.optim.muon(), "adamw": dl.optim.adamw()},
    lambda name, leaf: "adamw" if isinstance(leaf, torch.Tensor) else "muon",
)
schedule = dl.schedules.switchlora(STEPS, interval=20)


def step(state, batch, lr):
    """Return the next state and the loss. Nothing is changed in place."""
    trainable, frozen, opt_state, t = state

    def loss_fn(trainable):
        logits = dl.call(model, dl.combine(trainable, frozen), batch[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    loss, grads = dl.value_and_grad(loss_fn)(trainable)
    grads, _ = dl.optim.clip_by_global_norm(grads, 1.0)

    # SwitchLoRA switches between the gradient and the update (`schedule.follows_update` is False).
    params = dl.combine(trainable, frozen)
    plan = schedule(t, params)
    params, _ = dl.switch(params, plan)
    opt_state = dl.project_optimizer_state(opt_state, plan)

    params = dl.decay(params, lr * 0.1)  # base and factors decay together
    trainable, frozen = dl.partition(params)
    rates = {name: lr * (0.5 if isinstance(leaf, torch.Tensor) else 1) for name, leaf in trainable.items()}
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=rates)
    return (dl.apply_updates(trainable, updates), frozen, opt_state, t + 1), loss


# For a larger model, compile the step: `step = dl.compile_step(step)`. The arguments are tensors for that reason.
# To start sooner, compile only the blocks of the model (`dynlora_fn/compile/README.md`).
trainable, frozen = dl.partition(params)
state = trainable, frozen, optimizer.init(trainable), torch.tensor(0)
losses = []
for t in range(STEPS):
    starts = torch.randint(len(text) - 33, (8,))
    batch = torch.stack([text[start : start + 33] for start in starts.tolist()])
    state, loss = step(state, batch, torch.tensor(2e-2 * (1 - t / STEPS)))
    losses.append(loss.item())
print(f"loss: {losses[0]:.2f}, then {losses[-1]:.2f}")
assert losses[-1] < losses[0] - 1

# The dense weights, for the plain model.
model.load_state_dict(dl.state_dict(model, dl.combine(state[0], state[1])))

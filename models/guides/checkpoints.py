"""Save and resume any training loop, to the same bits.

A checkpoint is a folder of safetensors files with checksums. It appears complete, or not at all.
"""

import os
import tempfile
from functools import partial

import torch
from torch import nn

import dynlora_fn as dl

model, optimizer = nn.Linear(8, 8), dl.optim.adamw()
# Settings that a run and its continuation must share. A checkpoint with another value is refused by the setting's name.
settings = {"seed": 0, "lr": 1e-2, "optimizer": "adamw"}


def new_state():
    """Return the state before the first step: everything that changes during the run."""
    params = dl.init(model, rank=2, seed=0, targets=["weight"])
    return {
        "params": params,
        "opt_state": optimizer.init(dl.partition(params).trainable),
        "random": torch.get_rng_state(),  # of the batches
        "best": None,  # leaves may be tensors, numbers, texts and None
    }


def loss_of(frozen, x, trainable):
    """Return the loss of one batch."""
    return dl.call(model, dl.combine(trainable, frozen), x).square().mean()


def train(folder, steps):
    """Train up to a step and return the state, from the newest checkpoint if any."""
    state, first = new_state(), 0
    if loaded := dl.interop.load_checkpoint(folder, state, settings=settings, donate=True):
        state, first = loaded.state, loaded.step
        for path, reason, _ in loaded.refused:  # newer checkpoints that are damaged or have other settings
            print(f"not used: {path}: {reason}")
    torch.set_rng_state(state["random"])
    for step in range(first, steps):
        trainable, frozen = dl.partition(state["params"])
        x = torch.randn(4, 8)
        grads = dl.value_and_grad(partial(loss_of, frozen, x))(trainable).grads
        updates, opt_state = optimizer.update(grads, state["opt_state"], trainable, lr=settings["lr"])
        state |= {"params": dl.combine(dl.apply_updates(trainable, updates), frozen), "opt_state": opt_state}
        state |= {"random": torch.get_rng_state()}
        dl.interop.save_checkpoint(state, folder, step=step + 1, settings=settings, keep=2)
    return state


# An interrupted and resumed run equals one without an interruption, bit for bit.
torch.manual_seed(0)
random, folder = torch.get_rng_state(), tempfile.mkdtemp()
whole = train(tempfile.mkdtemp(), 4)
torch.set_rng_state(random)
train(folder, 2)
resumed = train(folder, 4)
assert torch.equal(dl.materialize(resumed["params"])["weight"], dl.materialize(whole["params"])["weight"])
assert torch.equal(resumed["random"], whole["random"])
print("the resumed run has the same bits")
assert sorted(os.listdir(folder)) == ["step-00000003", "step-00000004"]  # `keep=2`

# On several processes, each process passes `group=` to both functions. Another number of processes can load the files.

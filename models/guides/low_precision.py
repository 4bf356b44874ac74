"""Store bases in low precision: int8, float8, nf4, bfloat16, nvfp4 or mxfp4.

A frozen base needs no gradient and no optimizer state, so it can be stored in few bits. Factors stay in float32.
"""

import torch
from torch import nn

import dynlora_fn as dl

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))


def after_switches(base, residual):
    """Return parameters after 200 steps of switching, and their relative errors.

    The errors are of the weights that products read.
    """
    params = dl.init(model, rank=16, seed=0, targets=["*.weight"], base=base, residual=residual)
    schedule = dl.schedules.switchlora(total_steps=1000)
    for step in range(200):  # in training, each step also updates the factors
        params, _ = dl.switch(params, schedule(step, params))
    return params, dl.bases.drift(params, {name: model.get_parameter(name) for name in ("0.weight", "2.weight")})


# Each switch folds a difference into the base, and folding into codes rounds it. A residual stores the rounding error,
# so the error of the weight stays as small as after quantizing once. Products do not read the residual.
params, kept = after_switches("int8", "bfloat16")
_, lost = after_switches("int8", None)
print(f"int8 with a residual: {kept['0.weight']:.4f}, without: {lost['0.weight']:.4f}")
assert kept["0.weight"] < 0.02 < lost["0.weight"]

# The bytes of each base: int8 codes, one scale for each row, and a bfloat16 residual.
print({name: sum(leaf.nbytes for leaf in torch.utils._pytree.tree_leaves(params[name].base)) for name in kept})

# 8-bit moments of the optimizer, and residuals in host memory, save more memory on a GPU:
optimizer = dl.optim.adamw(moments="8bit")
opt_state = optimizer.init(dl.partition(params).trainable)
params = dl.init(model, rank=16, seed=0, targets=["*.weight"], base="nf4", residual_device="cpu")

# `to_torchao` returns torchao's tensors with the same bits. `init` accepts a model after torchao's `quantize_`.
quantized = dl.bases.to_torchao(after_switches("int8", "bfloat16")[0])
print({name: type(tensor).__name__ for name, tensor in quantized.items()})

"""Write a rule: how an operation of your model uses a low-rank weight.

Most operations have a rule, such as linear layers, attention, convolutions and embeddings. Any other operation gets the
dense weight, which costs time and memory. `explain` finds such operations.
"""

import warnings

import torch
from torch import nn

import dynlora_fn as dl


class Penalized(nn.Linear):
    """A linear layer that also returns the Frobenius norm of its weight."""

    def forward(self, x):
        return super().forward(x), torch.linalg.matrix_norm(self.weight)


model = Penalized(64, 48)
params, x = dl.init(model, rank=4, seed=0, targets=["weight"]), torch.randn(2, 64)

# 1. Find operations without a rule.
print(dl.explain(params, tokens=2, model=model, args=(x,)).dense)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    _, slow = dl.call(model, params, x)
assert "weight" in str(caught[0].message)
try:
    dl.call(model, params, x, fallback="raise")  # raises an error that names the weight and the operation
except NotImplementedError as error:
    print(error)


# 2. Write the rule. It takes the arguments of the operation, with a `LowRank` in place of the weight.
# The identity |base + b a / r|^2 = |base|^2 + 2 <base, b a> / r + <b' b, a a'> / r^2 needs no dense weight.
# With an alpha, `b` already contains it.
def matrix_norm(weight, *args, **kwargs):
    """Return the Frobenius norm of a low-rank weight.

    Return `NotImplemented` for any other norm.
    """
    if args or kwargs:
        return NotImplemented
    (b, a), rank = weight.factors, weight.factors.a.shape[0]
    cross = ((b.T @ weight.base) * a).sum() / rank
    square = (b.T @ b * (a @ a.T)).sum() / rank**2
    return (weight.base.square().sum() + 2 * cross + square).sqrt()


dl.nn.register_rule(torch.linalg.matrix_norm, matrix_norm)

# 3. Compare it with the dense weight: values, and gradients of the factors.
_, fast = dl.call(model, params, x, fallback="raise")
torch.testing.assert_close(fast, slow)
trainable, frozen = dl.partition(params)
by_rule = dl.value_and_grad(lambda tree: dl.call(model, dl.combine(tree, frozen), x)[1])(trainable).grads
by_weight = dl.value_and_grad(lambda tree: dl.materialize(dl.combine(tree, frozen))["weight"].norm())(trainable).grads
torch.testing.assert_close(by_rule["weight"], by_weight["weight"])

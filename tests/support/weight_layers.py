"""A layer that passes its weight to a function first.

It shows what functions do with a low-rank weight.
"""

import torch
from torch import nn
from torch.nn import functional

from dynlora_fn import call, combine, init, partition, value_and_grad

EPS = torch.finfo(torch.float64).eps


class Layer(nn.Linear):
    """A linear layer that passes its weight to a function first."""

    def __init__(self, use, out_features=6):
        super().__init__(4, out_features, dtype=torch.float64)
        self.use = use

    def forward(self, x):
        return functional.linear(x, self.use(self.weight), self.bias)


def setting(use):
    torch.manual_seed(0)
    model = Layer(use)
    return model, init(model, rank=2, seed=0, targets=["weight"], dtype=torch.float64)


def named(name, use):
    """Return a model whose low-rank weight has another name each time.

    Each name is warned about once.
    """

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, Layer(use))

        def forward(self, x):
            return self.get_submodule(name)(x)

    torch.manual_seed(0)
    model = Outer()
    return model, init(model, rank=2, seed=0, targets=["*.weight"], dtype=torch.float64)


def gradients(model, params, *args, via="func", **kwargs):
    trainable, frozen = partition(params)
    return value_and_grad(lambda tree: call(model, combine(tree, frozen), *args, **kwargs).square().sum(), via=via)(
        trainable
    )

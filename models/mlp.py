"""A multilayer perceptron whose hidden layers have equal sizes."""

from collections.abc import Sequence

from torch import Tensor, nn

TARGETS = ("layers.*.weight",)


class MLP(nn.Module):
    """Linear layers with tanh between them.

    Args:
        widths: The widths of the input, of each hidden layer and of the output.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)

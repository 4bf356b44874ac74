"""A network and settings for tests of quantized bases."""

from torch import Tensor, nn

from dynlora_fn.testing import Shape

RESIDUALS = ("bfloat16", "int8", None)
SHAPE = Shape(8, 32, 4)  # of a size that all blocks divide


class Net(nn.Module):
    """Has two equal layers, which become a stack, and one of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)

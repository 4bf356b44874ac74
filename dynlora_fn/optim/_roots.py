"""Square roots and quotients with finite derivatives at zero.

Gradients and moments may be zero. torch's derivatives are infinite there, and NaN after a product with zero. Tensors
that are not differentiated take torch's operations, so a compiled step has the same graph as with these.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._attached import is_attached

# Dynamo cannot trace the question whether a tensor is attached. `allow_in_graph` leaves it to AOTAutograd.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def square_root(square: Any) -> Any:
    """Return the square root.

    Its derivative at zero is zero, as for a norm or a magnitude. It is also for `Leaves`, which are never
    differentiated.
    """
    if not is_attached(square):
        return square.sqrt()
    is_zero = square == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, square).sqrt())


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def divide(matrix: Tensor, norm: Tensor, least: float | None = None) -> Tensor:
    """Divide a matrix by its norm, or by `least` if that is larger.

    Zeros stay zeros, and their derivative is zero, where the direction has none. Default None means the least normal
    number.
    """
    divisor = norm.clamp(min=torch.finfo(matrix.dtype).tiny if least is None else least)
    return matrix / (torch.where(norm == 0, torch.inf, divisor) if is_attached(norm) else divisor)

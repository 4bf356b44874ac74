"""Square roots and quotients with finite derivatives at zero.

Gradients and moments may be zero. At zero, torch's derivatives are infinite, and NaN after a product with zero. For
tensors that are not differentiated, these functions call torch's operations, so they do not change a compiled step.
"""

from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._attached import is_attached

# Dynamo cannot trace `is_attached`. With `allow_in_graph`, AOTAutograd traces these functions instead.


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def square_root(square: Any) -> Any:
    """Return the square root of a tensor or of `Leaves`.

    Its derivative at zero is zero. `Leaves` are never differentiated.
    """
    if not is_attached(square):
        return square.sqrt()
    is_zero = square == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, square).sqrt())


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def divide(matrix: Tensor, norm: Tensor, least: float | None = None) -> Tensor:
    """Divide a matrix by its norm, or by `least` if that is larger.

    Zeros stay zeros. If the norm is zero, the derivative is zero.

    Args:
        matrix: The matrix.
        norm: Its norm, which broadcasts against the matrix.
        least: The smallest divisor. Default None means the smallest normal number of the dtype.
    """
    divisor = norm.clamp(min=torch.finfo(matrix.dtype).tiny if least is None else least)
    return matrix / (torch.where(norm == 0, torch.inf, divisor) if is_attached(norm) else divisor)

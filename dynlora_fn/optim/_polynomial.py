"""Orthogonalize matrices with odd polynomials of their singular values.

No matrix decomposition is needed.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import check_number, described
from dynlora_fn.optim._roots import divide, square_root

# Rows (a, b, c) of polynomials ``a x + b x^3 + c x^5``, applied one after the other to singular values of at most 1
Table: TypeAlias = tuple[tuple[float, float, float], ...]
Preset: TypeAlias = Literal["jordan", "polar_express_5", "polar_express_8"]
Coefficients: TypeAlias = Preset | Sequence[Sequence[float]]

# Five rows with the coefficients of Jordan et al. (2024), who chose them for their slope at zero.
JORDAN: Table = ((3.4445, -4.7750, 2.0315),) * 5

# The list of Amsel et al. (arXiv:2505.16932, appendix G). Each row is the best polynomial of degree 5 on the interval
# to which the rows before it map [1e-3, 1].
_POLAR_EXPRESS: Table = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Amsel et al. divide the argument of all rows but the last by this, so that rounding errors stay inside the interval.
_SAFETY = 1.01
_SAFE: Table = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS[:-1])

PRESETS: dict[str, Table] = {
    "jordan": JORDAN,
    "polar_express_5": _SAFE[:5],
    "polar_express_8": (*_SAFE, _POLAR_EXPRESS[-1]),
}

# This many units of the precision, times the trace, are added to a Gram matrix. Rounding may make its eigenvalues
# negative, and a polynomial of a negative eigenvalue diverges.
_FLOOR = 4
_NARROW = 1.5  # if columns / rows is larger, polynomials of a Gram matrix take fewer FLOPs, for any table


def check_coefficients(coefficients: Any) -> Table:
    """Return the table of a preset, or a checked table of rows of three numbers.

    Raises:
        TypeError: If `coefficients` is neither a string nor rows of three numbers.
        ValueError: If the preset is unknown, a number is not finite, or there are no rows.
    """
    if isinstance(coefficients, str):
        if coefficients not in PRESETS:
            raise ValueError(
                f"`coefficients` must be one of {', '.join(PRESETS)}, got {coefficients!r}; or pass rows of 3 numbers"
            )
        return PRESETS[coefficients]
    rows = coefficients.tolist() if hasattr(coefficients, "tolist") else coefficients
    is_table = isinstance(rows, list | tuple) and all(isinstance(row, list | tuple) and len(row) == 3 for row in rows)
    if not is_table:
        raise TypeError(f"`coefficients` is {described(coefficients)}; pass the name of a preset, or rows of 3 numbers")
    if not rows:
        raise ValueError("`coefficients` has no rows; pass one row of 3 numbers for each step")
    a, b, c = zip(*([check_number("coefficients", number) for number in row] for row in rows), strict=True)
    return tuple(zip(a, b, c, strict=True))


def orthogonalize(matrix: Float[Tensor, "*stack out in"], table: Table = JORDAN) -> Float[Tensor, "*stack out in"]:
    """Bring all singular values near 1, except zeros.

    The singular vectors do not change. A narrow matrix is read only twice, for its Gram matrix and for its product with
    a polynomial of the Gram matrix.
    """
    is_tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if is_tall else matrix
    if x.shape[-1] > _NARROW * x.shape[-2]:
        x = polynomial_of_gram(with_floor(x @ x.mT), table) @ x
    else:
        x = polynomial(divide_by_norm(x, dim=(-2, -1)), table)
    return x.mT if is_tall else x


def polynomial(x: Float[Tensor, "*stack rows columns"], table: Table) -> Float[Tensor, "*stack rows columns"]:
    """Apply a table to the singular values of a matrix.

    The matrix must not have more rows than columns.
    """
    for first, third, fifth in table:
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    return x


def polynomial_of_gram(gram: Float[Tensor, "*stack n n"], table: Table) -> Float[Tensor, "*stack n n"]:
    """Return P such that ``P x`` orthogonalizes every x with ``x x.T = gram``.

    Zeros stay zeros. Each row of the table multiplies x by a polynomial of its Gram matrix. The product of these
    polynomials is P.
    """
    square = trace(gram)
    stacked = divide(gram, square).reshape(gram.shape[:-2].numel(), *gram.shape[-2:])  # for torch.baddbmm
    steps = identity_like(stacked).expand_as(stacked)
    for index, (first, third, fifth) in enumerate(table):
        # The step is ``first + rest``. All matrices are polynomials of one matrix, so their products are symmetric.
        rest = torch.baddbmm(stacked, stacked, stacked, beta=third, alpha=fifth)
        steps = torch.baddbmm(steps, rest, steps, beta=first) if index else first * steps + rest
        if index + 1 < len(table):
            half = torch.baddbmm(stacked, rest, stacked, beta=first)
            stacked = torch.baddbmm(half, half, rest, beta=first)
    inverse_norm: Tensor = divide((square > 0).to(gram.dtype), square_root(square))
    return inverse_norm * steps.reshape(gram.shape)


def with_floor(gram: Float[Tensor, "*stack n n"], relative: Tensor | float = 1.0) -> Float[Tensor, "*stack n n"]:
    """Return a Gram matrix with positive eigenvalues, unless it is zero.

    Rounding errors may have made eigenvalues negative. A multiple of the identity is added that exceeds these errors.

    Args:
        gram: The Gram matrix.
        relative: The size of its rounding errors, relative to the errors of a product of a matrix with its transpose.
            The smallest normal number is added too, because smaller squares lose digits.
    """
    size, limits = trace(gram), torch.finfo(gram.dtype)
    floor: Tensor = _FLOOR * limits.eps * relative * size + limits.tiny * size.sign()
    return gram + floor * identity_like(gram)


def trace(gram: Float[Tensor, "*stack n n"]) -> Float[Tensor, "*stack 1 1"]:
    """Return the sum of the diagonal."""
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def identity_like(gram: Float[Tensor, "*stack n n"]) -> Float[Tensor, "n n"]:
    """Return the identity matrix with the size, dtype and device of a matrix."""
    return torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


def divide_by_norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Divide by the norm along `dim`. Zeros stay zeros.

    A norm is replaced by the square root of the smallest normal number if that is larger. So the norm of the result is
    at most 1.
    """
    quotient: Tensor = divide(matrix, norm(matrix, dim), least=torch.finfo(matrix.dtype).tiny ** 0.5)
    return quotient


def norm(matrix: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Return the norm along `dim`, with axes of size 1 in place of `dim`."""
    root: Tensor = square_root(matrix.square().sum(dim, keepdim=True))
    return root

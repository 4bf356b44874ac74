"""`muon`: Muon for matrices and for low-rank weights."""

from collections.abc import Mapping
from functools import partial
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from dynlora_fn._core._check import check_choice, check_flag, check_integer, check_number
from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._stacking import count_axes
from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import AnyFactors, OneSidedFactors, Trainable
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._coupled_steps import coupled_steps
from dynlora_fn.optim._eight_bit import SignedMoment, decode_moments, empty_moments, encode_moments
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._factor_steps import factor_updates, separate_steps
from dynlora_fn.optim._freeze import freeze_counterparts
from dynlora_fn.optim._one_sided_muon import one_sided_direction
from dynlora_fn.optim._polynomial import Coefficients, Table, check_coefficients, orthogonalize
from dynlora_fn.optim._sgd_lion import MomentumState
from dynlora_fn.optim._transform import (
    Rate,
    Transform,
    Tree,
    Updates,
    rate_of,
    refuse_decay_of_factors,
    zero_moments,
)


def muon(
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    coefficients: Coefficients = "jordan",
    coupled: int = 0,
    weight_decay: float = 0.0,
    moments: Literal["float32", "bfloat16", "8bit"] = "float32",
) -> Transform:
    """Create Muon, which orthogonalizes updates of matrices and of low-rank weights.

    For a low-rank weight, it orthogonalizes the change of the weight ``alpha / rank * b @ a``, and not the change of
    each factor. For a matrix (Jordan et al., 2024), where `orthogonalize` brings all singular values near 1::

        mu = momentum * mu + grad,     direction = grad + momentum * mu
        updates = -lr * (sqrt(max(rows, columns)) * orthogonalize(direction) + weight_decay * matrix)

    If the gradient has full rank, the root mean square of the entries of the update is near `lr`, as with AdamW. For
    factors, with ``S_a.T S_a = (a a.T)^-1`` and ``S_b.T S_b = (b.T b)^-1`` (LoRA-Muon, arXiv:2606.12921)::

        updates_b = -lr * rank / alpha * sqrt(max(out, in)) * orthogonalize(direction_b S_a.T) S_a
        updates_a = -lr * rank / alpha * sqrt(max(out, in)) * S_b.T orthogonalize(S_b direction_a)

    Then ``alpha / rank * updates_b @ a`` is the orthogonalized dense gradient within the rows of `a`. It does not
    depend on the lengths of these rows or the angles between them. So choose `lr` as for the dense weight, and not as
    for AdamW with factors. If `b` were orthogonalized as a matrix, long vectors of `a` would cause long steps of the
    weight.

    Both sides contain the gradient within the columns of `b` and the rows of `a`. In these directions, the sum of both
    sides moves the weight up to twice as far as in other directions. With `coupled`, the sum is orthogonalized
    (LoRA-TSD, arXiv:2609.02734). The table has the singular values of the change of the weight in units of
    ``lr * sqrt(max(out, in))``, for a random gradient and "polar_express_8":

    =======  =========================
    coupled  singular values
    =======  =========================
    1        0.5 to 1.2
    3        0.88 to 1.1
    6        within 3 % of each other
    =======  =========================

    If only `b` is trained, ``a a.T`` is a multiple of the identity, and nothing is whitened (see `init`)::

        updates_b = -lr * sqrt(rank / alpha) * sqrt(max(out, in)) * orthogonalize(direction_b)

    A frozen vector does not move (see `freeze_counterparts`). If both factors are trained, one update moves a factor by
    at most a tenth of the sum of the Frobenius norms of both factors. Without this limit, a step of `a` would be
    unbounded if `b` is zero, as at the start of LoRA or after a `merge`. Use AdamW for embedding, head and norms (see
    `multi_transform`).

    Cost: one moment, and for factors ``6 * rank**2 * (out + in) + 92 * rank**3`` FLOPs with five polynomials. Coupled
    steps take ``10 * rank**2 * (out + in) + (48 * n + 52) * rank**3`` FLOPs. Here n is the number of polynomials, plus
    two for each projection after the first. For sharded factors, four (rank, rank) matrices of each weight are
    all-reduced at once, or six if coupled. If only `b` is trained, an update costs as much as for a matrix (out, rank).

    Args:
        momentum: The decay rate of the moment, in [0, 1).
        nesterov: Whether the direction is ``grad + momentum * mu``. If False, it is ``mu``.
        coefficients: The polynomials ``a x + b x**3 + c x**5`` of singular values x, which are applied one after the
            other: rows (a, b, c), or "jordan" (Jordan et al., 2024), "polar_express_5" or "polar_express_8"
            (arXiv:2505.16932).
        coupled: How often to orthogonalize the change of a low-rank weight, and to project it back to the changes that
            its factors can make. Default 0 orthogonalizes each side separately.
        weight_decay: The decoupled weight decay of full-rank tensors. A low-rank weight cannot be decayed through its
            factors. Decay it with `dl.optim.decay`.
        moments: The format of the moment between updates: "float32", "bfloat16", or "8bit" as for `adamw`.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name. For sharded factors `update` is collective: call it on every
        process.

    Raises:
        TypeError: If a setting has a wrong type.
        ValueError: If a setting is out of range. In `init` and `update`, if `weight_decay` is not 0 and `trainable` has
            factors. In `update`, if a full-rank tensor is complex or has fewer than two axes, those of a stack not
            counted, or `grads` does not have the names and shapes of `trainable`.
        NotImplementedError: In `update`, if a moment that is stored in 8 bits requires a gradient or has a tangent.

    Numerics: Updates are in float32, or in the parameter's dtype if that is wider, and read the moment before it is
        rounded. Factors, and matrices with sides in a ratio above 1.5, are orthogonalized with Gram matrices. Four
        units of the dtype's precision, times the trace, are added to the Gram matrix of directions. So in float32 a
        singular value of a thousandth of the norm ends 0.2 below 1. The Gram matrices of factors are damped by a
        thousandth of their mean diagonal. If the squares of a direction underflow, in float32 for entries below 1e-19,
        its step is shorter or zero. If they overflow, for entries above 1e18, it may be NaN too. The table has the
        range to which `orthogonalize` brings singular values of at least the given part of the matrix's norm. Smaller
        singular values end below this range.

        =================  =================  ==================
        coefficients       part of the norm   range
        =================  =================  ==================
        "jordan"           a hundredth        0.68 to 1.14
        "polar_express_5"  a thousandth       0.84 to 1.13
        "polar_express_8"  a thousandth       0.999 to 1.001
        =================  =================  ==================

    Example: The singular values of the update of a matrix (4, 2) are ``lr * sqrt(4)``.
        >>> import torch
        >>> optimizer = muon(coefficients="polar_express_8")
        >>> trainable, grads = {"w": torch.zeros(4, 2)}, {"w": torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0]))[:, :2]}
        >>> updates, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.01)
        >>> torch.allclose(torch.linalg.svdvals(updates["w"]), torch.full((2,), 0.02), rtol=0.01)
        True
    """
    momentum = check_number("momentum", momentum, least=0, below=1)
    check_flag("nesterov", nesterov)
    table = check_coefficients(coefficients)
    coupled = check_integer("coupled", coupled, least=0)
    weight_decay = check_number("weight_decay", weight_decay, least=0)
    check_choice("moments", moments, ("float32", "bfloat16", "8bit"))
    find_steps = (
        partial(coupled_steps, table=table, projections=coupled) if coupled else partial(separate_steps, table=table)
    )

    def init(trainable: Trainable) -> MomentumState:
        refuse_decay_of_factors(weight_decay, trainable)
        if moments == "8bit":
            return MomentumState({name: empty_moments(leaf, SignedMoment) for name, leaf in trainable.items()})
        mu = zero_moments(trainable)
        return MomentumState(_in_bfloat16(mu) if moments == "bfloat16" else mu)

    @elementwise(results=2)
    def next_mu(mu: Any, grad: Any, param: Any) -> tuple[Any, Any]:
        """Return the moment and the direction, in float32 or a wider dtype."""
        dtype = widest(param.dtype)
        grad = grad.to(dtype)
        mu = momentum * mu.to(dtype) + grad
        return mu, momentum * mu + grad if nesterov else mu  # in this order, `grad` may be sparse

    def stored(mu: Tree, like: Tree) -> Tree:
        """Return moments by name in the format of `moments`."""
        if moments == "8bit":
            return {name: encode_moments(leaf, like[name], name) for name, leaf in mu.items()}
        return _in_bfloat16(mu) if moments == "bfloat16" else mu

    def step(name: str, leaf: AnyFactors | Tensor, direction: Any, rate: Rate) -> Any:
        if isinstance(leaf, Tensor):
            change = _matrix_direction(name, direction, table)
            return -rate * (change + weight_decay * leaf.to(change.dtype) if weight_decay else change)
        if isinstance(leaf, OneSidedFactors):
            one_sided = one_sided_direction(direction, leaf, table)
            return one_sided._replace(b=-rate * one_sided.b)
        return factor_updates(direction, leaf, rate, find_steps, is_coupled=coupled > 0)

    def update(
        grads: Trainable, opt_state: MomentumState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        refuse_decay_of_factors(weight_decay, trainable)
        check_state(opt_state, MomentumState, trainable, eight_bit=moments == "8bit")
        mu, directions = next_mu(decode_moments(opt_state.mu), grads, trainable)
        with without_autocast(_device_type(trainable)):
            updates = {name: step(name, leaf, directions[name], rate_of(lr, name)) for name, leaf in trainable.items()}
        return Updates(updates, MomentumState(stored(mu, opt_state.mu)))

    return freeze_counterparts(Transform(init, update))


def _in_bfloat16(tree: Tree) -> Tree:
    """Return moments in bfloat16, except complex moments, which `update` refuses."""
    result: Tree = tree_map(lambda leaf: leaf if leaf.is_complex() else leaf.to(torch.bfloat16), tree)
    return result


def _device_type(trainable: Trainable) -> str:
    """Return the type of the device of the first parameter."""
    devices = [leaf.device if isinstance(leaf, Tensor) else leaf.b.device for leaf in trainable.values()]
    return devices[0].type if devices else "cpu"


def _matrix_direction(name: str, direction: Tensor, table: Table) -> Tensor:
    if direction.ndim - count_axes(name) < 2 or direction.is_complex():
        raise ValueError(
            f"`trainable` has {name!r} of shape {tuple(direction.shape)} and {direction.dtype}, which muon cannot "
            "orthogonalize; train it with another optimizer through `multi_transform`"
        )
    return orthogonalize(direction, table) * sqrt(max(direction.shape[-2:]))

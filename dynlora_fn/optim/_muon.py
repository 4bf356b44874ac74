"""Muon for matrices and for low-rank weights."""

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

    A low-rank weight is updated through ``alpha / rank * b @ a``, not through each factor as a matrix. For a matrix
    (Jordan et al., 2024), with `orthogonalize` bringing all singular values near 1::

        mu = momentum * mu + grad,     direction = grad + momentum * mu
        updates = -lr * (sqrt(max(rows, columns)) * orthogonalize(direction) + weight_decay * matrix)

    If all directions have a gradient, the root mean square of the update's entries is near `lr`, as with AdamW. For
    factors, with ``S_a.T S_a = (a a.T)^-1`` and ``S_b.T S_b = (b.T b)^-1`` (LoRA-Muon, arXiv:2606.12921)::

        updates_b = -lr * rank / alpha * sqrt(max(out, in)) * orthogonalize(direction_b S_a.T) S_a
        updates_a = -lr * rank / alpha * sqrt(max(out, in)) * S_b.T orthogonalize(S_b direction_a)

    Then ``alpha / rank * updates_b @ a`` is the orthogonalized dense gradient within the rows of `a`. It does not
    depend on the lengths of the rows or the angles between them. So `lr` compares with the dense weight's learning
    rate, not with AdamW's for factors. Orthogonalizing `b` as a matrix would make a long step wherever a vector of `a`
    is long.

    Both sides contain the gradient within the columns of `b` and the rows of `a`, so where they move the weight in
    these directions, their sum moves it up to twice as far as elsewhere. With `coupled`, the sum is orthogonalized
    (LoRA-TSD, arXiv:2609.02734). For a random gradient and "polar_express_8", the singular values of the weight's
    change are then 0.5 to 1.2 times ``lr * sqrt(max(out, in))`` with 1, 0.88 to 1.1 times with 3, and within 3 % of
    each other with 6.

    Where only `b` is trained, ``a a.T`` is a multiple of the identity, and nothing is whitened (see `init`)::

        updates_b = -lr * sqrt(rank / alpha) * sqrt(max(out, in)) * orthogonalize(direction_b)

    A frozen vector does not move (see `freeze_counterparts`). Where both factors are trained, one update moves a factor
    by at most a tenth of the sum of both factors' Frobenius norms. Where `b` is zero, as at the start of LoRA or after
    a `merge`, the step of `a` would otherwise have no limit. Embedding, head and norms do better with AdamW: see
    `multi_transform`.

    Cost: one moment, and for factors ``6 * rank**2 * (out + in) + 92 * rank**3`` FLOPs with five polynomials. Coupled
    steps take ``10 * rank**2 * (out + in) + (48 * n + 52) * rank**3``, where n is the number of polynomials and two for
    each projection after the first. For sharded factors four (rank, rank) matrices of each weight are all-reduced at
    once, or six if coupled. Where only `b` is trained, an update costs as much as of a matrix (out, rank).

    Args:
        momentum: The decay rate of the moment, in [0, 1).
        nesterov: Whether the direction is ``grad + momentum * mu``. Otherwise it is ``mu``.
        coefficients: The polynomials ``a x + b x**3 + c x**5`` of singular values x, which are applied in turn: rows
            (a, b, c), or "jordan" (Jordan et al., 2024), "polar_express_5" or "polar_express_8" (arXiv:2505.16932).
        coupled: How often the change of a low-rank weight is orthogonalized and projected back to what its factors can
            do. Default 0 orthogonalizes each side by itself.
        weight_decay: The decoupled weight decay of full-rank tensors. A low-rank weight cannot be decayed through its
            factors: decay it with `dl.optim.decay`.
        moments: The format of the moment between updates: "float32", "bfloat16", or "8bit" as for `adamw`.

    Returns:
        The optimizer. Its state is a `FreezeState` around a `MomentumState`. The `lr` of its `update` is a number, a
        0-d tensor, or a dict of either by parameter name. For sharded factors `update` is collective: call it on every
        process.

    Raises:
        TypeError: If a setting has another type.
        ValueError: If a setting is out of range. In `init` and `update`, if `weight_decay` is not 0 and `trainable` has
            factors. In `update`, if a full-rank tensor is complex or has fewer than two axes, those of a stack not
            counted, or `grads` does not have the names and shapes of `trainable`.
        NotImplementedError: In `update`, if a moment that is stored in 8 bits requires a gradient or has a tangent.

    Numerics: Updates are float32, or the parameter's dtype if that is wider, and read the moment before it is rounded.
    "jordan" brings singular values of at least a hundredth of the matrix's norm between 0.68 and 1.14,
    "polar_express_5" those of at least a thousandth between 0.84 and 1.13, "polar_express_8" within a thousandth of 1;
    smaller ones end below. Factors, and matrices with sides in a ratio above 1.5, are orthogonalized through Gram
    matrices. To those of directions, four units of the dtype's precision times the trace are added: in float32, a
    singular value of a thousandth of the norm ends 0.2 below 1. Those of factors are damped by a thousandth of their
    mean diagonal. A direction whose squares leave the range of the dtype gets a shorter step or none, and above it
    possibly NaN: in float32, entries below 1e-19 or above 1e18.

    Example:
        >>> import torch
        >>> from dynlora_fn import Factors
        >>> optimizer = muon(coefficients="polar_express_8", coupled=3)
        >>> trainable = {"w": Factors(b=torch.eye(4, 2), a=torch.eye(2, 3))}
        >>> grads = {"w": Factors(b=torch.ones(4, 2), a=torch.ones(2, 3))}
        >>> updates, opt_state = optimizer.update(grads, optimizer.init(trainable), trainable, lr=0.01)
        >>> updates["w"].b.shape
        torch.Size([4, 2])
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
    """Return moments in bfloat16, except complex ones, which `update` refuses."""
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

"""AdamW with a step count for every factor vector, and what optimizers share."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn.moments import SignedMoment, UnsignedMoment, blank_moment, decode_moments, encode_moments
from dynlora_fn.rows import all_reduce
from dynlora_fn.types import Factors, Frozen, Trainable, factor_shardings

Tree = dict[str, Any]
Rate: TypeAlias = Tensor | float


class Transform(NamedTuple):
    """An optimizer as a pair of pure functions: ``opt_state = init(trainable)`` and
    ``updates, opt_state = update(grads, opt_state, trainable, lr=lr)``."""

    init: Callable[..., Any]
    update: Callable[..., Any]


class Updates(NamedTuple):
    """What `adamw`'s update returns."""

    updates: Tree  # to be added, see `apply_updates`
    opt_state: "AdamWState"


class AdamWState(NamedTuple):
    """All trees mirror the trainable parameters. Per vector means
    ``Factors(b=(*stack, 1, rank), a=(*stack, rank, 1))``, which broadcasts against the factors."""

    mu: Tree  # mean of the gradients, in float32 or the parameter's dtype if that is wider, or in 8 bit
    nu: Tree  # mean of their squares, likewise
    count: Tree  # type: ignore[assignment]  # int32, updates so far: per vector for factors, 0-d for full-rank tensors
    frozen_for: dict[str, Factors]  # int32, updates that each vector still sits out: per vector


def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    moments: Literal["float32", "8bit"] = "float32",
) -> Transform:
    """AdamW (arXiv:1711.05101) that equals `torch.optim.AdamW` where nothing is switched.

    Every factor vector has a step count of its own for the bias correction, since `project_optimizer_state` resets
    them one by one. A vector that is frozen gets a zero gradient: right after a reset it does not move, weight decay
    apart, but its count runs on, so that bias correction starts it gently once it thaws (0.52 of a full step after 5
    updates at the default betas), as in SwitchLoRA's implementation (rule "reset" of `project_optimizer_state`; with
    "reset_thawed" it restarts at the thaw).

    The learning rate is an argument of `update`: a number, or a 0-d tensor so that changing it does not compile anew,
    or a dict of them by name. Decay is decoupled: ``trainable * lr * weight_decay`` is subtracted. With an `eps` of 0 a
    vector that has never had a gradient, a frozen one too, moves by 0 / 0.

    With ``moments="8bit"`` both moments are held between updates as torchao's OptimState8bit holds them
    (arXiv:2110.02861), in `SignedMoment` and `UnsignedMoment`: 1 byte for each number of tensors of at least 4,096
    numbers in whole blocks of 256. A reset is exact there as well.

    Numerics: moments, bias corrections and updates in float32, or the parameter's dtype if that is wider, whatever the
    parameter is stored in: in bfloat16 ``nu * 0.999`` would round to ``nu``. In 8 bit an update is computed of the new
    moments before they are rounded.
    """
    if moments not in ("float32", "8bit"):
        raise ValueError(f"`moments` must be 'float32' or '8bit', got {moments!r}")
    for name, value, holds in (
        ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ("eps", eps, eps >= 0),
        ("weight_decay", weight_decay, weight_decay >= 0),
    ):
        if not holds:
            raise ValueError(f"`{name}` must be {'in [0, 1)' if name == 'betas' else 'at least 0'}, got {value}")

    def init(trainable: Trainable) -> AdamWState:
        counts = {name: _zero_count(leaf) for name, leaf in trainable.items()}
        if moments == "8bit":
            mu = tree_map(partial(blank_moment, kind=SignedMoment), dict(trainable))
            nu = tree_map(partial(blank_moment, kind=UnsignedMoment), dict(trainable))
        else:
            mu, nu = (zero_moments(trainable) for _ in range(2))
        return AdamWState(mu, nu, counts, nothing_frozen(trainable))

    def update(
        grads: Trainable, opt_state: AdamWState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        grads = without_frozen(grads, opt_state.frozen_for)
        mu, nu = (decode_moments(tree) if moments == "8bit" else tree for tree in (opt_state.mu, opt_state.nu))
        mu = tree_map(lambda m, g: m * betas[0] + g.to(m.dtype) * (1 - betas[0]), mu, grads)
        nu = tree_map(lambda v, g: v * betas[1] + g.to(v.dtype).square() * (1 - betas[1]), nu, grads)
        count = tree_map(lambda c: c + 1, opt_state.count)

        def step(rate: Rate, m: Tensor, v: Tensor, c: Tensor, param: Tensor) -> Tensor:
            c = c.clamp(min=1).to(m.dtype)  # a count that restarts at the thaw is negative until then
            denominator = v.sqrt() / _bias_correction(betas[1], c).sqrt() + eps
            direction = m / _bias_correction(betas[0], c) / denominator
            return -rate * (direction + weight_decay * param.to(m.dtype) if weight_decay else direction)

        updates = {
            name: tree_map(partial(step, rate_of(lr, name)), mu[name], nu[name], count[name], leaf)
            for name, leaf in trainable.items()
        }
        if moments == "8bit":
            mu, nu = encode_moments(mu, opt_state.mu), encode_moments(nu, opt_state.nu)
        return Updates(updates, AdamWState(mu, nu, count, one_less(opt_state.frozen_for)))

    return Transform(init, update)


def zero_moments(trainable: Trainable) -> Tree:
    """Of the parameters' structure, in float32 or the parameter's dtype if that is wider."""

    def zero(leaf: Tensor) -> Tensor:
        return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))

    moments: Tree = tree_map(zero, dict(trainable))
    return moments


def nothing_frozen(trainable: Trainable) -> dict[str, Factors]:
    """The updates that each vector still sits out: none."""
    return {name: Factors(*_zero_count(leaf)) for name, leaf in trainable.items() if isinstance(leaf, Factors)}


def one_less(frozen_for: Mapping[str, Factors]) -> dict[str, Factors]:
    left: dict[str, Factors] = tree_map(lambda leaf: (leaf - 1).clamp(min=0), dict(frozen_for))
    return left


def without_frozen(grads: Trainable, frozen_for: Mapping[str, Factors]) -> Tree:
    """Gradients that are zero for frozen vectors."""
    return {
        name: tree_map(_freeze, grad, frozen_for[name]) if isinstance(grad, Factors) else grad
        for name, grad in grads.items()
    }


def rate_of(lr: Rate | Mapping[str, Rate], name: str) -> Rate:
    return lr[name] if isinstance(lr, Mapping) else lr


def _zero_count(leaf: Factors | Tensor) -> Factors | Tensor:
    if isinstance(leaf, Factors):
        return Factors(
            b=torch.zeros_like(leaf.b[..., :1, :], dtype=torch.int32),
            a=torch.zeros_like(leaf.a[..., :1], dtype=torch.int32),
        )
    return torch.zeros((), dtype=torch.int32, device=leaf.device)


def _freeze(grad: Tensor, frozen_for: Tensor) -> Tensor:
    return torch.where(frozen_for > 0, 0, grad)


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta ** count, without the cancellation that float32 suffers where beta is near 1."""
    return -torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)


def apply_updates(trainable: Trainable, updates: Trainable) -> Tree:
    """``trainable + updates``, rounded once to the parameters' dtype."""
    new: Tree = tree_map(lambda param, update: (param + update).to(param.dtype), dict(trainable), dict(updates))
    return new


class Clipped(NamedTuple):
    """What `clip_by_global_norm` returns."""

    grads: Tree
    norm: Float[Tensor, ""]  # before clipping


def clip_by_global_norm(
    grads: Trainable, max_norm: float, *, frozen: Mapping[str, Frozen | Tensor] | None = None
) -> Clipped:
    """Gradients whose norm, taken over all of them together, is at most `max_norm`.

    ``grads * min(1, max_norm / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_`. It comes before the switch, and
    the gradients of frozen vectors count (arXiv:2406.06564's implementation).

    Args:
        grads: of what is trained.
        max_norm: see above.
        frozen: the rest of the parameters, where factors are sharded: of their gradients each process has a share, and
            four bytes tell all of them of the others'.
    """
    shardings = factor_shardings(frozen or {})
    squares = [_squares(leaf) for name, grad in grads.items() if name not in shardings for leaf in tree_leaves(grad)]
    own = [_squares(leaf) for name in shardings for leaf in tree_leaves(grads[name])]
    if own:
        (group,) = {sharding.group for sharding in shardings.values()}
        squares.append(all_reduce(torch.stack(own).sum(), group))
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return Clipped(tree_map(lambda grad: grad * scale.to(grad.dtype), dict(grads)), norm)


def _squares(grad: Tensor) -> Tensor:
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum()

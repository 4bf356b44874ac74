"""AdamW with a step count for every factor vector, and what a switch does to the optimizer's state."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn.moments import (
    SignedMoment,
    UnsignedMoment,
    blank_moment,
    decode_moments,
    encode_moments,
    reset_moment,
)
from dynlora_fn.types import Factors, Plan, Plans, SidePlan, Trainable

Tree = dict[str, Any]
Rate: TypeAlias = Tensor | float
State = TypeVar("State")


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
    updates at the default betas), as in SwitchLoRA's implementation.

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
        frozen_for = {
            name: tree_map(torch.zeros_like, count) for name, count in counts.items() if type(count) is Factors
        }
        if moments == "8bit":
            mu = tree_map(partial(blank_moment, kind=SignedMoment), dict(trainable))
            nu = tree_map(partial(blank_moment, kind=UnsignedMoment), dict(trainable))
        else:
            mu, nu = (tree_map(_zero_moment, dict(trainable)) for _ in range(2))
        return AdamWState(mu, nu, counts, frozen_for)

    def update(
        grads: Trainable, opt_state: AdamWState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        grads = {
            name: tree_map(_freeze, grad, opt_state.frozen_for[name]) if isinstance(grad, Factors) else grad
            for name, grad in grads.items()
        }
        mu, nu = (decode_moments(tree) if moments == "8bit" else tree for tree in (opt_state.mu, opt_state.nu))
        mu = tree_map(lambda m, g: m * betas[0] + g.to(m.dtype) * (1 - betas[0]), mu, grads)
        nu = tree_map(lambda v, g: v * betas[1] + g.to(v.dtype).square() * (1 - betas[1]), nu, grads)
        count = tree_map(lambda c: c + 1, opt_state.count)

        def step(rate: Rate, m: Tensor, v: Tensor, c: Tensor, param: Tensor) -> Tensor:
            c = c.to(m.dtype)
            denominator = v.sqrt() / _bias_correction(betas[1], c).sqrt() + eps
            direction = m / _bias_correction(betas[0], c) / denominator
            return -rate * (direction + weight_decay * param.to(m.dtype) if weight_decay else direction)

        frozen_for = tree_map(lambda left: (left - 1).clamp(min=0), opt_state.frozen_for)
        updates = {
            name: tree_map(
                partial(step, lr[name] if isinstance(lr, Mapping) else lr), mu[name], nu[name], count[name], leaf
            )
            for name, leaf in trainable.items()
        }
        if moments == "8bit":
            mu, nu = encode_moments(mu, opt_state.mu), encode_moments(nu, opt_state.nu)
        return Updates(updates, AdamWState(mu, nu, count, frozen_for))

    return Transform(init, update)


def _zero_moment(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))


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


def clip_by_global_norm(grads: Trainable, max_norm: float) -> Clipped:
    """Gradients whose norm, taken over all of them together, is at most `max_norm`.

    ``grads * min(1, max_norm / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_`. It comes before the switch, and
    the gradients of frozen vectors count (arXiv:2406.06564's implementation).
    """
    squares = [grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum() for grad in tree_leaves(grads)]
    norm = torch.stack(squares).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return Clipped(tree_map(lambda grad: grad * scale.to(grad.dtype), dict(grads)), norm)


def project_optimizer_state(opt_state: State, plan: Plans) -> State:
    """The state after a switch: the counterparts of switched vectors start afresh, and nothing else changes.

    For each active entry of side a, the state of ``b[:, k]`` becomes zero, moments and count, and the vector is frozen
    for ``plan.frozen_for`` updates; likewise ``a[k]`` for side b (arXiv:2406.06564, section 3.3). The switched vector
    keeps its slot's state, since its gradient depends on the counterpart and not on itself.

    Args:
        opt_state: any tree of tuples, dicts and lists that somewhere holds dicts by parameter name, with `Factors` of
            ``(..., rank)`` on side b and ``(..., rank, .)`` on side a, as `adamw`'s does. Dicts in a field or under a
            key called ``frozen_for`` are set to the plan's number of updates, all others to zero.
        plan: by name.

    Raises:
        ValueError: if the plan is for a parameter that the state has no factors of.
    """
    if isinstance(plan, Plan):
        raise ValueError("`plan` must be by parameter name to be looked up in the state, got a single Plan")
    seen: set[str] = set()
    projected: State = _project(opt_state, plan, is_frozen_for=False, seen=seen)
    if missing := set(plan) - seen:
        raise ValueError(
            f"`opt_state` must hold the factors of every planned parameter, got none for {sorted(missing)}"
        )
    return projected


def _project(tree: Any, plan: Plans, *, is_frozen_for: bool, seen: set[str]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _project_entry(key, leaf, plan, is_frozen_for, seen) for key, leaf in tree.items()}
    if hasattr(tree, "_fields"):
        leaves = zip(tree._fields, tree, strict=True)
        return type(tree)(*(_project_entry(field, leaf, plan, is_frozen_for, seen) for field, leaf in leaves))
    if isinstance(tree, tuple | list):
        return type(tree)(_project(leaf, plan, is_frozen_for=is_frozen_for, seen=seen) for leaf in tree)
    return tree


def _project_entry(key: Any, leaf: Any, plan: Plans, is_frozen_for: bool, seen: set[str]) -> Any:
    if isinstance(leaf, Factors):
        if key not in plan:
            return leaf
        seen.add(key)
        return _reset(leaf, plan[key], is_frozen_for)
    return _project(leaf, plan, is_frozen_for=is_frozen_for or key == "frozen_for", seen=seen)


def _reset(leaf: Factors, plan: Plan, is_frozen_for: bool) -> Factors:
    new = plan.frozen_for if is_frozen_for else torch.zeros((), device=plan.frozen_for.device)
    b, a = (side.codes if isinstance(side, SignedMoment | UnsignedMoment) else side for side in leaf)
    is_reset_b = _switched_slots(plan.a, b.shape[-1])[..., None, :]
    is_reset_a = _switched_slots(plan.b, a.shape[-2])[..., :, None]
    return Factors(b=_filled(leaf.b, is_reset_b, new), a=_filled(leaf.a, is_reset_a, new))


def _filled(side: Any, is_filled: Tensor, value: Tensor) -> Any:
    if isinstance(side, SignedMoment | UnsignedMoment):
        return reset_moment(side, is_filled)
    return torch.where(is_filled, value.to(side), side)


def _switched_slots(plan: SidePlan, rank: int) -> Tensor:
    slots = torch.arange(rank, device=plan.slots.device)
    return ((plan.slots[..., None, :] == slots[:, None]) & plan.active[..., None, :]).any(-1)

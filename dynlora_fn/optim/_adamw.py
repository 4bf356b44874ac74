"""AdamW with a step count for every factor vector."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._torch import tree_map
from dynlora_fn._core._types import Factors, Trainable
from dynlora_fn.optim._eight_bit import SignedMoment, UnsignedMoment, decode_moments, empty_moment, encode_moments
from dynlora_fn.optim._freeze import _zero_count, count_down, no_vectors_frozen, zero_frozen
from dynlora_fn.optim._transform import Rate, Transform, Tree, Updates, rate_of, zero_moments


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
            mu = tree_map(partial(empty_moment, kind=SignedMoment), dict(trainable))
            nu = tree_map(partial(empty_moment, kind=UnsignedMoment), dict(trainable))
        else:
            mu, nu = (zero_moments(trainable) for _ in range(2))
        return AdamWState(mu, nu, counts, no_vectors_frozen(trainable))

    def update(
        grads: Trainable, opt_state: AdamWState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        grads = zero_frozen(grads, opt_state.frozen_for)
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
        return Updates(updates, AdamWState(mu, nu, count, count_down(opt_state.frozen_for)))

    return Transform(init, update)


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta ** count, without the cancellation that float32 suffers where beta is near 1."""
    return -torch.expm1(count * math.log(beta)) if beta else torch.ones_like(count)

"""AdamW with a step count for every factor vector."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from dynlora_fn._core._check import check_choice, check_number
from dynlora_fn._core._types import Trainable, is_factors
from dynlora_fn.optim._check_state import check_state
from dynlora_fn.optim._complex import in_real_numbers
from dynlora_fn.optim._eight_bit import SignedMoment, UnsignedMoment, decode_moments, empty_moments, encode_moments
from dynlora_fn.optim._elementwise import elementwise
from dynlora_fn.optim._freeze import FreezeState, freeze_counterparts, zero_counts
from dynlora_fn.optim._leaves import spent
from dynlora_fn.optim._roles import register_state
from dynlora_fn.optim._roots import square_root
from dynlora_fn.optim._transform import (
    Rate,
    Transform,
    Tree,
    Updates,
    check_betas,
    check_rates,
    rate_of,
    refuse_decay_of_factors,
    settings_of,
    zero_moments,
)


class AdamWState(NamedTuple):
    """The state of `adamw` inside its `FreezeState`.

    All fields are trees that mirror the trainable parameters.
    """

    mu: Tree  # mean of the gradients: in float32, in the parameter's dtype if that is wider, or in 8 bits
    nu: Tree  # mean of the squared gradients, in the same dtypes
    # number of updates, int32: 0-d for full-rank tensors, and ``Factors(b=(*stack, 1, rank), a=(*stack, rank, 1))``
    count: Tree  # type: ignore[assignment]


register_state(AdamWState, {"mu": "first_moment", "nu": "second_moment", "count": "count"})


def adamw(
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    factor_decay: float = 0.0,
    moments: Literal["float32", "8bit"] = "float32",
) -> Transform:
    """Create AdamW with a step count for every factor vector.

    Without switches it is equal to `torch.optim.AdamW` (arXiv:1711.05101). With n the count of the vector::

        mu = betas[0] * mu + (1 - betas[0]) * grad
        nu = betas[1] * nu + (1 - betas[1]) * grad**2
        direction = mu / (1 - betas[0]**n) / (sqrt(nu / (1 - betas[1]**n)) + eps)
        updates = -lr * (direction + decay * trainable)

    Here `decay` is `weight_decay` for full-rank tensors and `factor_decay` for factors.

    Every entry of a factor moves by about `lr`, so the weight moves in proportion to its alpha. With the alpha of PEFT
    (see `init` and `load_adapter`), a learning rate gives the same steps as in PEFT.

    `project_optimizer_state` resets single vectors, so the bias correction needs a count for each vector. A frozen
    vector does not move (see `freeze_counterparts`), but its count increases. So after the thaw, the bias correction
    makes its steps smaller: 0.52 of a full step after 5 frozen updates with the default betas. The implementation of
    SwitchLoRA does the same (rule "reset"). Rule "reset_thawed" starts the count at the thaw.

    Args:
        betas: The decay rates of the mean gradient and of the mean squared gradient, each in [0, 1).
        eps: The number added to the denominator. With 0, the update of a vector that never had a gradient is 0 / 0,
            unless the vector is frozen.
        weight_decay: The decoupled decay of full-rank tensors. A low-rank weight cannot be decayed through its factors.
            Decay it with `dl.optim.decay`.
        factor_decay: The decoupled decay of each factor, as in PEFT with `torch.optim.AdamW`. It does not decay the
            weight, but pulls the weight to its base. Frozen vectors decay too. Use it for LoRA without switches.
        moments: "float32", or "8bit" to store both moments between updates as torchao's OptimState8bit does
            (arXiv:2110.02861), in `SignedMoment` and `UnsignedMoment`. This takes 1 byte for each entry. Tensors of
            fewer than 4,096 entries, or of a size that is not a multiple of 256, stay in full precision. So do shards
            that differ in size. A reset of 8-bit moments is exact.

    Returns:
        The optimizer. Its state is a `FreezeState` around an `AdamWState`. The `lr` of its `update` is a number, a 0-d
        tensor, or a dict of either by parameter name. With a tensor, a new learning rate does not recompile a compiled
        step.

    Raises:
        TypeError: If a setting is not a number. In `init` and `update`, if a leaf is not a tensor of a floating or
            complex dtype.
        ValueError: If `betas`, `eps`, `weight_decay`, `factor_decay` or `moments` is out of range. In `init` and
            `update`, if `weight_decay` is not 0 and `trainable` has factors. In `update`, if `grads` or the state does
            not have the names and shapes of `trainable`, or `lr` is negative or not finite.
        NotImplementedError: In `update`, if moments that are stored in 8 bits require a gradient or have a tangent.

    Numerics: Moments, bias corrections and updates are in float32, or in the parameter's dtype if that is wider. In
        bfloat16, ``nu * 0.999`` would round to ``nu``. With 8-bit moments, an update reads the new moments before they
        are rounded. Updates can be differentiated with respect to gradients and moments, except 8-bit moments.

    Example:
        >>> import torch
        >>> optimizer, trainable = adamw(), {"w": torch.ones(2)}
        >>> opt_state = optimizer.init(trainable)
        >>> updates, opt_state = optimizer.update({"w": torch.tensor([3.0, -1.0])}, opt_state, trainable, lr=0.5)
        >>> updates["w"]
        tensor([-0.5000,  0.5000])
    """
    check_choice("moments", moments, ("float32", "8bit"))
    betas = check_betas(betas)
    eps = check_number("eps", eps, least=0)
    weight_decay = check_number("weight_decay", weight_decay, least=0)
    factor_decay = check_number("factor_decay", factor_decay, least=0)

    def init(trainable: Trainable) -> AdamWState:
        refuse_decay_of_factors(weight_decay, trainable)
        counts = {name: zero_counts(leaf) for name, leaf in trainable.items()}
        if moments == "8bit":
            mu = {name: empty_moments(leaf, SignedMoment) for name, leaf in trainable.items()}
            nu = {name: empty_moments(leaf, UnsignedMoment) for name, leaf in trainable.items()}
        else:
            mu, nu = (zero_moments(trainable) for _ in range(2))
        return AdamWState(mu, nu, counts)

    @elementwise(results=3)
    def step(rate: Rate, mu: Any, nu: Any, grad: Any, *param_and_count: Any) -> tuple[Any, Any, Any]:
        *param, count = param_and_count
        mu = spent(mu * betas[0]) + grad.to(mu.dtype) * (1 - betas[0])
        nu = spent(nu * betas[1]) + spent(grad.to(nu.dtype).square()) * (1 - betas[1])
        count = count.clamp(min=1).to(mu.dtype)  # under "reset_thawed" the count of a frozen vector is negative
        denominator = spent(spent(square_root(nu)) / _bias_correction(betas[1], count).sqrt()) + eps
        direction = spent(mu / _bias_correction(betas[0], count)) / denominator
        if weight_decay:
            direction = spent(direction) + weight_decay * param[0].to(mu.dtype)
        return mu, nu, -rate * spent(direction)

    def update(
        grads: Trainable, opt_state: AdamWState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        refuse_decay_of_factors(weight_decay, trainable)
        check_state(opt_state, AdamWState, trainable, eight_bit=moments == "8bit")
        mu, nu = (decode_moments(tree) if moments == "8bit" else tree for tree in (opt_state.mu, opt_state.nu))
        count = _next_count(opt_state.count)
        decayed = [trainable] if weight_decay else []
        mu, nu, updates = step(mu, nu, grads, *decayed, small=count, settings=settings_of(lr))
        if moments == "8bit":
            mu, nu = _encoded(mu, opt_state.mu), _encoded(nu, opt_state.nu)
        return Updates(updates, AdamWState(mu, nu, count))

    transform = freeze_counterparts(Transform(init, update))
    return in_real_numbers(_decay_factors(transform, factor_decay) if factor_decay else transform)


def _decay_factors(inner: Transform, factor_decay: float) -> Transform:
    """Wrap `inner` so that it also decays each factor, with decay and step times `lr`."""

    def update(
        grads: Trainable, opt_state: FreezeState, trainable: Trainable, *, lr: Rate | Mapping[str, Rate]
    ) -> Updates:
        check_rates("lr", lr, trainable)
        steps, opt_state = inner.update(grads, opt_state, trainable, lr=1.0)  # a factor of -1 keeps all other bits

        updates = _add_decay(
            steps,
            trainable,
            settings=lambda name: (rate_of(lr, name), factor_decay if is_factors(trainable[name]) else 0.0),
        )
        return Updates(updates, opt_state)

    return Transform(inner.init, update)


def _encoded(tree: Tree, like: Tree) -> Tree:
    """Encode the moments that `like` has as codes, and return the others unchanged."""
    return {name: encode_moments(leaf, like[name], name) for name, leaf in tree.items()}


@elementwise()
def _next_count(count: Any) -> Any:
    return count + 1


@elementwise()
def _add_decay(rate: Rate, decay: float, step: Any, param: Any) -> Any:
    return rate * (step - decay * param.to(step.dtype) if decay else step)


def _bias_correction(beta: float, count: Any) -> Any:
    """Return ``1 - beta ** count``, for a count of at least 1.

    `expm1` avoids cancellation in float32 for a beta close to 1.
    """
    return -(count * (math.log(beta) if beta else -math.inf)).expm1()

"""The optimizer of each parameter, its learning rate and its decay."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor

import dynlora_fn as dl
from models.pretrain.config import Config
from models.pretrain.learning_rate import dense_lr_scale


class Optimizer(NamedTuple):
    """An optimizer that decays weights before each update."""

    init: Callable[..., Any]
    decay: Callable[..., dict[str, Any]]  # (params, names of the trained ones, lr) -> params
    update: Callable[..., dl.optim.Updates]


def inner_names(config: Config, params: dict[str, Any], targets: Sequence[str]) -> frozenset[str]:
    """Return the names of the low-rank weights.

    For full, these are the weights that the other methods make low-rank.
    """
    training = config.training
    globs = training.targets or targets if training.method == "full" else ()
    return frozenset(
        name
        for name, param in params.items()
        if isinstance(param, dl.LowRank) or any(fnmatchcase(name, glob) for glob in globs)
    )


def make_optimizer(config: Config, inner: frozenset[str]) -> Optimizer:
    """Return the optimizer.

    It takes the learning rate of the `inner` weights and scales it for the others.
    """
    weight_decay, moments, scale = config.optimization.weight_decay, config.precision.moments, dense_lr_scale(config)
    is_of_weights = config.decays_weights()
    decay_in_update = 0.0 if is_of_weights else weight_decay
    optimizers = {"adamw": dl.optim.adamw(factor_decay=decay_in_update, moments=moments), "muon": dl.optim.muon()}
    rest = dl.optim.adamw(weight_decay=decay_in_update, moments=moments)
    # The labels are in the names of a checkpoint's tensors: another label makes older checkpoints unreadable.
    transforms = {"inner": optimizers[config.inner_optimizer()], "rest": rest}
    both = dl.optim.multi_transform(transforms, lambda name, _: "inner" if name in inner else "rest")

    def rates(lr: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: lr if name in inner else lr * scale for name in names}

    def decay(params: dict[str, Any], trained: Iterable[str], lr: Tensor) -> dict[str, Any]:
        """Decay the trained weights as `torch.optim.AdamW` does."""
        if not (weight_decay and is_of_weights):
            return params
        return dl.optim.decay(params, {name: rate * weight_decay for name, rate in rates(lr, trained).items()})

    def update(grads: Any, opt_state: Any, trainable: Any, *, lr: Tensor) -> dl.optim.Updates:
        return both.update(grads, opt_state, trainable, lr=rates(lr, trainable))

    return Optimizer(both.init, decay, update)

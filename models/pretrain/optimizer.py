"""Choose the optimizer, learning rate and decay of each parameter."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

import dynlora_fn as dl
from models.pretrain.config import Config
from models.pretrain.learning_rate import dense_lr_scale

_HEAD_MOMENTUM = 0.9  # as in arXiv:2506.16659


class Optimizer(NamedTuple):
    """An optimizer whose weight decay is a separate function."""

    init: Callable[..., Any]
    decay: Callable[..., dict[str, Any]]  # (params, names of trained parameters, lr) -> params, before the update
    update: Callable[..., dl.optim.Updates]


def make_optimizer(config: Config, inner: frozenset[str], model: nn.Module) -> Optimizer:
    """Build the optimizer of all parameters.

    Its learning rate is the rate of the weights in `inner`. It scales this rate for the other parameters.

    Args:
        config: The options.
        inner: The names of the weights that are low-rank, or would be low-rank with another method than full.
        model: The module, which shows which other weights are embeddings and heads.
    """
    weight_decay, moments, scale = config.optimization.weight_decay, config.precision.moments, dense_lr_scale(config)
    is_of_weights = config.decays_weights()
    decay_in_update = 0.0 if is_of_weights else weight_decay
    optimizers = {
        "adamw": dl.optim.adamw(factor_decay=decay_in_update, moments=moments),
        "muon": dl.optim.muon(moments=moments),
    }
    rest = dl.optim.adamw(weight_decay=decay_in_update, moments=moments)
    # The labels are in the names of a checkpoint's tensors: another label makes older checkpoints unreadable.
    transforms = {"inner": optimizers[config.inner_optimizer()], "rest": rest}
    matrices: dict[str, str] = {}
    if config.optimization.dense_optimizer == "scale":
        matrices = _embeddings_and_heads(model)
        transforms["embedding"] = dl.optim.normalized_sgd(axis=-2, weight_decay=decay_in_update)
        transforms["head"] = dl.optim.normalized_sgd(momentum=_HEAD_MOMENTUM, weight_decay=decay_in_update)
    both = dl.optim.multi_transform(
        transforms, lambda name, _: "inner" if name in inner else matrices.get(name, "rest")
    )

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


def _embeddings_and_heads(model: nn.Module) -> dict[str, str]:
    """Return labels for the weights of embeddings and linear layers, by name.

    Every linear layer is labeled as a head. The caller uses the label only for weights that are not inner.
    """
    labels = {nn.Embedding: "embedding", nn.Linear: "head"}
    return {f"{name}.weight": labels[type(module)] for name, module in model.named_modules() if type(module) in labels}

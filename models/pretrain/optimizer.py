"""The optimizer of each parameter, its learning rate and its decay."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

import dynlora_fn as dl
from models.pretrain.config import Config
from models.pretrain.learning_rate import dense_lr_scale

_HEAD_MOMENTUM = 0.9  # as in arXiv:2506.16659


class Optimizer(NamedTuple):
    """An optimizer that decays weights before each update."""

    init: Callable[..., Any]
    decay: Callable[..., dict[str, Any]]  # (params, names of the trained ones, lr) -> params
    update: Callable[..., dl.optim.Updates]


def make_optimizer(config: Config, inner: frozenset[str], model: nn.Module) -> Optimizer:
    """Return the optimizer.

    `inner` names the weights that are low-rank, or would be with another method than full. The optimizer takes their
    learning rate and scales it for the others. `model` says which of these are embeddings and heads.
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
    """Return the label of each embedding and of each linear layer.

    A linear layer is a head if it is not inner.
    """
    labels = {nn.Embedding: "embedding", nn.Linear: "head"}
    return {f"{name}.weight": labels[type(module)] for name, module in model.named_modules() if type(module) in labels}

"""The learning rate at each step: linear warm-up, then a cosine."""

import math
from dataclasses import replace

from models.pretrain.config import Config


def lr_at(config: Config, step: int) -> float:
    """Return the learning rate of the factors at a step, counted from 0.

    For full, it is the learning rate of the weights that other methods make low-rank. ReLoRA repeats the warm-up after
    each merge.
    """
    warmup = config.optimization.warmup
    lr = peak_lr(config) * warmup_cosine(step, config.training.steps, warmup)
    merge_every = config.switching.merge_every
    if config.training.method == "relora" and step >= merge_every:
        lr *= min(1.0, (step % merge_every + 1) / max(1, warmup // 10))
    return lr


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate as a fraction of its peak.

    It rises linearly in the warm-up, and then falls along a cosine to a tenth at the last step.
    """
    progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2) * min(1.0, (step + 1) / max(1, warmup))


def peak_lr(config: Config) -> float:
    """Return the option `lr`, or by default the rate of the method and optimizer."""
    if config.optimization.lr is not None:
        return config.optimization.lr
    rates = config.default_rates
    by_method = rates.muon if config.inner_optimizer() == "muon" else rates.adamw
    return by_method[config.training.method]


def dense_lr_scale(config: Config) -> float:
    """Return the learning rate of embedding, head and norms as a multiple of `lr_at`."""
    dense_lr = config.optimization.dense_lr
    if dense_lr is None and config.inner_optimizer() == "muon":
        dense_lr = config.default_rates.dense_with_muon
    return 1.0 if dense_lr is None else dense_lr / peak_lr(config)


def change_of_steps(config: Config, before: int, done: int) -> str:
    """Describe what a new number of steps changes for a resumed run.

    Args:
        config: The options with the new number of steps.
        before: The number of steps so far.
        done: The number of steps that are done.
    """
    steps = config.training.steps
    shorter = replace(config, training=replace(config.training, steps=before))
    rates = [lr_at(settings, done) for settings in (shorter, config)]
    return (
        f"steps were {before} and are {steps}: learning rate and switches follow the schedule of {steps} steps; "
        f"the rate of step {done + 1} is {rates[1]:.3g} instead of {rates[0]:.3g}"
    )

"""Check the options as far as this needs neither text nor model."""

import math

from models.pretrain.config import Config
from models.pretrain.device import find_device, run_device
from models.pretrain.plot import compared_runs
from models.pretrain.processes import SINGLE_PROCESS, Processes
from models.pretrain.tensorboard import summary_writer

_AT_LEAST_ONE = (
    *("rank", "steps", "batch_size", "seq_len", "grad_accum", "eval_every", "eval_batches", "save_every"),
    *("keep", "check_every", "merge_every", "dataset_characters"),
)
_NOT_NEGATIVE = ("warmup", "weight_decay", "freeze", "compensate", "seed", "sample_every")
_POSITIVE = ("lr", "dense_lr", "clip", "ratio", "interval")


def check(config: Config, processes: Processes = SINGLE_PROCESS) -> None:
    """Check the ranges of options, and options that exclude or need each other.

    Raises:
        ValueError: For the first invalid option. The message names the option, the requirement and the value.
    """
    _check_ranges(config)
    compared_runs(config.output.compare)
    if config.output.tensorboard:
        summary_writer()
    _check_combinations(config)
    _check_processes(config, processes)
    run_device(config)
    if config.precision.residual_device is not None:
        find_device("residual_device", config.precision.residual_device)


def _check_ranges(config: Config) -> None:
    options = config.options()
    for name in _AT_LEAST_ONE:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"`{name}` must be at least 1, got {options[name]}")
    for name in _NOT_NEGATIVE:
        if not options[name] >= 0:  # also refuses nan
            raise ValueError(f"`{name}` must not be negative, got {options[name]}")
        if options[name] == math.inf:
            raise ValueError(f"`{name}` must be finite, got inf")
    if options["seed"] >= 2**63:
        raise ValueError(f"`seed` must be less than 2**63, got {options['seed']}")
    for name in _POSITIVE:
        value = options[name]
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"`{name}` must be positive and finite, got {value}")


def _check_combinations(config: Config) -> None:
    method, data = config.training.method, config.data
    if data.text and data.dataset:
        raise ValueError(
            f"`text` and `dataset` must not both be given, got {str(data.text[0])!r} and {data.dataset!r}; omit one"
        )
    if config.switching.candidates == "pool" and method != "switchlora":
        raise ValueError(f"`candidates` must be 'seeded' except for switchlora, got 'pool' for {method}")
    if config.trained() == "b":
        _check_one_side(config)
    if config.training.compensate and method == "full":
        raise ValueError(
            f"`compensate` must be 0 for full, got {config.training.compensate}; full-rank training misses no gradient"
        )
    if config.precision.base_dtype != "float32" and method == "full":
        raise ValueError(
            f"`base_dtype` must be float32 for full, got {config.precision.base_dtype}; "
            "full-rank training has no frozen bases"
        )
    if config.machine.compile and config.machine.eager:
        raise ValueError("`compile` and `eager` must not both be given; omit one")
    if config.output.resume and config.output.out is None:
        raise ValueError("`out` must be given with --resume, got none; pass the folder of the run")


def _check_one_side(config: Config) -> None:
    if config.training.method == "full":
        raise ValueError("`trained` must be 'both' for full, got 'b'; full-rank training has no factors")
    if config.switching.candidates == "pool":
        raise ValueError("`candidates` must be 'seeded' with --trained b, got 'pool', whose vectors are not orthogonal")
    if config.machine.shard_factors:
        raise ValueError("`shard_factors` must not come with --trained b, whose factors cannot be sharded; omit one")


def _check_processes(config: Config, processes: Processes) -> None:
    machine, batch_size = config.machine, config.data.batch_size
    if batch_size < processes.world_size:
        raise ValueError(
            f"`batch_size` must be at least the number of processes, {processes.world_size}, got {batch_size}"
        )
    if machine.shard and processes.group is None:
        raise ValueError("`shard` must have processes to shard over, got a single one; start the command with torchrun")
    if machine.shard and config.training.method == "full":
        raise ValueError("`shard` must come with frozen bases, got full, which has none; omit --shard")
    if machine.shard_factors:
        _check_sharded_factors(config)


def _check_sharded_factors(config: Config) -> None:
    if config.training.compensate:
        raise ValueError(
            f"`compensate` must be 0 with --shard-factors, got {config.training.compensate}; "
            "it needs gradients of dense weights, which no process has"
        )
    if config.switching.candidates == "pool":
        raise ValueError(
            "`candidates` must be 'seeded' with --shard-factors, got 'pool'; a pool stores vectors that are not sharded"
        )
    if not config.machine.shard:
        raise ValueError("`shard_factors` must come with --shard, got it without; sharded factors need sharded bases")

"""Whether a run compiles its step.

It always does on a GPU. On a CPU it does where that wins back the time of compiling.
"""

import importlib.util
import os
import shutil
from dataclasses import replace
from typing import Any, TypeVar

from models.pretrain.config import Config
from models.pretrain.device import run_device

# Of a step on a CPU: what compiling takes and saves, and the speed from which steps are estimated. Nothing is measured,
# because a run must make the same choice each time.
COMPILE_SECONDS = 180.0
_SAVED_FRACTION = 1 / 3
_FLOPS_PER_SECOND = 5e10

ConfigT = TypeVar("ConfigT", bound=Config)


def with_choice(config: ConfigT, parameters: int, world_size: int) -> ConfigT:
    """Return the options of a new run with the choice whether to compile.

    A choice of the user is not changed.

    Args:
        config: The options.
        parameters: The number of parameters of the model.
        world_size: The number of processes that divide a batch.
    """
    machine = config.machine
    if machine.compile or machine.eager or not _has_compiler(config):
        return config
    pays = run_device(config).type != "cpu" or saved_seconds(config, parameters, world_size) > COMPILE_SECONDS
    return replace(config, machine=replace(machine, compile=pays))


def saved_seconds(config: Config, parameters: int, world_size: int) -> float:
    """Return an estimate of what a compiled step saves over the run on a CPU.

    A step takes 6 floating-point operations for each parameter and token.
    """
    data = config.data
    tokens = config.training.steps * data.grad_accum * data.batch_size * data.seq_len / world_size
    return 6 * parameters * tokens / _FLOPS_PER_SECOND * _SAVED_FRACTION


def _has_compiler(config: Config) -> bool:
    if run_device(config).type != "cpu":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def announcement(config: Config, parameters: int, world_size: int) -> str:
    """Return a line that says whether the step is compiled, and why."""
    if config.machine.compile:
        cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the cache of torch")
        return f"the step is compiled: minutes the first time, and faster from {cache} in later runs"
    saved = saved_seconds(config, parameters, world_size)
    return f"the step is not compiled: that takes about {COMPILE_SECONDS:.0f} s and would save about {saved:.0f} s"


def count_parameters(params: dict[str, Any]) -> int:
    """Return the number of elements of all weights."""
    return sum(param.shape.numel() for param in params.values())

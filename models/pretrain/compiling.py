"""Choose whether a run compiles its step.

On a GPU it is compiled. On a CPU it is compiled if the faster steps save more time than compiling takes.
"""

import importlib.util
import os
import shutil
from dataclasses import replace
from typing import Any, TypeVar

from models.pretrain.config import Config
from models.pretrain.device import run_device

# Estimates for a CPU. Nothing is measured, because equal options must lead to the same choice each time.
COMPILE_SECONDS = 180.0  # the time to compile a step
_SAVED_FRACTION = 1 / 3  # the fraction of the time of a step that compiling saves
_FLOPS_PER_SECOND = 5e10  # the speed of a step that is not compiled

ConfigT = TypeVar("ConfigT", bound=Config)


def with_choice(config: ConfigT, parameters: int, world_size: int) -> ConfigT:
    """Return the options of a new run, with `compile` chosen.

    They are unchanged if the user has set `compile` or `eager`, or if there is no compiler.

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
    """Estimate how many seconds compiled steps save in the whole run on a CPU.

    A step is counted as 6 floating-point operations for each parameter and token.
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

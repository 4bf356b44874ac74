"""Run the programs in `models` as console scripts, outside the repository.

The folder `models` is installed as `dynlora_models`, because a package called `models` would collide with others in an
environment. Its modules import each other as `models`, their name in the repository. So the process of a script gives
the package this name too.
"""

import sys
from importlib import import_module
from typing import NoReturn


def pretrain() -> None:
    """Run `models.pretrain`."""
    _run("pretrain")


def finetune() -> None:
    """Run `models.finetune`."""
    _run("finetune")


def generate() -> None:
    """Run `models.generate`."""
    _run("generate")


def evaluate() -> None:
    """Run `models.evaluate`."""
    _run("evaluate")


def _run(program: str) -> None:
    sys.modules["models"] = import_module("dynlora_models")
    try:
        main = import_module(f"models.{program}.__main__").main
    except ModuleNotFoundError as error:
        if str(error.name).startswith("models"):
            raise
        _stop(f"dynlora-{program} needs the package {error.name!r}: pip install 'dynlora-fn[train]'")
    main()


def _stop(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

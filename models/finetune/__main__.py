"""Run `python -m models.finetune`."""

import os

# Set before torch loads OpenMP, for the reason given in models/pretrain/__main__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from models.finetune.config import Config
from models.finetune.run import prepare
from models.pretrain.command import run_command


def main() -> None:
    """Run the command line."""
    files = "model/", "adapter/", "loss.png", "metrics.jsonl", "summary.json", "checkpoints/"
    run_command(Config, prepare, module="models.finetune", files=files)


if __name__ == "__main__":
    main()

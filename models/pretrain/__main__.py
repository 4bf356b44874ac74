"""Run `python -m models.pretrain`."""

import os

# Set before torch loads OpenMP: a thread that waits then sleeps soon instead of spinning. A step of the default model
# on two cores takes 0.6 s with it and 5.8 s without beside another busy process; without one, 0.22 s and 0.19 s.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from models.pretrain.command import run_command
from models.pretrain.config import Config
from models.pretrain.prepared import prepare


def main() -> None:
    """Run the command line."""
    files = "model.safetensors", "model/", "loss.png", "metrics.jsonl", "summary.json", "checkpoints/"
    run_command(Config, prepare, module="models.pretrain", files=files)


if __name__ == "__main__":
    main()

"""`python -m models.pretrain`"""

import os

# Before torch loads OpenMP: threads that wait for each other soon sleep instead of spinning on. Beside another busy
# process on two cores, a step of the default model took 0.6 s with it and 5.8 s without; alone 0.22 s and 0.19 s.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from models.pretrain.command import run_command
from models.pretrain.config import Config
from models.pretrain.run import prepare


def main() -> None:
    """Runs the command line."""
    files = "model.safetensors, loss.png, metrics.jsonl, summary.json, checkpoints/"
    run_command(Config, prepare, module="models.pretrain", files=files)


if __name__ == "__main__":
    main()

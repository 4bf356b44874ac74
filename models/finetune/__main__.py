"""`python -m models.finetune`"""

import os

# As in models.pretrain.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from models.finetune.config import Config
from models.finetune.run import prepare
from models.pretrain.command import run_command


def main() -> None:
    """Runs the command line."""
    files = "model/, adapter/, loss.png, metrics.jsonl, summary.json, checkpoints/"
    run_command(Config, prepare, module="models.finetune", files=files)


if __name__ == "__main__":
    main()

"""Run `python -m models.compare`."""

import os

# Set before torch loads OpenMP, for the reason given in models/pretrain/__main__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from models.compare.run import compare
from models.program import one_line_errors


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        compare()


if __name__ == "__main__":
    main()

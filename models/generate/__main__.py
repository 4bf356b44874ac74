"""Run `python -m models.generate`."""

import os

# Set before torch loads OpenMP, for the reason given in models/pretrain/__main__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import tyro

from models.generate.run import Options, generate
from models.pretrain.stopping import program
from models.program import one_line_errors, print_text


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog=" ".join(program("models.generate")))
    with one_line_errors():
        print_text(generate(options))


if __name__ == "__main__":
    main()

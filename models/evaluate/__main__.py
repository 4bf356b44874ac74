"""Run `python -m models.evaluate`."""

import os

# Set before torch loads OpenMP, for the reason given in models/pretrain/__main__.py.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import json

import tyro

from models.evaluate.run import Options, evaluate, lines_of
from models.pretrain.stopping import program
from models.program import one_line_errors, print_text


def main() -> None:
    """Run the command line."""
    options = tyro.cli(Options, prog=" ".join(program("models.evaluate")))
    with one_line_errors():
        evaluation = evaluate(options)
        print_text(json.dumps(evaluation) if options.json else "\n".join(lines_of(evaluation)))


if __name__ == "__main__":
    main()

"""Run ``python -m bench.growth``."""

import tyro

from bench.growth.study import Growth, main

if __name__ == "__main__":
    main(tyro.cli(Growth))

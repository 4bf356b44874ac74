"""Run ``python -m bench.quality EXPERIMENT``."""

import tyro

from bench.quality.study import Quality, main

if __name__ == "__main__":
    main(tyro.cli(Quality))

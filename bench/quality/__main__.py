"""`python -m bench.quality EXPERIMENT`."""

import tyro

from bench.quality.command import Quality, main

if __name__ == "__main__":
    main(tyro.cli(Quality))

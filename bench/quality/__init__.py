"""Does low-rank training with switches train as well as full rank? `python -m bench.quality EXPERIMENT`."""

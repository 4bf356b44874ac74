"""Study whether switched factors train as well as full rank: ``python -m bench.quality EXPERIMENT``."""

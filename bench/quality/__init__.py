"""Study whether switched factors train as well as full rank.

Run ``python -m bench.quality EXPERIMENT``.
"""

"""Internal types and helpers for all packages: trees, stacks, dtypes, collectives.

Import public names from `dynlora_fn` and its packages, which re-export them.
"""

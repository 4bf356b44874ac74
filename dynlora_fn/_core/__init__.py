"""Internal: types, trees, stacks, dtypes and collectives for all packages.

Nothing here is public. Public names are re-exported by `dynlora_fn` and its packages.
"""

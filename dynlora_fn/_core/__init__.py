"""Internal: the types, trees, stacks, dtypes and collectives that all packages share.

Nothing here is public. Public names are re-exported by `dynlora_fn` and its packages.
"""

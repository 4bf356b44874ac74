"""Types, trees, stacks, dtypes, collectives and torch's private names. Internal."""

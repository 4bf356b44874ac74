"""Strategies for the kinds of weights that single tests need."""

from functools import partial

from dynlora_fn.testing import PLAIN, STORAGES, low_rank_params

plain_params = partial(low_rank_params, storages=PLAIN, deferred=False)  # whose base is one tensor
quantized_params = partial(
    low_rank_params, storages=[storage for storage in STORAGES if storage not in PLAIN[:2]], deferred=False
)

"""Test your transforms: hypothesis strategies, checkers and a stateful machine.

A checker takes a transform and draws weights, plans and optimizer states for it. If the transform breaks its promise,
the checker raises an error with the promise, what happened and the smallest example:

    >>> import torch
    >>> import dynlora_fn as dl
    >>> from dynlora_fn import testing
    >>> testing.check_preserves_weight(dl.merge)
    >>> testing.check_preserves_weight(dl.switch)  # takes two arguments: a weight and a plan

Install it with ``pip install 'dynlora-fn[testing]'``.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("the package `hypothesis` is not installed; run pip install 'dynlora-fn[testing]'") from error

from dynlora_fn.testing._compare import assert_same as assert_same
from dynlora_fn.testing._compare import assert_within as assert_within
from dynlora_fn.testing._compare import eps as eps
from dynlora_fn.testing._compare import untouched as untouched
from dynlora_fn.testing._compiled import check_compiles as check_compiles
from dynlora_fn.testing._compiled import check_vmap as check_vmap
from dynlora_fn.testing._machine import TransformMachine as TransformMachine
from dynlora_fn.testing._projection import check_state_projection as check_state_projection
from dynlora_fn.testing._promises import BrokenPromiseError as BrokenPromiseError
from dynlora_fn.testing._resumes import check_resumes as check_resumes
from dynlora_fn.testing._shadow import exact_weight as exact_weight
from dynlora_fn.testing._shadow import rounding as rounding
from dynlora_fn.testing._shadow import seen_weight as seen_weight
from dynlora_fn.testing._strategies import any_shapes as any_shapes
from dynlora_fn.testing._strategies import batches as batches
from dynlora_fn.testing._strategies import dtypes as dtypes
from dynlora_fn.testing._strategies import low_rank_params as low_rank_params
from dynlora_fn.testing._strategies import optimizer_states as optimizer_states
from dynlora_fn.testing._strategies import plans as plans
from dynlora_fn.testing._strategies import schedules as schedules
from dynlora_fn.testing._strategies import seeds as seeds
from dynlora_fn.testing._strategies import shapes as shapes
from dynlora_fn.testing._strategies import stacks as stacks
from dynlora_fn.testing._strategies import trees as trees
from dynlora_fn.testing._transforms import check_deterministic as check_deterministic
from dynlora_fn.testing._transforms import check_keeps_structure as check_keeps_structure
from dynlora_fn.testing._transforms import check_preserves_weight as check_preserves_weight
from dynlora_fn.testing._transforms import check_pure as check_pure
from dynlora_fn.testing._values import PLAIN as PLAIN
from dynlora_fn.testing._values import STORAGES as STORAGES
from dynlora_fn.testing._values import Shape as Shape
from dynlora_fn.testing._values import Storage as Storage
from dynlora_fn.testing._values import low_rank as low_rank
from dynlora_fn.testing._values import normal as normal
from dynlora_fn.testing._values import optimizer_state as optimizer_state
from dynlora_fn.testing._values import plan_of as plan_of
from dynlora_fn.testing._values import side_plan as side_plan

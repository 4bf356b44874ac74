"""Low-rank weights inside unmodified modules.

`call` runs a module with low-rank weights, and `linear` multiplies by one weight. `value_and_grad` computes gradients
of such calls, with `remat` and `checkpoint_contexts` to save memory. `explain` returns the cost of a training step.
"""

from dynlora_fn.nn._call import call as call
from dynlora_fn.nn._checkpoints import checkpoint_contexts as checkpoint_contexts
from dynlora_fn.nn._contraction_paths import ContractionPath as ContractionPath
from dynlora_fn.nn._dense import dense as dense
from dynlora_fn.nn._differentiate import ValueAndGrad as ValueAndGrad
from dynlora_fn.nn._explain import Cost as Cost
from dynlora_fn.nn._explain import DenseUse as DenseUse
from dynlora_fn.nn._explain import Explanation as Explanation
from dynlora_fn.nn._explain import explain as explain
from dynlora_fn.nn._linear import linear as linear
from dynlora_fn.nn._register import register_rule as register_rule
from dynlora_fn.nn._remat import remat as remat
from dynlora_fn.nn._value_and_grad import value_and_grad as value_and_grad

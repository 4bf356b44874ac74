"""Train low-rank weights and switch vectors of their factors into the base.

Every function is pure and works on plain tuples of tensors. A weight is ``base + alpha / rank * b @ a``. The README has
a complete training loop.
"""

import dynlora_fn._core._torch
from dynlora_fn import bases as bases
from dynlora_fn import interop as interop
from dynlora_fn import nn as nn
from dynlora_fn import optim as optim
from dynlora_fn import parallel as parallel
from dynlora_fn import schedules as schedules
from dynlora_fn import switching as switching
from dynlora_fn._core._stacking import unstack as unstack
from dynlora_fn._core._tree import combine as combine
from dynlora_fn._core._tree import partition as partition
from dynlora_fn._core._types import Factors as Factors
from dynlora_fn._core._types import Frozen as Frozen
from dynlora_fn._core._types import LowRank as LowRank
from dynlora_fn._core._types import Plan as Plan
from dynlora_fn._core._types import SidePlan as SidePlan
from dynlora_fn.compile._peak_memory import peak_memory as peak_memory
from dynlora_fn.compile._step import compile_step as compile_step
from dynlora_fn.interop._init import init as init
from dynlora_fn.interop._resize import resize as resize
from dynlora_fn.interop._state_dict import state_dict as state_dict
from dynlora_fn.nn._call import call as call
from dynlora_fn.nn._checkpoints import checkpoint_contexts as checkpoint_contexts
from dynlora_fn.nn._explain import explain as explain
from dynlora_fn.nn._linear import linear as linear
from dynlora_fn.nn._remat import remat as remat
from dynlora_fn.nn._value_and_grad import value_and_grad as value_and_grad
from dynlora_fn.optim._decay import decay as decay
from dynlora_fn.optim._project_state import project_optimizer_state as project_optimizer_state
from dynlora_fn.optim._transform import apply_updates as apply_updates
from dynlora_fn.switching._candidates import candidates as candidates
from dynlora_fn.switching._switch import switch as switch
from dynlora_fn.switching._weight import materialize as materialize
from dynlora_fn.switching._weight import merge as merge

dynlora_fn._core._torch.let_dynamo_replace()  # when all named tuples are defined

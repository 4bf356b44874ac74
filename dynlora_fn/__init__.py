"""Low-rank training whose factors change: pure functions over plain tuples.

``weight = base + b @ a / rank``. See the README for a whole training loop.
"""

from dynlora_fn.basis import Bounds as Bounds
from dynlora_fn.basis import basis_bounds as basis_bounds
from dynlora_fn.contraction import Path as Path
from dynlora_fn.contraction import linear as linear
from dynlora_fn.cost import Cost as Cost
from dynlora_fn.cost import Explanation as Explanation
from dynlora_fn.cost import explain as explain
from dynlora_fn.dither import Dithered as Dithered
from dynlora_fn.dither import dithered as dithered
from dynlora_fn.lowrank import BasisSlice as BasisSlice
from dynlora_fn.lowrank import Start as Start
from dynlora_fn.lowrank import basis_vectors as basis_vectors
from dynlora_fn.lowrank import init as init
from dynlora_fn.lowrank import materialize as materialize
from dynlora_fn.lowrank import merge as merge
from dynlora_fn.memory import Peak as Peak
from dynlora_fn.memory import peak_memory as peak_memory
from dynlora_fn.module import call as call
from dynlora_fn.optim import AdamWState as AdamWState
from dynlora_fn.optim import Clipped as Clipped
from dynlora_fn.optim import Transform as Transform
from dynlora_fn.optim import Updates as Updates
from dynlora_fn.optim import adamw as adamw
from dynlora_fn.optim import apply_updates as apply_updates
from dynlora_fn.optim import clip_by_global_norm as clip_by_global_norm
from dynlora_fn.optim import project_optimizer_state as project_optimizer_state
from dynlora_fn.pool import Pool as Pool
from dynlora_fn.pool import SidePool as SidePool
from dynlora_fn.pool import draw as draw
from dynlora_fn.pool import init_pool as init_pool
from dynlora_fn.pool import put_back as put_back
from dynlora_fn.recompute import remat as remat
from dynlora_fn.schedule import Schedule as Schedule
from dynlora_fn.schedule import every as every
from dynlora_fn.schedule import never as never
from dynlora_fn.schedule import switchlora as switchlora
from dynlora_fn.stacking import unstack as unstack
from dynlora_fn.step import Step as Step
from dynlora_fn.step import ValueAndGrad as ValueAndGrad
from dynlora_fn.step import compile_step as compile_step
from dynlora_fn.step import value_and_grad as value_and_grad
from dynlora_fn.switching import Switched as Switched
from dynlora_fn.switching import SwitchedParams as SwitchedParams
from dynlora_fn.switching import candidates as candidates
from dynlora_fn.switching import switch as switch
from dynlora_fn.tree import Partition as Partition
from dynlora_fn.tree import combine as combine
from dynlora_fn.tree import partition as partition
from dynlora_fn.types import Factors as Factors
from dynlora_fn.types import Frozen as Frozen
from dynlora_fn.types import LowRank as LowRank
from dynlora_fn.types import Plan as Plan
from dynlora_fn.types import SidePlan as SidePlan

"""Optimizers as pairs of pure functions, and the projection of their state.

An optimizer is a `Transform`. Call `project_optimizer_state` after every switch, clip gradients with
`clip_by_global_norm`, and add updates with `apply_updates`. `decay` and `average` act on weights and not on factors.
The README explains how to add an optimizer or a rule.
"""

from dynlora_fn.optim._adamw import AdamWState as AdamWState
from dynlora_fn.optim._adamw import adamw as adamw
from dynlora_fn.optim._average import average as average
from dynlora_fn.optim._clip import clip_by_global_norm as clip_by_global_norm
from dynlora_fn.optim._compensate import compensate as compensate
from dynlora_fn.optim._compensate import project_gradients as project_gradients
from dynlora_fn.optim._decay import decay as decay
from dynlora_fn.optim._eight_bit import SignedMoment as SignedMoment
from dynlora_fn.optim._eight_bit import UnsignedMoment as UnsignedMoment
from dynlora_fn.optim._freeze import FreezeState as FreezeState
from dynlora_fn.optim._freeze import freeze_counterparts as freeze_counterparts
from dynlora_fn.optim._multi import multi_transform as multi_transform
from dynlora_fn.optim._muon import muon as muon
from dynlora_fn.optim._normalized_sgd import normalized_sgd as normalized_sgd
from dynlora_fn.optim._project_factors import Change as Change
from dynlora_fn.optim._project_state import project_optimizer_state as project_optimizer_state
from dynlora_fn.optim._roles import Role as Role
from dynlora_fn.optim._roles import register_state as register_state
from dynlora_fn.optim._sgd_lion import MomentumState as MomentumState
from dynlora_fn.optim._sgd_lion import lion as lion
from dynlora_fn.optim._sgd_lion import sgd as sgd
from dynlora_fn.optim._transform import Transform as Transform
from dynlora_fn.optim._transform import Updates as Updates
from dynlora_fn.optim._transform import apply_updates as apply_updates

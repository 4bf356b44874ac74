"""Switch and merge factors, and generate or store the vectors that enter.

`switch` and `merge` do not change the weight, except for one rounding of the base. Schedules are in
`dynlora_fn.schedules`. The README says how to add one.
"""

from dynlora_fn._core._types import Alpha as Alpha
from dynlora_fn._core._types import FixedSide as FixedSide
from dynlora_fn._core._types import OneSidedFactors as OneSidedFactors
from dynlora_fn._core._types import ScaledFactors as ScaledFactors
from dynlora_fn.switching._basis import Bounds as Bounds
from dynlora_fn.switching._basis import basis_bounds as basis_bounds
from dynlora_fn.switching._candidates import candidates as candidates
from dynlora_fn.switching._fold import fold as fold
from dynlora_fn.switching._pool import draw as draw
from dynlora_fn.switching._pool import init_pool as init_pool
from dynlora_fn.switching._pool import put_back as put_back
from dynlora_fn.switching._pool_types import Pool as Pool
from dynlora_fn.switching._pool_types import SidePool as SidePool
from dynlora_fn.switching._switch import switch as switch
from dynlora_fn.switching._weight import BasisSlice as BasisSlice
from dynlora_fn.switching._weight import Start as Start
from dynlora_fn.switching._weight import basis_vectors as basis_vectors
from dynlora_fn.switching._weight import materialize as materialize
from dynlora_fn.switching._weight import merge as merge

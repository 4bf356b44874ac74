"""Schedules: which vectors are switched at which step.

They are pure functions of the step. A schedule maps a step and the parameters to a dict of plans, which `switch`
executes. Every process derives the same plan, and a resumed run continues with the plans of the run that was
interrupted.
"""

from dynlora_fn.switching._dithered import Dithered as Dithered
from dynlora_fn.switching._dithered import dithered as dithered
from dynlora_fn.switching._schedule import Schedule as Schedule
from dynlora_fn.switching._schedule import every as every
from dynlora_fn.switching._schedule import never as never
from dynlora_fn.switching._schedule import switchlora as switchlora

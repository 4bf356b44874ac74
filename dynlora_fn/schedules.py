"""Plans as pure functions of the step."""

from dynlora_fn.switching._dithered import Dithered as Dithered
from dynlora_fn.switching._dithered import dithered as dithered
from dynlora_fn.switching._schedule import Schedule as Schedule
from dynlora_fn.switching._schedule import every as every
from dynlora_fn.switching._schedule import never as never
from dynlora_fn.switching._schedule import switchlora as switchlora

"""The table of schedules.

An entry gives a schedule every test that is parametrized over the table.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dynlora_fn.schedules import Schedule, dithered, every, never, switchlora

# By name: a schedule as a function of the parameters and the number of steps, for ranks from 4 on.
SCHEDULES: dict[str, Callable[[Mapping[str, Any], int], Any]] = {
    "rate": lambda params, steps: Schedule(interval=10),
    "rate in batches": lambda params, steps: Schedule(interval=8, every=4, freeze=2),
    "rate that decays": lambda params, steps: switchlora(steps, interval=10),
    "count": lambda params, steps: every(3, 1, freeze=5),
    "count from a pool": lambda params, steps: every(4, from_pool=True),
    "never": lambda params, steps: never(),
    "dithered": lambda params, steps: dithered(Schedule(interval=10), params, total_steps=steps, seed=0),
}

"""Write a schedule: which vectors are switched, and when.

A schedule is any function of a step and the parameters that returns plans by name. `switch` executes the plans.
To add a schedule to the library, with all its tests, see `dynlora_fn/switching/README.md`.
"""

from dataclasses import dataclass

import torch

import dynlora_fn as dl


@dataclass(frozen=True)
class OneSlotAtATime:
    """A schedule that switches one slot of side a every `period` steps, in turn.

    A vector that enters is named by its index in the basis. At the start the slots have the vectors 0 to rank - 1, so
    the first vector to enter has the index `rank`. Each vector enters once.
    """

    period: int
    freeze: int = 5
    follows_update: bool = False  # it freezes the counterparts, so a step may switch before its update

    def __call__(self, step, params):
        return {name: self.plan(step, param) for name, param in params.items() if isinstance(param, dl.LowRank)}

    def plan(self, step, param):
        """Return the plan of one weight.

        Its tensors have the same shapes at each step, so nothing compiles again. `active` says which entries switch.
        """
        rank, device = param.factors.a.shape[-2], param.factors.a.device
        step = torch.as_tensor(step, device=device)[None]
        turn, active = step // self.period, (step + 1) % self.period == 0
        side = dl.SidePlan(slots=turn % rank, indices=rank + turn, active=active)
        return dl.Plan(
            b=dl.SidePlan(*(field[:0] for field in side)),  # no entries: side b is never switched
            a=side,
            frozen_for=torch.tensor(self.freeze, dtype=torch.int32, device=device),
        )


params = dl.init({"w": torch.eye(8)}, rank=4, seed=0, targets=["w"])
schedule, optimizer = OneSlotAtATime(period=10), dl.optim.adamw()
opt_state = optimizer.init(dl.partition(params).trainable)

switched = []
for step in range(40):
    plan = schedule(step, params)
    before = params["w"].factors.a
    params, _ = dl.switch(params, plan)
    opt_state = dl.project_optimizer_state(opt_state, plan)  # resets and freezes the counterparts
    moved = (params["w"].factors.a != before).any(1).nonzero().flatten().tolist()
    switched += [(step, slot) for slot in moved]
print(f"(step, slot): {switched}")
assert switched == [(9, 0), (19, 1), (29, 2), (39, 3)]

# The weight does not change, except for one rounding of the base at each switch.
torch.testing.assert_close(dl.materialize(params["w"]), torch.eye(8), rtol=0, atol=1e-5)
# The counterparts are frozen for the next five updates, which this guide does not make. The library's schedules never
# switch a frozen vector. A new schedule must leave `freeze` updates between the switches of a slot's two sides. This
# schedule never switches side b.
assert opt_state.frozen_for["w"].b.tolist() == [[5, 5, 5, 5]]

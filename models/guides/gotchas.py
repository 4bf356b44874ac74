"""Gotchas: each trap as a program of a few lines that goes wrong, and its fix.

Each function is one trap. The lines inside ``with refused(...)`` go wrong, with a part of their error as an argument.
"""

from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dynlora_fn as dl


@contextmanager
def refused(error, text):
    """Expect an error whose message contains a text, and print the message."""
    message = "no error"
    try:
        yield
    except error as caught:
        message = str(caught)
        print(f"{error.__name__}: {message.splitlines()[0]}")
    assert text in message, message


model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
params = dl.init(model, rank=2, seed=0, targets=["*.weight"])
x = torch.ones(4, 8)


def a_number_is_compiled_into_the_graph():
    """Pass a value that changes from step to step as a tensor.

    Each new Python number compiles the step again.
    """
    step = dl.compile_step(lambda state, lr: (state * lr, None), backend="aot_eager", donate=False)
    step(x, 0.1)
    with torch.compiler.set_stance("fail_on_recompile"), refused(RuntimeError, "recompile"):
        step(x, 0.2)
    # The fix: a tensor.
    step(x, torch.tensor(0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        step(x, torch.tensor(0.2))


def a_donated_state_is_consumed():
    """Do not use the old state after a compiled step: its memory has the new state."""

    def step(state):
        return state + 1, None

    old = torch.zeros(2)
    dl.compile_step(step, backend="aot_eager")(old)
    assert old.tolist() == [1, 1]  # and not [0, 0]
    # The fix: use only the new state. `debug=True` finds other uses, and `donate=False` keeps the old state.
    old = torch.zeros(2)
    dl.compile_step(step, backend="aot_eager", debug=True)(old)
    with refused(RuntimeError, "written over"):
        old.sum()
    old = torch.zeros(2)
    dl.compile_step(step, backend="aot_eager", donate=False)(old)
    assert old.tolist() == [0, 0]


def decay_of_factors_is_no_decay_of_the_weight():
    """Decay weights, and not factors.

    At a switch, decayed vectors leave the factors and vectors of full size enter, so the weight would grow.
    """
    optimizer, (trainable, _) = dl.optim.adamw(weight_decay=0.1), dl.partition(params)
    with refused(ValueError, "decay"):
        optimizer.init(trainable)
    # The fix: before the update, `decay` multiplies base and factors together.
    decayed = dl.materialize(dl.decay(params, 0.01))
    torch.testing.assert_close(decayed["0.weight"], 0.99 * dl.materialize(params)["0.weight"])


def an_average_of_factors_is_another_model():
    """Average weights, and not factors.

    The mean of two products is not the product of the means.
    """
    plan = dl.schedules.every(1)(0, params)
    switched, _ = dl.switch(params, plan)  # the same weights, in other factors
    old, new = params["0.weight"], switched["0.weight"]
    means = [torch.lerp(*pair, 0.5) for pair in zip((old.base, *old.factors), (new.base, *new.factors), strict=True)]
    wrong = dl.materialize(dl.LowRank(means[0], dl.Factors(*means[1:]), old.seed))
    assert (wrong - dl.materialize(old)).abs().max() > 1e-3
    # The fix.
    right = dl.materialize(dl.optim.average(old, new, decay=0.5))
    torch.testing.assert_close(right, dl.materialize(old))


def checkpointing_by_hooks_is_refused_under_torch_func():
    """Recompute blocks with `remat`.

    `torch.utils.checkpoint` needs hooks, which `torch.func` does not support.
    """

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed()
    trainable, frozen = dl.partition(dl.init(model, rank=2, seed=0, targets=["*.weight"]))

    def loss_fn(trainable, model=model):
        return dl.call(model, dl.combine(trainable, frozen), x).sum()

    with refused(RuntimeError, "saved-tensor hooks"):
        dl.value_and_grad(loss_fn)(trainable)
    # The fix: a model without checkpointing, in `remat`. Or: `via="autograd"` with `checkpoint_contexts`.
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    weights, rest = dl.partition(dl.init(plain, rank=2, seed=0, targets=["*.weight"]))
    dl.value_and_grad(lambda tree: dl.call(dl.remat(plain, ["0"]), dl.combine(tree, rest), x).sum())(weights)


def a_base_without_a_residual_drifts():
    """Quantize with a residual.

    Without a residual, the rounding errors of many folds into codes add up.
    """
    drift, exact = {}, {"0.weight": model[0].weight, "2.weight": model[2].weight}
    for residual in (None, "bfloat16"):
        weights = dl.init(model, rank=2, seed=0, targets=["*.weight"], base="int8", residual=residual)
        for step in range(100):
            weights, _ = dl.switch(weights, dl.schedules.every(1, count=1)(step, weights))
        drift[residual] = dl.bases.drift(weights, exact)["0.weight"]
    assert drift["bfloat16"] < 0.02 < drift[None]


def wrappers_of_several_processes_are_refused():
    """Average gradients with `all_reduce_mean`.

    The hooks of DDP and FSDP do not run under `torch.func`.
    """
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with refused(ValueError, "DistributedDataParallel"):
            dl.call(DistributedDataParallel(model), params, x)
        # The fix: the module itself, and one call for the gradients.
        trainable, frozen = dl.partition(params)
        result = dl.value_and_grad(lambda tree: dl.call(model, dl.combine(tree, frozen), x).sum())(trainable)
        dl.parallel.all_reduce_mean(tuple(result), distributed.group.WORLD)
    finally:
        distributed.destroy_process_group()


def a_step_without_a_switch_needs_no_plan():
    """Make no plan for a step that switches nothing.

    On the host, `switches` returns how many vectors a step switches. With a rare schedule it is mostly 0.
    """
    schedule = dl.schedules.every(10)
    steps = [step for step in range(20) if schedule.switches(step, params)]
    assert steps == [9, 19]


TRAPS = [
    a_number_is_compiled_into_the_graph,
    a_donated_state_is_consumed,
    decay_of_factors_is_no_decay_of_the_weight,
    an_average_of_factors_is_another_model,
    checkpointing_by_hooks_is_refused_under_torch_func,
    a_base_without_a_residual_drifts,
    wrappers_of_several_processes_are_refused,
    a_step_without_a_switch_needs_no_plan,
]

if __name__ == "__main__":
    for trap in TRAPS:
        print(f"{trap.__name__.replace('_', ' ')}. {trap.__doc__}")
        trap()

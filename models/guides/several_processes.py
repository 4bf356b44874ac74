"""Train on several processes with torchrun.

Run ``torchrun --nproc-per-node 2 -m models.guides.several_processes``. There is no wrapper around the model: a function
call averages gradients, and the types of the parameters say what is sharded. `python -m models.pretrain` adds
checkpoints in the background, resumes with any number of processes, and survives restarts.
"""

import torch
from torch import distributed, nn

import dynlora_fn as dl

distributed.init_process_group(dl.parallel.register_gloo())  # joins the processes that torchrun started, on CPUs
process, world_size, group = distributed.get_rank(), distributed.get_world_size(), distributed.group.WORLD
torch.manual_seed(0)  # the same model on every process
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
# With `group` each process stores some rows of each base, and the int8 codes are sent for each product.
# Without it, every process stores all rows. `dl.parallel.shard_factors` also shards factors and their moments.
params = dl.init(model, rank=16, seed=0, targets=["*.weight"], base="int8", group=group)
schedule = dl.schedules.switchlora(total_steps=300)
optimizer = dl.optim.adamw()


def step(state, batch, lr):
    trainable, frozen, opt_state, t = state

    def loss_fn(trainable):
        return (dl.call(model, dl.combine(trainable, frozen), batch) - batch.roll(1, -1)).square().mean()

    loss, grads = dl.parallel.all_reduce_mean(tuple(dl.value_and_grad(loss_fn)(trainable)), group)
    params = dl.combine(trainable, frozen)
    plan = schedule(t, params)  # every process derives the same plan and vectors, so nothing is sent
    params, _ = dl.switch(params, plan)
    opt_state = dl.project_optimizer_state(opt_state, plan)
    trainable, frozen = dl.partition(params)
    updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
    return (dl.apply_updates(trainable, updates), frozen, opt_state, t + 1), loss


trainable, frozen = dl.partition(params)
state = trainable, frozen, optimizer.init(trainable), torch.tensor(0)
step = dl.compile_step(step)
for t in range(300):
    batch = torch.randn(128, 64)[process::world_size]  # this process's rows of the same batch
    state, loss = step(state, batch, torch.tensor(1e-2 * (1 - t / 300)))
    if t % 100 == 99:
        dl.parallel.check_replicas(state, group)  # raises if the states of processes differ
# `dl.parallel.unshard(params)`, called on every process, gathers the bases, so that one process can write an adapter.
weights = dl.state_dict(model, dl.combine(state[0], state[1]))  # collective: call it on every process
if process == 0:
    print(f"loss {loss:.3f}, {dl.parallel.wire_bytes(state[0], state[1])} a step")
distributed.destroy_process_group()

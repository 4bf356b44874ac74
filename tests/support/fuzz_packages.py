"""Further entries of the table of public functions.

They are of schedules, bases, processes, files, switching and `init`.
"""

import tempfile
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8Tensor, PerRow

import dynlora_fn as dl
from tests.support import fuzz_table as table
from tests.support import mutations as kinds
from tests.support.fuzz_table import Entry, of

PARAMS, ONE, MODEL, SOME_WEIGHTS = table.PARAMS, table.ONE, table.MODEL, table.SOME_WEIGHTS
SCHEDULE = dl.schedules.Schedule(interval=10, freeze=1)
DITHERED = dl.schedules.dithered(SCHEDULE, PARAMS, total_steps=8, seed=0)
STEP = kinds.among(
    [-1, 0.5, "1", None, True, 2.0, [1], 1j, torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(True), float("nan")],
    [torch.tensor(1)],
)


def init(**changed: Any) -> Any:
    """Return parameters of the network with a quantized base."""
    return dl.init(**{"model": MODEL, "rank": 2, "seed": 0, "targets": table.TARGETS, **changed})


SETTINGS = {
    "rank": (2, table.RANK),
    "seed": (0, table.SEED),
    "targets": (table.TARGETS, table.TARGET_KIND),
    "start": ("lora", table.START),
    "trained": ("both", kinds.choice(["both", "b"])),
    "dtype": (torch.float32, kinds.dtype()),
    "stack": (True, kinds.flag()),
}

SCHEDULES = {
    "Schedule": of(
        lambda **values: dl.schedules.Schedule(**values)(1, PARAMS),
        interval=(10, kinds.number(0, ends="(]", infinite=True)),
        decay=(0.5, kinds.number(0, 1, ends="(]")),
        every=(1, table.SIZE),
        freeze=(1, table.COUNT),
        from_pool=(False, kinds.flag()),
    ),
    "every": of(
        lambda **values: dl.schedules.every(**values)(1, PARAMS),
        steps=(1, table.SIZE),
        count=(1, kinds.integer(1, also=["all"])),
        freeze=(0, table.COUNT),
        from_pool=(False, kinds.flag()),
    ),
    "switchlora": of(
        lambda **values: dl.schedules.switchlora(**values)(1, PARAMS),
        total_steps=(100, table.SIZE),
        interval=(40, kinds.number(0, ends="(]", infinite=True)),
        ratio=(0.5, table.POSITIVE),
        decay=(0.5, kinds.number(0, 1, ends="(]")),
        freeze=(1, table.COUNT),
        every=(1, table.SIZE),
    ),
    "a schedule": of(SCHEDULE, step=(1, STEP), params=(PARAMS, SOME_WEIGHTS)),
    "switches": of(SCHEDULE.switches, step=(1, table.COUNT), params=(PARAMS, SOME_WEIGHTS)),
    "dithered": of(
        lambda schedule, params, total_steps, seed: dl.schedules.dithered(
            schedule, params, total_steps=total_steps, seed=seed
        )(1, PARAMS),
        schedule=(SCHEDULE, kinds.other()),
        params=(PARAMS, SOME_WEIGHTS),
        total_steps=(8, table.SIZE),
        seed=(0, table.SEED),
    ),
    "a dithered schedule": of(
        DITHERED,
        step=(1, kinds.among([-1, 8, 100, 0.5, "1", None, True])),
        params=({name: PARAMS[name] for name in DITHERED.switched}, kinds.tree()),
    ),
}

BASES = {
    "quantize": of(
        lambda params, base, residual, residual_device: dl.bases.quantize(
            params, base, residual=residual, residual_device=residual_device
        ),
        params=(PARAMS, SOME_WEIGHTS),
        base=("int8", kinds.among([*table.BASES_WRONG, None])),
        residual=("int8", table.RESIDUAL),
        residual_device=("cpu", kinds.device(none=True)),
    ),
    "defer": of(
        lambda params, vectors: dl.bases.defer(params, vectors=vectors),
        params=(PARAMS, SOME_WEIGHTS),
        vectors=(2, table.SIZE),
    ),
    "fold_pending": of(dl.bases.fold_pending, params=(dl.bases.defer(PARAMS, vectors=2), kinds.other(except_for=[{}]))),
    "drift": of(
        dl.bases.drift,
        params=(PARAMS, SOME_WEIGHTS),
        exact=({name: table.DENSE[name] for name in table.PLANS}, kinds.tree(optional=True, none=True)),
    ),
    "from_torchao": of(
        lambda tensor, residual, residual_device: dl.bases.from_torchao(
            tensor, residual=residual, residual_device=residual_device
        ),
        tensor=(Int8Tensor.from_hp(torch.ones(4, 8), granularity=PerRow()), kinds.other()),
        residual=("int8", table.RESIDUAL),
        residual_device=("cpu", kinds.device(none=True)),
    ),
    "to_torchao": of(dl.bases.to_torchao, params=(PARAMS, kinds.other(except_for=[{}, torch.ones(2)]))),
}

GROUP = kinds.among([None, "world", 0, 1.5, [0], {}, nn.Linear])


def parallel(group: Any) -> dict[str, Entry]:
    """Return the entries for a group of one process."""
    sharded = dl.parallel.shard(PARAMS, group)
    return {
        "all_reduce_mean": of(
            lambda tree, group, weight: dl.parallel.all_reduce_mean(tree, group, weight=weight),
            tree=(table.GRADS, kinds.among([{"w": 1}, {"w": None}, ["w"], {"w": torch.ones(2).int()}, {"w": True}, 3])),
            group=(group, GROUP),
            weight=(0.5, kinds.rate(1, none=True)),
        ),
        "shard": of(dl.parallel.shard, params=(PARAMS, SOME_WEIGHTS), group=(group, GROUP)),
        "unshard": of(dl.parallel.unshard, params=(sharded, kinds.other(except_for=[{}, torch.ones(2)]))),
        "shard_factors": of(
            lambda params, weight: dl.parallel.shard_factors(params, weight=weight),
            params=(sharded, kinds.other(except_for=[{}])),
            weight=(0.5, kinds.number(0, 1, none=True)),
        ),
        "check_replicas": of(
            dl.parallel.check_replicas,
            state=(table.GRADS, kinds.among([{"w": object()}, [len], {"w": nn.Linear}, MODEL])),
            group=(group, GROUP),
        ),
        "as_dtensors": of(dl.parallel.as_dtensors, tree=(PARAMS, kinds.among([{"w": 1}, ["w"], 3, {"w": object()}]))),
        "wire_bytes": of(
            lambda trainable, frozen, gathers, plan: dl.parallel.wire_bytes(
                trainable, frozen, gathers=gathers, plan=plan
            ),
            trainable=(table.TRAINABLE, kinds.other(except_for=[{}])),
            frozen=(table.FROZEN, kinds.other(except_for=[None, {}])),
            gathers=(2, table.COUNT),
            plan=(table.PLANS, kinds.other(except_for=[None, {}])),
        ),
    }


NO_STATE = kinds.among([{"w": object()}, {"w": len}, {"t": MODEL}, torch.empty(2, device="meta"), {"w": [b"x"]}])
CHECKPOINT_STEP = kinds.among([-1, 0.5, "1", True, 10**9, [1]])
CHECKPOINT_SETTINGS = kinds.among([3, "seed", ["seed"], {1: 0}, {"seed": object()}])


def checkpoints() -> str:
    """Return a folder with a checkpoint."""
    folder = tempfile.mkdtemp()
    dl.interop.save_checkpoint({"w": torch.ones(2), "t": 3}, folder, step=1)
    return folder


INTEROP = {
    "init": of(
        init, **SETTINGS, model=(MODEL, kinds.other(except_for=[{}])), base_dtype=(None, kinds.dtype(none=True))
    ),
    "init, dict": of(
        lambda model, **settings: dl.init(model, rank=2, seed=0, targets=["w"], **settings),
        model=(
            {"w": torch.ones(6, 4)},
            kinds.among([{"w": 1.0}, {"w": [[1.0]]}, {0: torch.ones(6, 4)}, [1], "w", None]),
        ),
        fused=(
            {"w": 2},
            kinds.among([{"w": 2.0}, {"w": "2"}, {"w": True}, {"w": (2,)}, {"w": 0}, {"no": 2}, 2, ["w"]]),
        ),
        weights=({"w": torch.ones(6, 4)}, kinds.tree(none=True)),
        base=("int8", table.BASE),
        residual=("int8", table.RESIDUAL),
        residual_device=("cpu", kinds.device(none=True)),
    ),
    "resize": of(
        lambda params, rank, start, roles: dl.resize(params, rank=rank, start=start, roles=roles),
        params=(PARAMS, SOME_WEIGHTS),
        rank=(3, kinds.among([0, -1, 2.5, "2", True, None, 99, [2], {"no": 2}, {"head.weight": 2.0}, 1j])),
        start=("lora", table.START),
        roles=(None, kinds.among([3])),
    ),
    "state_dict": of(dl.state_dict, model=(MODEL, kinds.other()), params=(PARAMS, kinds.tree())),
    "save_weights": of(
        lambda weights, file, metadata: dl.interop.save_weights(weights, file, metadata=metadata),
        weights=({"w": torch.ones(2)}, kinds.among([{"w": 1}, {"w": None}, ["w"], None, {0: torch.ones(2)}, 3])),
        file=(f"{tempfile.mkdtemp()}/w.safetensors", table.PATHLIKE),
        metadata=({"format": "pt"}, kinds.among([{"a": 1}, {1: "a"}, ["a"], 3, "pt"])),
    ),
    "open_weights": of(
        lambda path: dict(dl.interop.open_weights(path)), path=(table.FOLDER / "w.safetensors", table.PATHLIKE)
    ),
    "save_checkpoint": of(
        dl.interop.save_checkpoint,
        state=({"w": torch.ones(2), "t": 3}, NO_STATE),
        folder=(tempfile.mkdtemp(), table.PATHLIKE),
        step=(1, CHECKPOINT_STEP),
        settings=({"seed": 0}, CHECKPOINT_SETTINGS),
        keep=(2, kinds.among([0, -1, 2.5, "2", True, [1]])),
    ),
    "load_checkpoint": of(
        dl.interop.load_checkpoint,
        folder=(checkpoints(), table.PATHLIKE),
        template=({"w": torch.zeros(2), "t": 0}, NO_STATE),
        step=(1, CHECKPOINT_STEP),
        settings=({"seed": 0}, CHECKPOINT_SETTINGS),
        donate=(False, kinds.flag()),
        rename=(None, kinds.among([3, "x", {}])),
    ),
    "save_merged": of(
        dl.interop.save_merged,
        model=(MODEL, kinds.other()),
        params=(PARAMS, table.WEIGHTS),
        folder=(tempfile.mkdtemp(), table.PATHLIKE),
    ),
    "save_adapter": of(
        lambda model, params, folder, original, rank: dl.interop.save_adapter(
            model, params, folder, original=original, rank=rank
        ),
        model=(MODEL, kinds.other()),
        params=(PARAMS, kinds.tree(free=table.FREE)),
        folder=(tempfile.mkdtemp(), table.PATHLIKE),
        original=(MODEL.state_dict(), kinds.among([{}, {"head.weight": 1}, [1], 3, {0: torch.ones(2)}])),
        rank=(2, kinds.integer(1, none=True)),
    ),
    "load_adapter": of(
        lambda model, folder, seed, dtype, stack: dl.interop.load_adapter(
            model, folder, seed=seed, dtype=dtype, stack=stack
        ),
        model=(MODEL, kinds.other()),
        folder=(table.FOLDER / "adapter", table.PATHLIKE),
        seed=(0, table.SEED),
        dtype=(torch.float32, kinds.dtype()),
        stack=(True, kinds.flag()),
    ),
}

SLICE = dl.switching.BasisSlice(torch.tensor(0), torch.arange(3), torch.arange(3), (6, 4), 2, "lora", torch.float32)
SWITCHING = {
    "basis_bounds": of(
        dl.switching.basis_bounds,
        out_features=(6, table.SIZE),
        in_features=(4, table.SIZE),
        rank=(2, table.SIZE),
    ),
    "basis_vectors": of(
        lambda **fields: dl.switching.basis_vectors([SLICE._replace(**fields)]),
        seed=(SLICE.seed, kinds.among([0, None, torch.tensor(0.5), "0", torch.tensor(True)])),
        b_indices=(SLICE.b_indices, kinds.among([[0], None, torch.ones(3), torch.tensor(1), 3])),
        shape=(SLICE.shape, kinds.among([6, None, (6,), (6.0, 4), (0, 4), "64", (6, -4)])),
        rank=(2, table.SIZE),
        start=("lora", table.START),
        dtype=(torch.float32, kinds.dtype()),
    ),
    "fold": of(
        dl.switching.fold,
        param=(ONE, kinds.tree()),
        b=(torch.ones(4, 1), kinds.tree()),
        a=(torch.ones(1, 6), kinds.tree()),
    ),
    "init_pool": of(
        lambda params, device: dl.switching.init_pool(params, device=device),
        params=(PARAMS, SOME_WEIGHTS),
        device=("cpu", kinds.device()),
    ),
    "draw": of(
        dl.switching.draw,
        pool=(table.POOLS, kinds.other()),
        plan=(table.POOL_PLANS, kinds.tree(optional=True, axes=False, dtypes=[torch.int32, torch.int64])),
    ),
    "put_back": of(
        lambda pool, plan, outgoing, donate: dl.switching.put_back(pool, plan, outgoing, donate=donate),
        pool=(table.POOLS, kinds.other()),
        plan=(table.POOL_PLANS, table.PLANNED),
        outgoing=(table.POOL_OUT, kinds.tree(dtypes=[torch.float64])),
        donate=(False, kinds.flag()),
    ),
}

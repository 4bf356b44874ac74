"""The table of public functions with valid arguments.

It has the kind of each argument that is changed.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dynlora_fn as dl
from tests.support import mutations as kinds
from tests.support.mutations import Kind


class Entry(NamedTuple):
    """A function, and each argument as its valid value and its kind."""

    call: Callable[..., Any]
    arguments: Mapping[str, tuple[Any, Kind]]


class Network(nn.Module):
    """Two equal layers, which are stacked, a layer of another shape, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)])
        self.head, self.norm = nn.Linear(6, 4), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


torch.manual_seed(0)
MODEL, X = Network(), torch.randn(3, 6)
TARGETS = ["layers.*.weight", "head.weight"]
PARAMS = dl.init(MODEL, rank=2, seed=0, targets=TARGETS)
FREE = [name for name, param in PARAMS.items() if isinstance(param, Tensor)]
ONE = PARAMS["head.weight"]
TRAINABLE, FROZEN = dl.partition(PARAMS)
GRADS = {
    name: type(leaf)(*map(torch.ones_like, leaf)) if isinstance(leaf, tuple) else torch.ones_like(leaf)
    for name, leaf in TRAINABLE.items()
}
DENSE = dl.materialize(PARAMS)
PLANS = dl.schedules.every(1, 2)(0, PARAMS)
PLAN = PLANS["head.weight"]
INCOMING = dl.candidates(PARAMS, PLANS)
POOLS = dl.switching.init_pool({"w": dl.init({"w": torch.ones(8, 9)}, rank=2, seed=0, targets=["w"])["w"]})
POOL_PLANS = {"w": dl.schedules.every(1, 2, from_pool=True)(0, {"w": ONE})["w"]}
POOL_OUT = dl.switching.draw(POOLS, POOL_PLANS)
FOLDER = Path(tempfile.mkdtemp())
dl.interop.save_adapter(MODEL, PARAMS, FOLDER / "adapter", original=MODEL.state_dict())
dl.interop.save_weights({"w": torch.ones(2)}, FOLDER / "w.safetensors")

WEIGHTS = kinds.tree(free=FREE)
SOME_WEIGHTS = kinds.tree(free=FREE, optional=True)
MIRROR, STATE = kinds.tree(), kinds.tree(dtypes=[torch.int32, torch.int64])
PLANNED = kinds.tree(dtypes=[torch.int32, torch.int64], axes=False)
MODULE = kinds.other()


def update(make: Callable[[], dl.optim.Transform]) -> Entry:
    """Return the update of an optimizer."""
    state = make().init(TRAINABLE)
    arguments = {"grads": (GRADS, MIRROR), "opt_state": (state, STATE), "trainable": (TRAINABLE, MIRROR)}
    return Entry(
        lambda grads, opt_state, trainable, lr: make().update(grads, opt_state, trainable, lr=lr),
        {**arguments, "lr": (0.5, kinds.rate())},
    )


def settings(make: Callable[..., dl.optim.Transform], **arguments: tuple[Any, Kind]) -> Entry:
    """Return the settings of an optimizer, which are read by an update of tensors."""
    tensors = {name: leaf for name, leaf in TRAINABLE.items() if isinstance(leaf, Tensor) and leaf.ndim > 1}
    tensors = tensors or {"m": torch.ones(3, 2)}

    def call(**values: Any) -> Any:
        optimizer = make(**values)
        return optimizer.update(tensors, optimizer.init(tensors), tensors, lr=0.1)

    return Entry(call, arguments)


def muon() -> dl.optim.Transform:
    """Return muon for factors, which cannot train vectors, and AdamW for all others."""
    return dl.optim.multi_transform(
        {"muon": dl.optim.muon(), "adamw": dl.optim.adamw()},
        lambda name, leaf: "adamw" if isinstance(leaf, Tensor) else "muon",
    )


def of(function: Callable[..., Any], **arguments: tuple[Any, Kind]) -> Entry:
    return Entry(function, arguments)


def loss_fn(tree: Any) -> Tensor:
    return tree["w"].sum()


BETAS = kinds.among(
    [(1.0, 0.9), (0.9, -0.1), (0.9,), 0.9, None, (float("nan"), 0.9), ("a", "b"), (True, False), {0, 0.5}]
)
TABLES = kinds.among(
    ["newton", "", [], None, 3, [1, 2, 3], [(1, 2)], [(1, 2, "3")], [(1, 2, float("nan"))], {}, b"jordan"]
)
RANK = kinds.among([0, -1, 2.0, "2", True, None, 99, [2], {"no name": 2}, {"*": 2.5}, {"*": True}, 1j, torch.tensor(2)])
DECAY, POSITIVE = kinds.number(0, 1, ends="[)"), kinds.number(0, ends="(]")
SEED, SIZE, COUNT = kinds.integer(), kinds.integer(1), kinds.integer(0)
RESIDUAL = kinds.choice(["bfloat16", "int8"], none=True)
LEAVES = kinds.among(
    [{"w": 1.0}, {"w": None}, {"w": torch.ones(2).int()}, [torch.ones(2)], 3, None, {0: torch.ones(2)}]
)
BASES_WRONG = ["int4", "INT8", "", 8, True, torch.int8, ["int8"], {}, b"int8", nn.Linear]
BASE = kinds.among(BASES_WRONG)
START = kinds.choice(["switchlora", "lora"])
PATHLIKE = kinds.among([None, 3, True, b"x", ["folder"], {}, 2.5, torch.ones(2), nn.Linear])
TARGET_KIND = kinds.among([None, 3, [3], ["no name"], {"head.weight": 1}, [None], [int], 2.5, 1j, object()])

CORE = {
    "partition": of(dl.partition, params=(PARAMS, SOME_WEIGHTS), frozen=(["head.bias"], kinds.patterns())),
    "combine": of(
        dl.combine, trainable=(TRAINABLE, kinds.tree(free=FREE, optional=True)), frozen=(FROZEN, kinds.tree())
    ),
    "unstack": of(dl.unstack, params=(PARAMS, SOME_WEIGHTS)),
    "materialize": of(dl.materialize, params=(PARAMS, SOME_WEIGHTS)),
    "merge": of(dl.merge, params=(PARAMS, SOME_WEIGHTS)),
    "switch": of(
        lambda params, plan, incoming: dl.switch(params, plan, incoming=incoming),
        params=(PARAMS, SOME_WEIGHTS),
        plan=(PLANS, PLANNED),
        incoming=(INCOMING, kinds.tree(none=True)),
    ),
    "switch one": of(dl.switch, params=(ONE, kinds.tree()), plan=(PLAN, PLANNED)),
    "candidates": of(
        dl.candidates,
        params=(PARAMS, SOME_WEIGHTS),
        plan=(PLANS, kinds.tree(optional=True, axes=False, dtypes=[torch.int32, torch.int64])),
        start=("lora", START),
    ),
    "call": of(lambda model, params: dl.call(model, params, X), model=(MODEL, MODULE), params=(PARAMS, WEIGHTS)),
    "explain": of(dl.explain, params=(PARAMS, SOME_WEIGHTS), tokens=(8, COUNT)),
    "linear": of(
        dl.linear,
        x=(X, kinds.columns()),
        param=(ONE, kinds.tree()),
        bias=(torch.ones(4), kinds.among([torch.ones(3), torch.ones(2, 4), torch.ones(4).int(), 1.0, [1.0], "b", ONE])),
        path=("merged", kinds.choice(["factored", "merged", "dense"], none=True)),
    ),
    "remat": of(
        lambda model, blocks: dl.remat(model, blocks)(X),
        model=(MODEL, MODULE),
        blocks=(["layers.*"], kinds.patterns()),
    ),
    "checkpoint_contexts": of(lambda model: len(dl.checkpoint_contexts(model)()), model=(MODEL, MODULE)),
    "value_and_grad": of(
        lambda loss_fn, via, has_aux: dl.value_and_grad(loss_fn, via=via, has_aux=has_aux)({"w": torch.ones(2)}),
        loss_fn=(loss_fn, kinds.other(except_for=[len, nn.Linear])),
        via=("func", kinds.choice(["func", "autograd"])),
        has_aux=(False, kinds.flag()),
    ),
    "compile_step": of(
        lambda step, donate, debug: dl.compile_step(step, donate=donate, debug=debug, backend="eager") and None,
        step=(loss_fn, kinds.other(except_for=[len, nn.Linear])),
        donate=(True, kinds.flag()),
        debug=(False, kinds.flag()),
    ),
    "peak_memory": of(
        lambda step: dl.peak_memory(step, {"w": torch.ones(2)}).total,
        step=(loss_fn, kinds.other(except_for=[len, nn.Linear])),
    ),
}

OPTIM = {
    "adamw": update(dl.optim.adamw),
    "adamw, factor_decay": update(lambda: dl.optim.adamw(factor_decay=0.1)),
    "adamw, 8bit": update(lambda: dl.optim.adamw(moments="8bit")),
    "sgd": update(dl.optim.sgd),
    "lion": update(dl.optim.lion),
    "muon": update(muon),
    "adamw, settings": settings(
        dl.optim.adamw,
        betas=((0.5, 0.5), BETAS),
        eps=(0.5, kinds.number(0)),
        weight_decay=(0.5, kinds.number(0)),
        factor_decay=(0.5, kinds.number(0)),
        moments=("8bit", kinds.choice(["float32", "8bit"])),
    ),
    "sgd, settings": settings(dl.optim.sgd, momentum=(0.5, DECAY), weight_decay=(0.5, kinds.number(0))),
    "muon, settings": settings(
        dl.optim.muon,
        momentum=(0.5, DECAY),
        nesterov=(False, kinds.flag()),
        coefficients=("polar_express_5", TABLES),
        coupled=(1, COUNT),
        weight_decay=(0.5, kinds.number(0)),
        moments=("bfloat16", kinds.choice(["float32", "bfloat16", "8bit"])),
    ),
    "normalized_sgd, settings": settings(
        lambda **values: dl.optim.multi_transform(
            {"matrices": dl.optim.normalized_sgd(**values), "sgd": dl.optim.sgd()},
            lambda name, leaf: "matrices" if isinstance(leaf, Tensor) and leaf.ndim > 1 else "sgd",
        ),
        axis=(-2, kinds.among([0, 1, -3, "-1", None, 1.5, True])),
        momentum=(0.5, DECAY),
        weight_decay=(0.5, kinds.number(0)),
    ),
    "lion, settings": settings(dl.optim.lion, betas=((0.5, 0.5), BETAS), weight_decay=(0.5, kinds.number(0))),
    "init": of(
        lambda trainable: dl.optim.adamw().init(trainable), trainable=(TRAINABLE, kinds.tree(free=FREE, optional=True))
    ),
    "apply_updates": of(dl.apply_updates, trainable=(TRAINABLE, MIRROR), updates=(GRADS, MIRROR)),
    "decay": of(dl.decay, params=(PARAMS, SOME_WEIGHTS), rate=(0.5, kinds.rate(1))),
    "average": of(
        lambda averaged, params, decay: dl.optim.average(averaged, params, decay=decay),
        averaged=(PARAMS, kinds.tree(dtypes=[torch.complex64])),
        params=(PARAMS, kinds.tree(dtypes=[torch.int16, torch.int64, torch.bool, torch.complex64])),
        decay=(0.5, kinds.rate(1)),
    ),
    "clip_by_global_norm": of(
        dl.optim.clip_by_global_norm,
        grads=(GRADS, LEAVES),
        max_norm=(0.5, kinds.number(0, infinite=True)),
    ),
    "compensate": of(
        lambda params, grads, lr, normalize: dl.optim.compensate(params, grads, lr=lr, normalize=normalize),
        params=(PARAMS, SOME_WEIGHTS),
        grads=({name: DENSE[name] for name in PLANS}, kinds.tree(optional=True)),
        lr=(0.5, kinds.rate()),
        normalize=("rows", kinds.choice(["spectrum", "rows"])),
    ),
    "project_gradients": of(dl.optim.project_gradients, grads=(DENSE, MIRROR), params=(PARAMS, WEIGHTS)),
    "project_optimizer_state": of(
        lambda opt_state, plan, rule, prune, trainable: dl.project_optimizer_state(
            opt_state, plan, rule=rule, prune=prune, trainable=trainable
        ),
        opt_state=(dl.optim.adamw().init(TRAINABLE), kinds.other(except_for=[None])),
        plan=(PLANS, kinds.tree(optional=True, axes=False, dtypes=[torch.int32, torch.int64])),
        rule=("prune", kinds.choice(["reset", "reset_thawed", "keep", "prune", "transport"])),
        prune=(0.5, kinds.number(0, 1)),
        trainable=(TRAINABLE, kinds.tree(free=FREE, optional=True, none=True)),
    ),
    "freeze_counterparts": of(
        lambda inner: dl.optim.freeze_counterparts(inner).init(TRAINABLE), inner=(dl.optim.sgd(), kinds.other())
    ),
    "multi_transform": of(
        lambda transforms, choose: dl.optim.multi_transform(transforms, choose).init(TRAINABLE),
        transforms=({"one": dl.optim.sgd()}, kinds.other(except_for=[{}])),
        choose=(lambda name, leaf: "one", kinds.other(except_for=[len, nn.Linear])),
    ),
    "register_state": of(
        dl.optim.register_state,
        kind=(dl.optim.MomentumState, kinds.other(except_for=[nn.Linear])),
        roles=({"mu": "first_moment"}, kinds.among([None, 3, {"mu": "moment"}, {"no": "count"}, ["mu"], {"mu": []}])),
    ),
}

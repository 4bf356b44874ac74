"""Every recorded trace of the authors' implementation is reproduced through the public API, to 1e-12 at every step.

`DYNLORA_TRACES` names another folder of traces in the same format (tests/traces/README.md).
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynlora_fn import (
    Factors,
    LowRank,
    Plan,
    SidePlan,
    apply_updates,
    call,
    combine,
    materialize,
    partition,
    project_optimizer_state,
    switch,
    value_and_grad,
)
from dynlora_fn.optim import clip_by_global_norm
from dynlora_fn.switching import Pool, SidePool, draw, put_back
from tests.support.optimizer_states import trees_of
from tests.support.optimizers import decaying_adamw
from tests.support.paths import TRACES
from tests.support.traces import FILES


class Net(nn.Module):
    """The recorded network. The library's scale is 1 / rank: another alpha is a factor on the layer's product."""

    def __init__(self, dims: list[int], layers: list[str], alpha: float):
        super().__init__()
        self.names, self.alpha = layers, alpha
        for name, (width_in, width_out) in zip(layers, pairwise(dims), strict=True):
            self.add_module(name, nn.Linear(width_in, width_out, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            layer = getattr(self, name)
            x = self.alpha * nn.functional.linear(x, layer.weight) + layer.bias
            x = torch.tanh(x) if name != self.names[-1] else x
        return x


class Trace:
    """One trace file: arrays by name, and the names to compare at each step."""

    def __init__(self, path: Path):
        self.arrays = np.load(path)
        self.meta = SimpleNamespace(**json.loads(str(self.arrays["meta"])))

    def tensor(self, name: str, step: int | None = None) -> Tensor:
        array = self.arrays[name]
        return torch.from_numpy(np.array(array if step is None else array[step]))

    def has(self, name: str) -> bool:
        return name in self.arrays.files

    def check(self, step: int, name: str, got: Tensor) -> None:
        if self.has(name):
            wanted = self.tensor(name, step).to(torch.float64)
            error = (got.to(torch.float64).reshape(wanted.shape) - wanted).abs().max().item()
            assert error <= 1e-12, f"step {step}: {name} differs by {error:.2e}"

    def params(self) -> dict[str, LowRank | Tensor]:
        params: dict[str, LowRank | Tensor] = {}
        for layer in self.meta.layers:
            factors = Factors(b=self.tensor(f"init.{layer}.B"), a=self.tensor(f"init.{layer}.A"))
            base = self.tensor(f"init.{layer}.W") / self.meta.alpha
            params[f"{layer}.weight"] = LowRank(base, factors, torch.tensor(0))
            params[f"{layer}.bias"] = self.tensor(f"init.{layer}.bias")
        return params

    def pools(self) -> dict[str, Pool]:
        return {
            f"{layer}.weight": Pool(
                b=SidePool(self.tensor(f"init.{layer}.candB"), self.tensor(f"init.{layer}.selB")),
                a=SidePool(self.tensor(f"init.{layer}.candA"), self.tensor(f"init.{layer}.selA")),
            )
            for layer in self.meta.layers
        }

    def plans(self, step: int) -> dict[str, Plan]:
        """Return plans padded to one width, the width of the step with the most switches."""

        def side(layer: str, letter: str) -> SidePlan:
            count = int(self.arrays[f"{layer}.n{letter}"].max())
            slots = self.tensor(f"{layer}.slot{letter}", step)[:count].long()
            indices = self.tensor(f"{layer}.cand{letter}_idx", step)[:count].long()
            return SidePlan(slots.clamp(min=0), indices.clamp(min=0), slots >= 0)

        frozen_for = torch.tensor(self.meta.N)
        return {f"{layer}.weight": Plan(side(layer, "B"), side(layer, "A"), frozen_for) for layer in self.meta.layers}


def gradients(trace: Trace, step: int, net: Net, trainable: dict, frozen: dict) -> dict:
    if getattr(trace.meta, "fixedgrad", False):
        grads = {}
        for layer in trace.meta.layers:
            factors = (trace.tensor(f"{layer}.gB_raw", step), trace.tensor(f"{layer}.gA_raw", step))
            bias = f"{layer}.gbias_raw" if trace.has(f"{layer}.gbias_raw") else f"{layer}.gbias"
            grads |= {f"{layer}.weight": Factors(*factors), f"{layer}.bias": trace.tensor(bias, step)}
        return grads

    def loss_fn(trainable: dict) -> Tensor:
        output = call(net, combine(trainable, frozen), trace.tensor("data.x", step))
        return (output - trace.tensor("data.y", step)).square().mean()

    loss, grads = value_and_grad(loss_fn)(trainable)
    trace.check(step, "loss", loss)
    for layer in trace.meta.layers:
        trace.check(step, f"{layer}.gA_raw", grads[f"{layer}.weight"].a)
        trace.check(step, f"{layer}.gB_raw", grads[f"{layer}.weight"].b)
        trace.check(step, f"{layer}.gbias_raw", grads[f"{layer}.bias"])
    return grads


def check_switch(trace: Trace, step: int, params: dict, pools: dict, opt_state: dict) -> None:
    for layer in trace.meta.layers:
        name = f"{layer}.weight"
        trace.check(step, f"{layer}.W", params[name].base * trace.meta.alpha)
        trace.check(step, f"{layer}.Weff_post", materialize(params[name]) * trace.meta.alpha)
        trace.check(step, f"{layer}.A_sw", params[name].factors.a)
        trace.check(step, f"{layer}.B_sw", params[name].factors.b)
        for letter, side in (("A", pools[name].a), ("B", pools[name].b)):
            trace.check(step, f"{layer}.cand{letter}", side.vectors)
            trace.check(step, f"{layer}.sel{letter}", side.held)
        trace.check(step, f"{layer}.tA_z", opt_state["count"][name].a)
        trace.check(step, f"{layer}.tB_z", opt_state["count"][name].b)
        trace.check(step, f"{layer}.fixA_set", opt_state["frozen_for"][name].a)
        trace.check(step, f"{layer}.fixB_set", opt_state["frozen_for"][name].b)


def check_seen_gradients(trace: Trace, step: int, grads: dict, opt_state: dict) -> None:
    """Check the gradients that the optimizer receives: clipped, and zero for frozen vectors."""
    for layer in trace.meta.layers:
        name = f"{layer}.weight"
        for letter, side in (("A", "a"), ("B", "b")):
            is_frozen = getattr(opt_state["frozen_for"][name], side) > 0
            trace.check(step, f"{layer}.g{letter}", getattr(grads[name], side).masked_fill(is_frozen, 0))
        trace.check(step, f"{layer}.gbias", grads[f"{layer}.bias"])


def check_update(trace: Trace, step: int, trainable: dict, opt_state: dict) -> None:
    for layer in trace.meta.layers:
        name = f"{layer}.weight"
        for letter, side in (("A", "a"), ("B", "b")):
            trace.check(step, f"{layer}.{letter}", getattr(trainable[name], side))
            trace.check(step, f"{layer}.m{letter}", getattr(opt_state["mu"][name], side))
            trace.check(step, f"{layer}.v{letter}", getattr(opt_state["nu"][name], side))
            trace.check(step, f"{layer}.t{letter}", getattr(opt_state["count"][name], side))
            trace.check(step, f"{layer}.fix{letter}", getattr(opt_state["frozen_for"][name], side))
        trace.check(step, f"{layer}.bias", trainable[f"{layer}.bias"])
        trace.check(step, f"{layer}.mbias", opt_state["mu"][f"{layer}.bias"])
        trace.check(step, f"{layer}.vbias", opt_state["nu"][f"{layer}.bias"])
        trace.check(step, f"{layer}.tbias", opt_state["count"][f"{layer}.bias"])


def test_traces_are_there():
    assert FILES, f"no .npz file in {TRACES}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trace_is_reproduced(path: Path):
    trace = Trace(path)
    meta = trace.meta
    net = Net(meta.dims, meta.layers, meta.alpha)
    optimizer = decaying_adamw(meta.wd, betas=(meta.beta1, meta.beta2), eps=meta.eps)
    params, pools = trace.params(), trace.pools()
    opt_state = optimizer.init(partition(params).trainable)
    for step in range(meta.T):
        trainable, frozen = partition(params)
        grads = gradients(trace, step, net, trainable, frozen)
        if meta.clip:
            grads, norm = clip_by_global_norm(grads, meta.clip)
            trace.check(step, "grad_norm", norm)
        plans = trace.plans(step)
        for layer in meta.layers:
            trace.check(step, f"{layer}.Weff_pre", materialize(params[f"{layer}.weight"]) * meta.alpha)
        params, outgoing = switch(params, plans, incoming=draw(pools, plans))
        pools = put_back(pools, plans, outgoing)
        opt_state = project_optimizer_state(opt_state, plans)
        check_switch(trace, step, params, pools, trees_of(opt_state))
        check_seen_gradients(trace, step, grads, trees_of(opt_state))
        trainable, frozen = partition(params)
        lr = trace.tensor("lr", step)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        trainable = apply_updates(trainable, updates)
        check_update(trace, step, trainable, trees_of(opt_state))
        params = combine(trainable, frozen)

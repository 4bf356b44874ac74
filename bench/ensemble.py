"""Eight LoRAs over one base in one call: how much memory at the peak, and are the results those of eight runs?

A process of its own for each: ``forward`` is one call of all members, ``step`` a whole training step of all.
On a CPU the peak is the process's resident memory (Linux), on CUDA the allocator's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from bench.common import Common, finish, start, table
from bench.memory import peak, reset_peak, resident
from models.recipes import full_rank_names, lora_factors, loss_of

KINDS = ("forward", "step")
MB = 1e6


@dataclass(frozen=True)
class Ensemble(Common):
    width: int = 2048
    layers: int = 6
    rank: int = 64
    members: int = 8
    tokens: int = 16
    kind: str | None = None
    """Measure this one in this process, and print the numbers."""


def measure(config: Ensemble) -> dict[str, float]:
    empty = resident(config.device)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(config.width, config.width, bias=False) for _ in range(config.layers)))
    params = dl.init(model.to(config.device), rank=config.rank, seed=0, targets=nn.Linear, start="lora")
    model.to("meta")
    frozen = dl.partition(params, frozen=full_rank_names(params)).frozen
    trainable = tree_map(
        lambda *leaves: torch.stack(leaves), *(lora_factors(params, one) for one in range(config.members))
    )
    trainable = tree_map(lambda leaf: torch.randn_like(leaf) / config.width, trainable)
    del params
    x = torch.randn(config.tokens, config.width, device=config.device)
    run, held = contender(config, model, trainable, frozen, x)
    reset_peak(config.device)
    many = run()
    highest = peak(config.device) - empty
    sizes = {"base": size(frozen), "held": held, "measured": highest}
    return sizes | {"difference": difference(config, model, trainable, frozen, x, many)}


def loss(run: Callable[..., Any], batch: Tensor) -> Tensor:
    return (run(batch) - 1).square().mean()


def one_step(model: nn.Module, frozen: Any) -> Callable[[Any, Tensor], Any]:
    optimizer, gradients = dl.adamw(), torch.func.grad(loss_of(model, loss, frozen))

    def step(trainable: Any, x: Tensor) -> Any:
        updates, _ = optimizer.update(gradients(trainable, x), optimizer.init(trainable), trainable, lr=1e-2)
        return dl.apply_updates(trainable, updates)

    return step


def forward(model: nn.Module, frozen: Any) -> Callable[[Any, Tensor], Any]:
    return lambda trainable, x: dl.call(model, dl.combine(trainable, frozen), x)


def contender(
    config: Ensemble, model: nn.Module, trainable: Any, frozen: Any, x: Tensor
) -> tuple[Callable[[], Any], float]:
    """What is measured, and the bytes of what belongs to the members: factors, and for an eager step also gradients,
    two moments before and after, updates and new factors."""
    of_one = (forward if config.kind == "forward" else one_step)(model, frozen)
    copies = 1 if config.kind == "forward" else 8
    return lambda: torch.vmap(of_one, in_dims=(0, None))(trainable, x), copies * size(trainable)


def difference(config: Ensemble, model: nn.Module, trainable: Any, frozen: Any, x: Tensor, many: Any) -> float:
    """The largest between a member's result and that of its own run, over the largest result."""
    of_one, most = (forward if config.kind == "forward" else one_step)(model, frozen), 0.0
    for number in range(config.members):
        one = tree_leaves(of_one(tree_map(lambda leaf: leaf[number], trainable), x))  # noqa: B023, called at once
        for got, wanted in zip(tree_leaves(many), one, strict=True):
            most = max(most, ((got[number] - wanted).abs().max() / wanted.abs().max()).item())
    return most


def size(tree: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


def in_a_process_of_its_own(config: Ensemble, kind: str) -> dict[str, float]:
    numbers = ("width", "layers", "rank", "members", "tokens", "device", "threads")
    flags = [text for name in numbers for text in (f"--{name}", str(getattr(config, name)))]
    own = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.ensemble", "--kind", kind, *flags]
    output = subprocess.run(command, env=own, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def main(config: Ensemble) -> None:
    if config.quick:
        config = Ensemble(**{**vars(config), "width": 64, "layers": 2, "rank": 4})
    if config.kind:
        torch.set_num_threads(config.threads)
        # Once small: libraries that load at their first use are not the ensemble's.
        measure(Ensemble(**{**vars(config), "width": 64, "layers": 2, "rank": 4}))
        print(json.dumps(measure(config)))
        return
    console = start(config)
    found = {kind: in_a_process_of_its_own(config, kind) for kind in KINDS}
    rows = [
        [kind, one["base"] / MB, one["held"] / MB, one["measured"] / MB, over(one), one["difference"]]
        for kind, one in found.items()
    ]
    columns = ["what", "base MB", "members' MB", "peak MB", "peak / (base + members')", "difference to single runs"]
    console.print(table(f"{config.members} members over one base, float32", columns, rows))
    results = {
        "forward_over_held": over(found["forward"]),
        "step_over_held": over(found["step"]),
        "largest_difference": max(one["difference"] for one in found.values()),
    }
    console.print(results)
    finish(config, results, found)


def over(one: dict[str, float]) -> float:
    return one["measured"] / (one["base"] + one["held"])


if __name__ == "__main__":
    main(tyro.cli(Ensemble))

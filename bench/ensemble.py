"""How much memory do eight LoRAs over one base take in one call?

The results are also compared with separate calls. ``forward`` is one call of all members, and ``step`` is one training
step of all members. Each runs in a separate process. The peak is the resident memory of the process (Linux) on a CPU,
and the memory of the allocator on CUDA.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dynlora_fn as dl
from bench.support.harness import Options, finish, run_in_subprocess, start, table
from bench.support.process_memory import MB, RETURN_FREED_MEMORY, count_bytes, peak_bytes, reset_peak, resident_bytes
from models.recipes import full_rank_names, lora_factors, loss_of

KINDS = ("forward", "step")
SMALL = {"width": 64, "layers": 2, "rank": 4}


@dataclass(frozen=True)
class Ensemble(Options):
    width: int = 2048
    layers: int = 6
    rank: int = 64
    members: int = 8
    tokens: int = 16
    kind: str | None = None
    """Measure only this kind, in this process, and print the figures."""


def measure(config: Ensemble) -> dict[str, float]:
    """Return the bytes of the base, of the members and at the peak.

    The result also has the difference to separate calls.
    """
    before = resident_bytes(config.device)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(config.width, config.width, bias=False) for _ in range(config.layers)))
    params = dl.init(model.to(config.device), rank=config.rank, seed=0, targets=nn.Linear, start="lora")
    model.to("meta")
    frozen = dl.partition(params, frozen=full_rank_names(params)).frozen
    trainable = tree_map(
        lambda *leaves: torch.stack(leaves), *(lora_factors(params, member) for member in range(config.members))
    )
    trainable = tree_map(lambda leaf: torch.randn_like(leaf) / config.width, trainable)
    del params
    x = torch.randn(config.tokens, config.width, device=config.device)
    run, member_bytes = contender(config, model, trainable, frozen, x)
    reset_peak(config.device)
    stacked = run()
    measured = peak_bytes(config.device) - before
    sizes = {"base": count_bytes(frozen), "held": member_bytes, "measured": measured}
    return sizes | {"difference": difference(config, model, trainable, frozen, x, stacked)}


def loss(run: Callable[..., Any], batch: Tensor) -> Tensor:
    """Return the mean squared distance of the outputs from one."""
    return (run(batch) - 1).square().mean()


def training_step(model: nn.Module, frozen: Any) -> Callable[[Any, Tensor], Any]:
    """Return a training step of one member with AdamW."""
    optimizer, gradients = dl.optim.adamw(), torch.func.grad(loss_of(model, loss, frozen))

    def step(trainable: Any, x: Tensor) -> Any:
        updates, _ = optimizer.update(gradients(trainable, x), optimizer.init(trainable), trainable, lr=1e-2)
        return dl.apply_updates(trainable, updates)

    return step


def forward(model: nn.Module, frozen: Any) -> Callable[[Any, Tensor], Any]:
    """Return a call of one member."""
    return lambda trainable, x: dl.call(model, dl.combine(trainable, frozen), x)


def contender(
    config: Ensemble, model: nn.Module, trainable: Any, frozen: Any, x: Tensor
) -> tuple[Callable[[], Any], float]:
    """Return the function to measure, and the bytes of the tensors of all members.

    In a call these are factors. In an eager step they are also gradients, updates, new factors, and two moments before
    and after the update.
    """
    of_member = (forward if config.kind == "forward" else training_step)(model, frozen)
    copies = 1 if config.kind == "forward" else 8
    return lambda: torch.vmap(of_member, in_dims=(0, None))(trainable, x), copies * count_bytes(trainable)


def difference(config: Ensemble, model: nn.Module, trainable: Any, frozen: Any, x: Tensor, stacked: Any) -> float:
    """Return the largest difference between a member's result and a separate call.

    The difference is divided by the largest element of the result.
    """
    of_member, largest = (forward if config.kind == "forward" else training_step)(model, frozen), 0.0
    for member in range(config.members):
        factors = tree_map(lambda leaf: leaf[member], trainable)  # noqa: B023, called at once
        for got, wanted in zip(tree_leaves(stacked), tree_leaves(of_member(factors, x)), strict=True):
            largest = max(largest, ((got[member] - wanted).abs().max() / wanted.abs().max()).item())
    return largest


def measure_kind(config: Ensemble, kind: str) -> dict[str, float]:
    """Measure one kind in a separate process."""
    options = ("width", "layers", "rank", "members", "tokens", "device", "threads")
    flags = [text for name in options for text in (f"--{name}", str(getattr(config, name)))]
    return dict(run_in_subprocess("bench.ensemble", ["--kind", kind, *flags], RETURN_FREED_MEMORY))


def main(config: Ensemble) -> None:
    if config.quick:
        config = Ensemble(**{**vars(config), **SMALL})
    if config.kind:
        torch.set_num_threads(config.threads)
        # A small run first loads the libraries that are loaded at first use. Their memory must not count.
        measure(Ensemble(**{**vars(config), **SMALL}))
        print(json.dumps(measure(config)))
        return
    console = start(config)
    raw = {kind: measure_kind(config, kind) for kind in KINDS}
    rows = [
        [kind, case["base"] / MB, case["held"] / MB, case["measured"] / MB, peak_ratio(case), case["difference"]]
        for kind, case in raw.items()
    ]
    columns = ["kind", "base MB", "members' MB", "peak MB", "peak / (base + members')", "difference to single runs"]
    console.print(table(f"{config.members} members over one base, float32", columns, rows))
    results = {
        "forward_over_held": peak_ratio(raw["forward"]),
        "step_over_held": peak_ratio(raw["step"]),
        "largest_difference": max(case["difference"] for case in raw.values()),
    }
    console.print(results)
    finish(config, results, raw)


def peak_ratio(case: dict[str, float]) -> float:
    """Return the peak over the bytes of the base and of the members."""
    return case["measured"] / (case["base"] + case["held"])


if __name__ == "__main__":
    main(tyro.cli(Ensemble))

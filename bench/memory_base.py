"""What does a training step take on bases of each kind, the state that it holds and its peak beyond?

A llama of about 100 million parameters unless told otherwise, each case in a process of its own, as `bench.memory`
measures it. ``codes`` and ``residual`` are bytes for each number of a base.
"""

from dataclasses import dataclass
from typing import Any

import tyro
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from bench.common import Common, finish, start, table
from bench.memory import MB, Memory, in_a_process_of_its_own
from bench.training import Size
from models.llama import TARGETS


@dataclass(frozen=True)
class MemoryBase(Common):
    width: int = 1024
    layers: int = 8
    """101 million parameters in linear layers."""
    fraction: int = 4
    """Width over rank."""
    bases: tuple[str, ...] = ("float32", "bfloat16+none", "int8+bfloat16", "nf4+bfloat16")
    """BASE+RESIDUAL"""
    kinds: tuple[str, ...] = ("static", "switching")
    """Steps, of those of `bench.memory`."""


def held_in(base: str) -> dict[str, Any]:
    kind, _, residual = base.partition("+")
    return {"base": None if kind == "float32" else kind, "residual": None if residual in ("", "none") else residual}


def bytes_a_number(config: MemoryBase, base: str) -> dict[str, float]:
    """By the shapes of one layer's weights."""
    model = Size(width=config.width, layers=1).model("cpu")
    params = dl.init(model, rank=config.width // config.fraction, seed=0, targets=TARGETS, **held_in(base))
    low_rank = [param for param in params.values() if isinstance(param, dl.LowRank)]
    numbers = sum(param.shape.numel() for param in low_rank)
    residuals = [param.base.residual for param in low_rank if isinstance(param.base, dl.bases.Quantized)]
    residual = sum(leaf.nbytes for leaf in tree_leaves(residuals))
    whole = sum(leaf.nbytes for param in low_rank for leaf in tree_leaves(param.base))
    return {"codes": (whole - residual) / numbers, "residual": residual / numbers}


def main(config: MemoryBase) -> None:
    if config.quick:
        config = MemoryBase(**{**vars(config), "width": 64, "layers": 2, "kinds": ("static",)})
    console = start(config)
    found: dict[str, dict[str, float]] = {}
    for base in config.bases:
        own = {name: getattr(config, name) for name in ("layers", "fraction", "quick", "device", "threads")}
        memory = Memory(**own, **held_in(base))
        found[base] = bytes_a_number(config, base)
        for kind in config.kinds:
            one = in_a_process_of_its_own(memory, config.width, kind)
            found[base] |= {"state": one["state"], kind: one["measured"]}
        console.print(base, found[base])
    rows = [
        [base, one["codes"], one["residual"], one["state"] / MB, *(one[kind] / MB for kind in config.kinds)]
        for base, one in found.items()
    ]
    columns = ["base+residual", "codes", "residual", "state MB", *(f"{kind} step, peak MB" for kind in config.kinds)]
    console.print(table(f"width {config.width}, {config.layers} layers", columns, rows))
    first, last = config.bases[0], config.kinds[-1]
    results = {
        f"{base} {what}": one[key] / found[first][key]
        for base, one in found.items()
        for what, key in (("state", "state"), ("peak", last))
    }
    results |= {
        f"{base} total": (one["state"] + one[last]) / (found[first]["state"] + found[first][last])
        for base, one in found.items()
    }
    console.print(results)
    finish(config, results, found)


if __name__ == "__main__":
    main(tyro.cli(MemoryBase))

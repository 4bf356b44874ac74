"""How much memory does a training step take on bases of each format?

The state and the peak beyond it are measured with `bench.memory`, each case in a separate process. The default model is
a llama with 101 million parameters in linear layers. ``codes`` and ``residual`` are bytes per element of a base.
"""

from dataclasses import dataclass
from typing import Any

import tyro

import dynlora_fn as dl
from bench.memory import Memory, measure_kind
from bench.support.harness import Options, finish, start, table
from bench.support.process_memory import MB, count_bytes
from bench.support.training_steps import StepSize
from dynlora_fn.bases._base import as_base
from models.llama import TARGETS


@dataclass(frozen=True)
class MemoryByBase(Options):
    width: int = 1024
    layers: int = 8
    fraction: int = 4
    """Width over rank."""
    bases: tuple[str, ...] = ("float32", "bfloat16+none", "int8+bfloat16", "nf4+bfloat16")
    """Formats of the bases, each as BASE+RESIDUAL."""
    kinds: tuple[str, ...] = ("static", "switching")
    """Kinds of steps, as in `bench.memory`."""


def storage_options(base: str) -> dict[str, Any]:
    """Return the arguments `base` and `residual` of `dl.init` for BASE+RESIDUAL."""
    kind, _, residual = base.partition("+")
    return {"base": None if kind == "float32" else kind, "residual": None if residual in ("", "none") else residual}


def bytes_per_element(config: MemoryByBase, base: str) -> dict[str, float]:
    """Return the bytes of codes and residual per element.

    They are counted on a model with one layer.
    """
    model = StepSize(width=config.width, layers=1).model("cpu")
    params = dl.init(model, rank=config.width // config.fraction, seed=0, targets=TARGETS, **storage_options(base))
    low_rank = [param for param in params.values() if isinstance(param, dl.LowRank)]
    elements = sum(param.shape.numel() for param in low_rank)
    residual_bytes = count_bytes([as_base(param.base).residual for param in low_rank])
    base_bytes = count_bytes([param.base for param in low_rank])
    return {"codes": (base_bytes - residual_bytes) / elements, "residual": residual_bytes / elements}


def main(config: MemoryByBase) -> None:
    if config.quick:
        config = MemoryByBase(**{**vars(config), "width": 64, "layers": 2, "kinds": ("static",)})
    console = start(config)
    raw: dict[str, dict[str, float]] = {}
    for base in config.bases:
        common = {name: getattr(config, name) for name in ("layers", "fraction", "quick", "device", "threads")}
        memory = Memory(**common, **storage_options(base))
        raw[base] = bytes_per_element(config, base)
        for kind in config.kinds:
            step = measure_kind(memory, config.width, kind)
            raw[base] |= {"state": step["state"], kind: step["measured"]}
        console.print(base, raw[base])
    rows = [
        [base, case["codes"], case["residual"], case["state"] / MB, *(case[kind] / MB for kind in config.kinds)]
        for base, case in raw.items()
    ]
    columns = ["base+residual", "codes", "residual", "state MB", *(f"{kind} step, peak MB" for kind in config.kinds)]
    console.print(table(f"width {config.width}, {config.layers} layers", columns, rows))
    first, last = config.bases[0], config.kinds[-1]
    results = {
        f"{base} {what}": case[key] / raw[first][key]
        for base, case in raw.items()
        for what, key in (("state", "state"), ("peak", last))
    }
    results |= {
        f"{base} total": (case["state"] + case[last]) / (raw[first]["state"] + raw[first][last])
        for base, case in raw.items()
    }
    console.print(results)
    finish(config, results, raw)


if __name__ == "__main__":
    main(tyro.cli(MemoryByBase))

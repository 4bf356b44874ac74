"""How much memory, traffic and time would training take at large sizes?

All figures are predictions for one GPU and one step (see `bench.support.gpu_model`). The check compares predicted and
measured peaks of small models, each in a separate process.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import tyro

import dynlora_fn as dl
from bench.memory import Memory, measure_kind
from bench.support.gpu_model import MODELS, Cluster, params_of, predictions
from bench.support.harness import Options, finish, start, table

GB = 1e9


@dataclass(frozen=True)
class Scale(Options):
    gpus: int = 64
    tokens: int = 8192
    """Tokens of each GPU in a step."""
    flops: float = 4e14
    """FLOP/s that a GPU reaches."""
    bandwidth: float = 5e10
    """Bytes that a GPU sends per second."""
    models: tuple[str, ...] = field(default_factory=lambda: tuple(MODELS))
    check: bool = True
    """Also compare predicted with measured memory on small models."""

    def cluster(self) -> Cluster:
        """Return the GPUs to predict for."""
        return Cluster(self.gpus, self.tokens, self.flops, self.bandwidth)


def paper_figures() -> dict[str, float]:
    """Return the figures that the paper reports for 1.3B, computed with this library.

    They are numbers of trainable parameters, and the bytes reduced in a step over the bytes of full rank.
    """
    model = MODELS["1.3B"]

    def reduced(params: dict[str, Any]) -> int:
        return dl.parallel.wire_bytes(dl.partition(params).trainable).reduced

    full = reduced(params_of(model, None))
    by_rank = {rank: reduced(params_of(model._replace(rank=rank), "float32")) for rank in (256, 512)}
    return {
        "full_rank_parameters": full / 4,
        **{f"trainable_at_{rank}": count / 4 for rank, count in by_rank.items()},
        "reduced_over_full_rank": by_rank[512] / full,
    }


def checked(config: Scale) -> dict[str, dict[str, float]]:
    """Return the measured and predicted peaks of compiled steps of small models.

    Peaks are beyond the state.
    """
    peaks = {}
    for name, base, kind in (("float32", None, "static"), ("int8", "int8", "static"), ("remat", None, "remat")):
        memory = Memory(quick=config.quick, threads=config.threads, layers=4, base=base, device=config.device)
        peaks[name] = measure_kind(memory, 64 if config.quick else 256, kind)
    return peaks


def main(config: Scale) -> None:
    if config.quick:
        config = Scale(**{**vars(config), "models": ("1.3B",), "check": False})
    console = start(config)
    results: dict[str, Any] = paper_figures()
    raw: dict[str, Any] = {}
    for name in config.models:
        predicted = {method: make() for method, make in predictions(config.cluster(), MODELS[name]).items()}
        raw[name] = {method: {**gpu._asdict(), "memory": gpu.memory} for method, gpu in predicted.items()}
        rows = [
            [method, gpu.memory / GB, gpu.state / GB, gpu.activations / GB, gpu.reduced / GB, gpu.wire / GB,
             gpu.seconds_computing, gpu.seconds_sending]
            for method, gpu in predicted.items()
        ]  # fmt: skip
        columns = ["on each GPU", "GB", "state", "activations", "reduced GB", "sent GB", "s computing", "s sending"]
        console.print(table(f"{name}, rank {MODELS[name].rank}, {config.gpus} GPUs", columns, rows))
    if config.check:
        raw["checked"] = checked(config)
        results["predicted_over_measured"] = {
            name: peak["predicted"] / peak["measured"] for name, peak in raw["checked"].items()
        }
    console.print(json.dumps(results, indent=1))
    finish(config, results, raw)


if __name__ == "__main__":
    main(tyro.cli(Scale))

"""How much quality does a base in low precision cost?

The main job is trained on each base with the same seeds. The tables have the validation loss in nats per token, and its
ratio to the loss on the first base.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro
from rich.console import Console

from bench.support.harness import Options, finish, start, table
from models.pretrain.config import Config, Data, Machine, Optimization, Output, Precision, Training
from models.pretrain.prepared import prepare
from models.pretrain.run import train


@dataclass(frozen=True)
class QualityByBase(Options):
    contenders: tuple[str, ...] = (
        "float32+none",
        "int8+int8",
        "int8+bfloat16",
        "nf4+bfloat16",
        "bfloat16+none",
        "int8+none",
        "nf4+none",
    )
    """Formats of the bases, each as BASE+RESIDUAL."""
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "llama-9m"
    steps: int = 400
    batch_size: int = 8
    seq_len: int = 256
    compile: bool = False


def validation_loss(config: QualityByBase, contender: str, seed: int) -> float:
    """Train on one base, and return the validation loss at the end."""
    base, residual = contender.split("+")
    with tempfile.TemporaryDirectory() as folder:
        run: Any = Config(
            training=Training(model=config.model, steps=config.steps, seed=seed),
            data=Data(batch_size=config.batch_size, seq_len=config.seq_len),
            optimization=Optimization(optimizer="adamw", warmup=config.steps // 8),
            precision=Precision(base_dtype=base, residual=residual),  # type: ignore[arg-type]
            machine=Machine(device=config.device, compile=config.compile, eager=not config.compile),
            output=Output(eval_every=config.steps, save_every=config.steps, out=Path(folder) / "run"),
        )
        return train(prepare(run, Console(quiet=True)), Console(quiet=True))["validation_loss"]


def main(config: QualityByBase) -> None:
    if config.quick:
        small = {"model": "llama-tiny", "steps": 16, "batch_size": 2, "seq_len": 32, "seeds": (0, 1)}
        config = QualityByBase(**{**vars(config), **small, "contenders": ("float32+none", "int8+bfloat16")})
    console = start(config)
    losses: dict[str, list[float]] = {contender: [] for contender in config.contenders}
    for seed in config.seeds:
        for contender in config.contenders:
            losses[contender].append(validation_loss(config, contender, seed))
            console.print(f"seed {seed}, {contender}: {losses[contender][-1]:.4f}", highlight=False)
    reference = losses[config.contenders[0]]
    relative = {
        name: [loss / wanted - 1 for loss, wanted in zip(by_seed, reference, strict=True)]
        for name, by_seed in losses.items()
    }
    rows = [
        [name, mean(by_seed), stdev(by_seed), f"{mean(relative[name]):+.3%}", f"{max(relative[name]):+.3%}"]
        for name, by_seed in losses.items()
    ]
    columns = ["base+residual", "validation loss", "std", f"over {config.contenders[0]}", "largest of the seeds"]
    console.print(table(f"{config.model}, {config.steps} steps, {len(config.seeds)} seeds", columns, rows))
    results = {name: mean(values) for name, values in relative.items()}
    console.print(results)
    finish(config, results, losses)


if __name__ == "__main__":
    main(tyro.cli(QualityByBase))

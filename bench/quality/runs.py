"""What a run is: a model's size, a method and its settings. Equal runs have equal names, and are made once."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from models.llama import LlamaConfig

HeldOut = Literal["validation", "test"]
METHODS = ("full", "lora", "relora", "galore", "apollo", "switchlora")


@dataclass(frozen=True)
class Size:
    width: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int = 4
    length: int = 128
    vocabulary: int = 256  # bytes

    def config(self) -> LlamaConfig:
        return LlamaConfig(self.width, self.hidden, self.layers, self.heads, self.vocabulary)

    def parameters(self) -> int:
        """Without embedding, head and norms."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.hidden)


SIZES = {
    "tiny": Size(width=16, hidden=48, layers=2, heads=2, steps=24, batch=2, length=32),  # whether it runs
    "small": Size(width=64, hidden=176, layers=2, heads=2, steps=1200),  # 0.10 million
    "medium": Size(width=128, hidden=352, layers=4, heads=4, steps=800),  # 0.80 million
    "main": Size(width=128, hidden=352, layers=4, heads=4, steps=400, batch=8, length=256),  # the main job's batch
    "large": Size(width=256, hidden=688, layers=4, heads=8, steps=800),  # 3.2 million
}


@dataclass(frozen=True)
class Run:
    """The defaults are the paper's recipe (arXiv:2406.06564), candidates seeded instead of stored."""

    size: str
    method: str
    fraction: int = 4  # the rank is width / fraction
    lr: float = 1e-3  # the peak
    dense_lr: float = 1.0  # that of embedding, head and norms, over `lr`
    side_lr: float = 1.0  # that of `b` over that of `a`; their geometric mean is `lr`
    optimizer: Literal["adamw", "muon"] = "adamw"  # of matrices or factors; all else has AdamW
    seed: int = 0
    held_out: HeldOut = "validation"  # the text that the loss is of

    # switches
    interval: float = 40
    ratio: float = 0.1  # of the run, after which the rate has fallen to 0.3; 0: it does not fall
    floor: float = 0.0  # a rate that is not undercut, over the one at the start
    until: float = 1.0  # share of the run after which nothing is switched
    freeze: int = 5
    every: int = 1  # steps between folds
    rule: str = "reset"
    candidates: Literal["seeded", "pool", "orthogonal"] = "seeded"
    order: Literal["sequential", "random"] = "sequential"
    incoming: Literal["both", "zero"] = "both"  # zero: what comes in on side b is 0
    start: Literal["switchlora", "lora"] = "switchlora"
    start_scale: float = 1.0  # of `b` and `a` at the start and of all candidates
    merge_every: float = 0.125  # ReLoRA's, share of the run
    base: str = "float32"

    # what the factors miss, folded into the base
    compensate: float = 0.0  # its rate over `lr`; 0: none
    compensate_every: int = 1
    normalize: Literal["spectrum", "rows"] = "spectrum"
    reduced: Literal["float32", "int8"] = "float32"  # the dense gradient, before its parts are added up

    def rank(self) -> int:
        return SIZES[self.size].width // self.fraction

    def sent_bytes(self) -> int:
        """A step, where data are parallel: gradients that are reduced, in float32 unless they are in int8.

        The factors' gradients follow from the dense ones, so that a step which is compensated sends these alone, unless
        they are in int8.
        """
        size, rank = SIZES[self.size], self.rank()
        rest = 2 * size.vocabulary * size.width + (2 * size.layers + 1) * size.width
        inner, low = size.parameters(), rank * size.layers * (8 * size.width + 3 * (size.width + size.hidden))
        if self.method in ("full", "galore", "apollo"):
            return 4 * (inner + rest)
        if not self.compensate:
            return 4 * (low + rest)
        dense = inner + 4 * low if self.reduced == "int8" else 4 * inner
        share = 1 / self.compensate_every
        return round(share * dense + (1 - share) * 4 * low) + 4 * rest

    def described(self) -> dict[str, Any]:
        """What differs from the defaults, size, method, fraction, rate and seed always."""
        always = {"size", "method", "fraction", "lr", "seed"}
        return {
            field.name: value
            for field in fields(self)
            if (value := asdict(self)[field.name]) != field.default or field.name in always
        }

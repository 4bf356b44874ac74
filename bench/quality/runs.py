"""Describe a run by its size, method and settings.

Equal runs are executed only once. The names of the fields of `Run` are also in the files of recorded runs.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from models.llama import LlamaConfig

HeldOut = Literal["validation", "test"]
PACKAGED = ("torch_muon", "galore", "apollo")  # methods that train dense weights with another package's optimizer
METHODS = ("full", *PACKAGED, "lora", "relora", "spectron", "switchlora")


@dataclass(frozen=True)
class RunSize:
    """The sizes of the model, and the number and size of the steps."""

    width: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int = 4
    length: int = 128
    vocabulary: int = 256  # bytes

    def config(self) -> LlamaConfig:
        """Return the configuration of the model."""
        return LlamaConfig(self.width, self.hidden, self.layers, self.heads, self.vocabulary)

    def parameters(self) -> int:
        """Return the number of parameters without embedding, head and norms."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.hidden)

    def rest(self) -> int:
        """Return the number of parameters of embedding, head and norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width


SIZES = {
    "tiny": RunSize(width=16, hidden=48, layers=2, heads=2, steps=24, batch=2, length=32),  # only shows that it runs
    "small": RunSize(width=64, hidden=176, layers=2, heads=2, steps=1200),  # 0.10 million
    "medium": RunSize(width=128, hidden=352, layers=4, heads=4, steps=800),  # 0.80 million
    "main": RunSize(width=128, hidden=352, layers=4, heads=4, steps=400, batch=8, length=256),  # the main job's batch
    "large": RunSize(width=256, hidden=688, layers=4, heads=8, steps=800),  # 3.2 million
    "huge": RunSize(width=384, hidden=1024, layers=6, heads=6, steps=800),  # 10.6 million
}


class OptimizerSettings(NamedTuple):
    """The fields of a run that its optimizer depends on."""

    optimizer: Literal["adamw", "muon"]
    beta2: float
    moments: Literal["float32", "8bit"]
    coefficients: str
    coupled: int
    dense_optimizer: Literal["adamw", "scale"]


_COMMON = {"size", "method", "fraction", "lr", "dense_lr", "seed", "held_out"}
_STORAGE = {"beta2", "moments", "gradients", "dense_optimizer"}
# The settings of methods that do not have all of them. A setting without an effect would make two names for one run.
_SETTINGS = {
    "full": _COMMON | _STORAGE | {"optimizer", "coefficients", "weight_decay", "base"},
    "spectron": _COMMON | _STORAGE,
    **dict.fromkeys(PACKAGED, _COMMON),
}
# Settings that are invalid with `trained` "b": they change `a`, whose rows must stay orthogonal, or need both factors.
_ONLY_BOTH = ("side_lr", "candidates", "order", "incoming", "start_scale")


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    The defaults are the recipe of the paper (arXiv:2406.06564), with seeded candidates.
    """

    size: str
    method: str
    fraction: int = 4  # the rank is width / fraction
    lr: float = 1e-3  # peak rate of matrices or factors
    dense_lr: float = 1.0  # rate of embedding, head and norms over `lr`
    side_lr: float = 1.0  # rate of `b` over the rate of `a`, whose geometric mean is `lr`
    optimizer: Literal["adamw", "muon"] = "adamw"  # of matrices or factors
    dense_optimizer: Literal["adamw", "scale"] = "adamw"  # of embedding and head; norms have AdamW
    trained: Literal["both", "b"] = "both"  # with "b" the rows of `a` are orthogonal, and only switches change them
    beta2: float = 0.999  # of every AdamW
    moments: Literal["float32", "8bit"] = "float32"  # of the optimizer of matrices or factors
    gradients: Literal["float32", "bfloat16"] = "float32"  # dtype in which gradients are reduced
    factors: Literal["float32", "bfloat16"] = "float32"  # dtype of factors and of their gradients
    coefficients: str = "jordan"  # of Muon's polynomials
    coupled: int = 0  # of Muon's step of factors
    weight_decay: float = 0.0  # of whole matrices, base and product, in units of their rate
    seed: int = 0
    held_out: HeldOut = "validation"  # the text on which the loss is measured

    # switches
    interval: float = 40
    ratio: float = 0.1  # fraction of the run in which the switching rate falls by the factor 0.3; 0 means no decay
    floor: float = 0.0  # smallest switching rate over the initial rate
    until: float = 1.0  # fraction of the run after which nothing is switched
    freeze: int = 5
    every: int = 1  # steps between folds
    rule: str = "reset"
    candidates: Literal["seeded", "pool", "orthogonal"] = "seeded"
    order: Literal["sequential", "random"] = "sequential"
    incoming: Literal["both", "zero"] = "both"  # zero: incoming vectors of side b are 0
    start: Literal["switchlora", "lora"] = "switchlora"
    start_scale: float = 1.0  # multiplies the initial `b` and `a`, and all candidates
    merge_every: float = 0.125  # ReLoRA's interval between merges, as a fraction of the run
    base: str = "float32"  # the formats of codes and residual, such as "int8+bfloat16", or only the format of codes

    # compensation, which folds the update that the factors cannot represent into the base
    compensate: float = 0.0  # its rate over `lr`; 0 means no compensation
    compensate_every: int = 1
    normalize: Literal["spectrum", "rows"] = "spectrum"
    reduced: Literal["float32", "int8"] = "float32"  # dtype in which dense gradients are reduced

    def __post_init__(self) -> None:
        changed = {name: value for name in _ONLY_BOTH if (value := getattr(self, name)) != getattr(type(self), name)}
        if self.trained == "b" and changed:
            raise ValueError(f"`trained` is 'b', but the run has {changed}, which need both factors; leave them out")
        if self.method == "full" and self.codes() and not self.residual():
            raise ValueError(f"`base` is {self.base!r}, but full rank needs a residual; append '+bfloat16'")
        settings = set(self.described())
        if unused := settings - _SETTINGS.get(self.method, settings):
            raise ValueError(f"{self.method!r} does not use {', '.join(sorted(unused))}; leave them out")

    def rank(self) -> int:
        """Return the rank of the factors."""
        return SIZES[self.size].width // self.fraction

    def codes(self) -> str | None:
        """Return the format of the base's codes, or None for a base in float32."""
        return None if self.base == "float32" else self.base.split("+")[0]

    def residual(self) -> str | None:
        """Return the format of the base's residual, or None if it has none."""
        return self.base.partition("+")[2] or None

    def settings(self) -> OptimizerSettings:
        """Return the settings of the optimizer."""
        return OptimizerSettings(
            self.optimizer, self.beta2, self.moments, self.coefficients, self.coupled, self.dense_optimizer
        )

    def sent_bytes(self) -> int:
        """Return the bytes of the gradients that a data-parallel step reduces and stores.

        A compensated step reduces dense gradients in float32, and derives the gradients of the factors from them. With
        dense gradients in int8, it also reduces the gradients of the factors.
        """
        size, rank = SIZES[self.size], self.rank()
        inner, rest = size.parameters(), size.rest()
        low = rank * size.layers * (8 * size.width + 3 * (size.width + size.hidden))
        if self.trained == "b":
            low = rank * size.layers * (5 * size.width + 2 * size.hidden)
        entry = 2 if self.gradients == "bfloat16" else 4
        low *= 2 if self.factors == "bfloat16" else entry
        if self.method in ("full", *PACKAGED):
            return entry * (inner + rest)
        if not self.compensate:
            return low + entry * rest
        dense = inner + low if self.reduced == "int8" else 4 * inner
        fraction = 1 / self.compensate_every  # the fraction of the steps that compensate
        return round(fraction * dense + (1 - fraction) * low) + entry * rest

    def described(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults.

        Size, method, fraction, rate and seed are always included.
        """
        always = {"size", "method", "fraction", "lr", "seed"}
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default or field.name in always
        }

"""The options of the command line, in groups.

Each flag is the name of its field without the group: `--seq-len` sets `data.seq_len`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch


class DefaultRates(NamedTuple):
    """Peak learning rates that apply where none is given."""

    adamw: Mapping[str, float]  # by method
    muon: Mapping[str, float]  # by method
    dense_with_muon: float | None  # of embedding, head and norms; None means the same rate as the factors


PAPER_RATES = {"full": 1e-3, "lora": 1e-2, "relora": 1e-2, "switchlora": 2e-2}
# From `bench.quality methods`: the rate of Muon on this job's batch, that of dense weights at size medium.
PRETRAIN_RATES = DefaultRates(adamw=PAPER_RATES, muon=dict.fromkeys(PAPER_RATES, 2e-3), dense_with_muon=3.2e-2)


@dataclass(frozen=True)
class Training:
    """The method, the model, and how long it is trained."""

    method: Literal["full", "lora", "relora", "switchlora"] = "switchlora"
    """Full-rank training, plain LoRA, ReLoRA (arXiv:2307.05695) or SwitchLoRA (arXiv:2406.06564).
    ReLoRA merges and redraws the factors at intervals, SwitchLoRA replaces a few of their vectors at a time."""
    model: str = "llama-9m"
    """Name of the model's configuration: llama-tiny, llama-9m, ..., llama-1b, llama-7b.
    The number is the size with a vocabulary of 32,100 tokens."""
    rank: int = 32
    """Rank of the factors, at most the smaller side of every target."""
    targets: tuple[str, ...] = ()
    """Names or globs of the weights that become low-rank. By default all of attention and feed-forward."""
    compensate: float = 0.0
    """Rate at which the part of the gradient that the factors miss is folded into the bases, over the learning rate.
    A good value is 0.1. The default 0 turns it off.
    It needs the gradients of dense weights, which several processes reduce, but no moments of them."""
    steps: int = 400
    """Optimizer steps of the run."""
    seed: int = 0
    """Seed of the initial weights, the vectors and the batches."""


@dataclass(frozen=True)
class Data:
    """The text, and the batches that are drawn from it."""

    text: tuple[Path, ...] = ()
    """Files or folders to train on. By default the sources of Python's standard library."""
    dataset: str | None = None
    """Hugging Face dataset to train on: a name, or a local folder in one of its formats. Default None uses `text`."""
    dataset_config: str | None = None
    """Configuration of the dataset. Default None uses its default configuration."""
    text_column: str = "text"
    """Column of the dataset that contains the text."""
    dataset_characters: int = 200_000_000
    """Largest number of characters to read from the dataset. They are stored in memory as tokens."""
    tokenizer: str | None = None
    """Name, folder or file of a tokenizer for `transformers`. Default None uses bytes as tokens."""
    seq_len: int = 256
    """Tokens in a sequence."""
    batch_size: int = 8
    """Sequences in each backward pass, over all processes."""
    grad_accum: int = 1
    """Backward passes whose gradients are averaged for one step."""


@dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rates."""

    optimizer: Literal["adamw", "muon"] | None = None
    """Optimizer of the factors, or of the same matrices for full. Embedding, head and norms use AdamW.
    Default None means muon for switchlora, except with --shard-factors or --moments 8bit, and adamw otherwise."""
    lr: float | None = None
    """Peak learning rate of the factors, or of the same matrices for full.
    Default None means 2e-3 with muon, and the papers' rates with adamw.
    Those are 1e-3 for full, 1e-2 for lora and relora, and 2e-2 for switchlora."""
    dense_lr: float | None = None
    """Peak learning rate of embedding, head and norms. Default None means 3.2e-2 beside muon, and `lr` otherwise."""
    warmup: int = 50
    """Steps of linear warm-up. A cosine to a tenth of the peak follows.
    After each merge, relora warms up again for a tenth as many steps."""
    weight_decay: float = 0.0
    """Decoupled decay of every trained weight, per unit of learning rate. A low-rank weight decays with its base."""
    clip: float = 1.0
    """Largest global norm of the gradients. Larger gradients are scaled down to it."""


@dataclass(frozen=True)
class Switching:
    """How often vectors are replaced, for switchlora and relora."""

    interval: float = 40
    """Steps between two switches of the same vector, at the start of the run (switchlora)."""
    ratio: float = 0.1
    """Fraction of the run over which the frequency of switches decays to 0.3 of its value (switchlora)."""
    freeze: int = 5
    """Steps for which the counterpart of a switched vector is frozen (switchlora)."""
    candidates: Literal["seeded", "pool"] = "seeded"
    """Source of the incoming vectors: generated from the seed, or a pool in host memory (switchlora)."""
    merge_every: int = 100
    """Steps between two merges (relora)."""


@dataclass(frozen=True)
class Precision:
    """The formats of bases, moments and activations."""

    base_dtype: Literal["float32", "bfloat16", "int8", "float8", "nf4"] = "float32"
    """Storage format of the frozen bases."""
    residual: Literal["none", "int8", "bfloat16"] = "bfloat16"
    """Format of the residual that keeps a base below float32 from drifting as vectors are switched.
    It takes 0, 1 or 2 bytes per element. A float32 base has none."""
    residual_device: str | None = None
    """Device that stores the residuals, such as cpu for host memory. Default None means the device of the bases."""
    moments: Literal["float32", "8bit"] = "float32"
    """Format of the two moments of AdamW: 4 bytes or 1 byte per trained element."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the activations, set through autocast. Factors and full-rank weights stay in float32."""


@dataclass(frozen=True)
class Machine:
    """The device, the compiler, and what several processes divide among them."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device to train on. The default is cuda where torch finds it, and cpu otherwise."""
    compile: bool = False
    """Compile the step into one graph. On a CPU this takes minutes, and then saves a third of each step."""
    shard: bool = False
    """Shard every base by rows over the processes. Each layer is all-gathered when it is needed."""
    shard_factors: bool = False
    """With --shard, also shard the factors, their gradients and their moments.
    A switch then sends the rows that it folds into the bases."""
    check_every: int = 100
    """Steps between two checks that all processes have the same state. Each checkpoint is preceded by one too."""


@dataclass(frozen=True)
class Output:
    """What the run writes, and how often."""

    out: Path | None = None
    """Folder for metrics, checkpoints, plot and model. Default None means runs/DATE-TIME-METHOD."""
    resume: bool = False
    """Continue the run in --out from its newest undamaged checkpoint, bit for bit."""
    json: bool = False
    """Print the closing table as one JSON object on the last line."""
    eval_every: int = 100
    """Steps between two validation losses."""
    eval_batches: int = 8
    """Batches of a validation loss, the same ones each time."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 2
    """Number of checkpoints that are stored. Older ones are deleted."""


@dataclass(frozen=True)
class Config:
    """Pre-train a LLaMA with low-rank factors whose vectors are switched.

    Without options it trains on the bytes of the sources of Python's standard library.
    """

    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    optimization: Optimization = field(default_factory=Optimization)
    switching: Switching = field(default_factory=Switching)
    precision: Precision = field(default_factory=Precision)
    machine: Machine = field(default_factory=Machine)
    output: Output = field(default_factory=Output)

    default_rates: ClassVar[DefaultRates] = PRETRAIN_RATES
    # Options that may differ between a run and its continuation, because no result depends on them.
    free_to_change: ClassVar[tuple[str, ...]] = ("out", "resume", "json", "keep", "check_every")

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name, without the groups."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(self))
        return {name: value for group in groups for name, value in vars(group).items()}

    def inner_optimizer(self) -> Literal["adamw", "muon"]:
        """Return the optimizer of the factors, or of the same matrices for full."""
        if self.optimization.optimizer is not None:
            return self.optimization.optimizer
        supports_muon = not self.machine.shard_factors and self.precision.moments == "float32"
        return "muon" if self.training.method == "switchlora" and supports_muon else "adamw"

    def alpha(self) -> float:
        """Return the alpha of the low-rank weights, which are ``base + alpha / rank * b @ a``."""
        return 1.0

    def decays_weights(self) -> bool:
        """Return whether `weight_decay` is of the weights, and not of their factors."""
        return True

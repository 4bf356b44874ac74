"""The options of the command line, in groups.

The name of a flag is the name of the field without its group: `--seq-len` sets `data.seq_len`. The text below a field
is its help text.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import tyro

from models import llama


def computed(text: str) -> Any:
    """Return a mark that makes the help show `text` as the default of an option.

    It is for an option whose default depends on other options.
    """
    is_empty = ("", "''", "None").__contains__
    return tyro.conf.arg(help_behavior_hint=lambda label: f"(default: {text if is_empty(label) else label})")


class DefaultRates(NamedTuple):
    """The default peak learning rates."""

    adamw: Mapping[str, float]  # of the factors, for each method
    muon: Mapping[str, float]  # of the factors, for each method
    dense_with_muon: float | None  # of embedding, head and norms; None means the rate of the factors


PAPER_RATES = {"full": 1e-3, "lora": 1e-2, "relora": 1e-2, "switchlora": 2e-2}
# Chosen with `bench.quality methods`: the rate of Muon at the default batch, the rate of dense weights at size medium.
PRETRAIN_RATES = DefaultRates(adamw=PAPER_RATES, muon=dict.fromkeys(PAPER_RATES, 2e-3), dense_with_muon=3.2e-2)


@dataclass(frozen=True)
class Training:
    """The model, the method and the length of the training."""

    method: Literal["full", "lora", "relora", "switchlora"] = "switchlora"
    """Train all weights (full), or factors of low rank: LoRA, ReLoRA (arXiv:2307.05695), SwitchLoRA (arXiv:2406.06564).
    ReLoRA merges and redraws factors at intervals, SwitchLoRA replaces a few of their vectors at a time."""
    model: str = "llama-9m"
    """Train the model configuration of this name: llama-tiny, llama-9m, ..., llama-1b, llama-7b.
    The number is the count of parameters with a vocabulary of 32,100 tokens."""
    rank: Annotated[int | None, computed("half the width of the model if only b is trained, a quarter otherwise")] = (
        None
    )
    """Use factors of this rank. It is at most the smaller side of every weight that becomes low-rank."""
    trained: Annotated[
        Literal["both", "b"] | None,
        computed("b for switchlora with muon, but both with pools or --shard-factors; both for other methods"),
    ] = None
    """Train both factors, or only b. The rows of a are then orthogonal and change only by switches (arXiv:2502.07222).
    At twice the rank, b of a square weight has as many elements as both factors."""
    targets: Annotated[tuple[str, ...], computed("all of attention and feed-forward")] = ()
    """Make the weights with these names low-rank. Names may be globs."""
    compensate: float = 0.0
    """Fold the part of the gradient that the factors miss into the bases, at this rate times the learning rate.
    A good value is 0.1, and 0 turns it off. This needs gradients of dense weights, but no moments."""
    steps: int = 400
    """Take this many optimizer steps. With --resume, a larger number than before extends the run."""
    seed: int = 0
    """Draw initial weights, vectors and batches from this seed."""


@dataclass(frozen=True)
class Data:
    """The text, and the batches that are drawn from it."""

    text: Annotated[tuple[Path, ...], computed("the sources of Python's standard library")] = ()
    """Train on these files, and on the text files in these folders."""
    validation: Annotated[tuple[Path, ...], computed("a twentieth of the text, a tenth of a single file")] = ()
    """Compute the validation loss on these files or folders. They are not trained on."""
    dataset: Annotated[str | None, computed("none")] = None
    """Train on a Hugging Face dataset instead: a name, a folder, or a file in JSON lines, Parquet or CSV."""
    dataset_config: Annotated[str | None, computed("the dataset's default")] = None
    """Use this configuration of the dataset."""
    text_column: str = "text"
    """Read the text from this column of the dataset."""
    dataset_characters: int = 200_000_000
    """Read at most this many characters of the dataset."""
    tokenizer: Annotated[str | None, computed("none, tokens are bytes")] = None
    """Use the tokenizer of `transformers` with this name, folder or file."""
    seq_len: int = 256
    """Train on sequences of this many tokens."""
    batch_size: int = 8
    """Use this many sequences in each backward pass, in all processes together."""
    grad_accum: int = 1
    """Average the gradients of this many backward passes in each step."""


@dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rates."""

    optimizer: Annotated[
        Literal["adamw", "muon"] | None,
        computed("muon for switchlora, but adamw with --shard-factors; adamw for other methods"),
    ] = None
    """Train the factors, or the same matrices for full, with this optimizer. Embedding, head and norms use AdamW."""
    lr: Annotated[
        float | None,
        computed("2e-3 with muon; with adamw 1e-3 for full, 1e-2 for lora and relora, 2e-2 for switchlora"),
    ] = None
    """Let the learning rate of the factors, or of the same matrices for full, rise to this peak."""
    dense_lr: Annotated[float | None, computed("3.2e-2 beside muon, the value of --lr otherwise")] = None
    """Let the learning rate of embedding, head and norms rise to this peak."""
    dense_optimizer: Literal["adamw", "scale"] = "adamw"
    """Train embedding and head with this optimizer. Norms use AdamW.
    scale (arXiv:2506.16659) stores one moment for the head and none for the embedding."""
    warmup: int = 50
    """Raise the learning rate to its peak over this many steps. It then falls along a cosine to a tenth of the peak.
    After each merge, relora repeats the warm-up in a tenth as many steps."""
    weight_decay: float = 0.0
    """Multiply every trained weight by 1 minus this times the learning rate at each step (decoupled decay).
    A low-rank weight decays together with its base."""
    clip: float = 1.0
    """Scale the gradients down to this global norm if their norm is larger."""


@dataclass(frozen=True)
class Switching:
    """The vectors that are replaced, and how often, for switchlora and relora."""

    interval: float = 40
    """Switch each vector every this many steps at the start of the run (switchlora)."""
    ratio: float = 0.1
    """Multiply the frequency of switches by 0.3, gradually, in every such fraction of the run (switchlora)."""
    freeze: int = 5
    """Freeze the counterpart of a switched vector for this many steps (switchlora)."""
    candidates: Literal["seeded", "pool"] = "seeded"
    """Generate the incoming vectors from the seed, or take them from a pool in host memory (switchlora)."""
    merge_every: int = 100
    """Merge and redraw the factors every this many steps (relora)."""


@dataclass(frozen=True)
class Precision:
    """The formats of bases, moments and activations."""

    base_dtype: Literal["float32", "bfloat16", "int8", "float8", "nf4"] = "float32"
    """Store the frozen bases in this format."""
    residual: Literal["none", "int8", "bfloat16"] = "bfloat16"
    """Store the rounding errors of bases below float32 in this format, so that they do not accumulate.
    This takes 0 (none), 1 (int8) or 2 (bfloat16) bytes for each element. A float32 base has no residual."""
    residual_device: Annotated[str | None, computed("the device of the bases")] = None
    """Store the residuals on this device, such as cpu for host memory."""
    moments: Literal["float32", "8bit"] = "float32"
    """Store the moments of an optimizer in this format: 4 bytes or 1 byte for each element."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute activations in this dtype, with autocast. Factors and full-rank weights stay in float32."""


@dataclass(frozen=True)
class Machine:
    """The device, the compiler, and the sharding over several processes."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Train on this device. The default is cuda where torch finds it, and cpu otherwise."""
    compile: bool = False
    """Compile the step into one graph. On a CPU this takes minutes, and then saves a third of the time of each step.
    Without --compile and --eager it is compiled on a GPU, and on a CPU if the run is long enough to save time."""
    eager: bool = False
    """Do not compile the step."""
    shard: bool = False
    """Shard every base by rows over the processes. The base of a layer is all-gathered when the layer needs it."""
    shard_factors: bool = False
    """With --shard, also shard the factors, their gradients and their moments.
    Each switch then sends the vectors that it folds into the bases."""
    check_every: int = 100
    """Check every this many steps, and before each checkpoint, that all processes have the same state."""


@dataclass(frozen=True)
class Output:
    """The files and lines that the run writes, and how often."""

    out: Annotated[Path | None, computed("runs/DATE-TIME-METHOD")] = None
    """Write metrics, checkpoints, plot and model to this folder."""
    resume: bool = False
    """Continue the run in --out from its newest undamaged checkpoint, bit for bit.
    Options that are not given keep the values of the run."""
    config: Annotated[Path | None, computed("none")] = None
    """Read options from this file in JSON or TOML, such as the config.json of a run.
    Options on the command line override them."""
    json: bool = False
    """Print the summary as one JSON object on the last line."""
    eval_every: int = 100
    """Compute the validation loss every this many steps."""
    eval_batches: int = 8
    """Compute the validation loss over this many batches, which are the same each time."""
    sample_every: int = 0
    """Print a continuation of the first validation text every this many steps. 0 prints none."""
    save_every: int = 100
    """Write a checkpoint every this many steps."""
    keep: int = 2
    """Keep this many of the newest checkpoints, and delete older ones."""
    compare: Annotated[tuple[Path, ...], computed("none")] = ()
    """Also plot the validation losses of the runs in these folders."""
    tensorboard: bool = False
    """Also write losses and rates for TensorBoard, to a folder inside the run. This needs the extra `tensorboard`."""


@dataclass(frozen=True)
class Config:
    """Pre-train a LLaMA with low-rank factors whose vectors are switched.

    By default the text is the sources of Python's standard library, and tokens are bytes.
    """

    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    optimization: Optimization = field(default_factory=Optimization)
    switching: Switching = field(default_factory=Switching)
    precision: Precision = field(default_factory=Precision)
    machine: Machine = field(default_factory=Machine)
    output: Output = field(default_factory=Output)

    default_rates: ClassVar[DefaultRates] = PRETRAIN_RATES
    # Options of the command, which are not recorded as options of the run.
    not_recorded: ClassVar[tuple[str, ...]] = ("out", "resume", "config", "json", "compare", "eager")
    # Values of options that the config.json of an older run does not have, where the default is another one now.
    defaults_before: ClassVar[Mapping[str, Any]] = {"trained": "both"}
    # Options that a resumed run may change. No step depends on them, with two exceptions: the texts, whose digest is
    # recorded and compared, and the number of steps, whose change is printed.
    free_to_change: ClassVar[tuple[str, ...]] = (
        *("eval_every", "eval_batches", "save_every", "keep", "check_every", "sample_every", "tensorboard", "steps"),
        *("text", "validation", "dataset", "dataset_config", "text_column", "dataset_characters"),
    )

    def options(self) -> dict[str, Any]:
        """Return the value of every option by its name, without the groups."""
        groups = (getattr(self, group.name) for group in dataclasses.fields(self))
        return {name: value for group in groups for name, value in vars(group).items()}

    def inner_optimizer(self) -> Literal["adamw", "muon"]:
        """Return the optimizer of the factors, or of the same weights for full."""
        if self.optimization.optimizer is not None:
            return self.optimization.optimizer
        return "muon" if self.training.method == "switchlora" and not self.machine.shard_factors else "adamw"

    def trained(self) -> Literal["both", "b"]:
        """Return which factors are trained."""
        if self.training.trained is not None:
            return self.training.trained
        is_recipe = self.training.method == "switchlora" and self.inner_optimizer() == "muon"
        is_possible = self.switching.candidates == "seeded" and not self.machine.shard_factors
        return "b" if is_recipe and is_possible else "both"

    def rank(self) -> int:
        """Return the rank of the factors.

        By default, a square weight has half as many trained elements as with full rank, with either choice of
        `trained`.
        """
        if self.training.rank is not None:
            return self.training.rank
        return llama.config(self.training.model).width // (2 if self.trained() == "b" else 4)

    def tokenizer(self) -> str | None:
        """Return the name, folder or file of the tokenizer.

        None means that tokens are bytes.
        """
        return self.data.tokenizer

    def alpha(self) -> float:
        """Return the scale `alpha` of a weight, ``base + alpha / rank * b @ a``."""
        return 1.0

    def decays_weights(self) -> bool:
        """Return whether low-rank weights decay together with their bases.

        Otherwise only the factors decay.
        """
        return True

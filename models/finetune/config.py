"""The options for fine-tuning a model of `transformers`.

They are the options of pre-training with other defaults, and some further options.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from models.pretrain import checks
from models.pretrain import config as pretrain
from models.pretrain.processes import SINGLE_PROCESS, Processes

# These are the rates of both optimizers. Beside Muon, pre-training uses a higher rate for embedding, head and norms,
# which start from random values there. Here they are already trained.
RATES = {"full": 2e-5, "lora": 2e-4, "relora": 2e-4, "switchlora": 2e-4}
FINETUNE_RATES = pretrain.DefaultRates(adamw=RATES, muon=RATES, dense_with_muon=None)


@dataclass(frozen=True)
class Training(pretrain.Training):
    """The model, the method and the length of the training."""

    model: Annotated[str, pretrain.computed("none, it is required")] = ""
    """Train the model in this folder, as `save_pretrained` writes it, in float32. Code in the folder is not run."""
    rank: int = 16
    trained: Literal["both", "b"] = "both"
    alpha: Annotated[float | None, pretrain.computed("the rank")] = None
    """Scale the factors as PEFT does: a weight is `base + alpha / rank * b @ a`.
    The default trains at the same learning rate as PEFT with `lora_alpha` equal to `r`."""
    targets: Annotated[tuple[str, ...], pretrain.computed("all linear layers except the head")] = ()
    steps: int = 200
    train_rest: bool = False
    """Also train embeddings, norms, biases and the head, with full rank. Otherwise they are frozen, except for full."""


@dataclass(frozen=True)
class Data(pretrain.Data):
    """The text, and the batches that are drawn from it."""

    text: Annotated[tuple[Path, ...], pretrain.computed("none, it is required, except with --dataset")] = ()
    tokenizer: Annotated[str | None, pretrain.computed("the tokenizer in the folder of the model")] = None
    """Use the tokenizer of `transformers` with this name, folder or file. It is written beside model and adapter."""


@dataclass(frozen=True)
class Optimization(pretrain.Optimization):
    """The optimizer and its learning rates."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """Train the factors, or the same matrices for full, with this optimizer. Embedding, head and norms use AdamW.
    Most models were pre-trained with AdamW. Muon fine-tunes these worse than AdamW does (arXiv:2605.10468)."""
    lr: Annotated[float | None, pretrain.computed("2e-5 for full, 2e-4 for the other methods")] = None
    dense_lr: Annotated[float | None, pretrain.computed("the value of --lr")] = None
    warmup: int = 10
    weight_decay: float = 0.0
    """Multiply weights (full) or factors by 1 minus this times the learning rate at each step (decoupled decay).
    A decay of the factors pulls the weights back to the weights of the given model."""


@dataclass(frozen=True)
class Output(pretrain.Output):
    """The files and lines that the run writes, and how often."""

    export: Literal["merged", "adapter", "both"] = "both"
    """Write a merged model for `from_pretrained`, a PEFT adapter for the given model, or both."""
    adapter_rank: Annotated[int | None, pretrain.computed("the rank of the factors, which is exact for lora")] = None
    """Approximate the change of each weight with this rank in the adapter. A line shows its validation loss."""


@dataclass(frozen=True)
class Config(pretrain.Config):
    """Fine-tune a causal language model of `transformers`, with low-rank factors.

    The model is read from a local folder.
    """

    training: Training = field(default_factory=Training)
    data: Data = field(default_factory=Data)
    optimization: Optimization = field(default_factory=Optimization)
    output: Output = field(default_factory=Output)

    default_rates: ClassVar[pretrain.DefaultRates] = FINETUNE_RATES
    # The names in `model`, `text` and `tokenizer` may change, because config.json records digests of their contents.
    free_to_change: ClassVar[tuple[str, ...]] = (
        *pretrain.Config.free_to_change,
        *("model", "tokenizer", "export", "adapter_rank"),
    )

    def tokenizer(self) -> str:
        """Return the option `tokenizer`, or the folder of the model."""
        return self.data.tokenizer or self.training.model

    def alpha(self) -> float:
        """Return the option `alpha`, or the rank."""
        return float(self.rank() if self.training.alpha is None else self.training.alpha)

    def decays_weights(self) -> bool:
        """Return whether weights decay, and not only their factors.

        A decay of low-rank weights together with their bases would pull the given model to zero.
        """
        return self.training.method == "full"


def check(config: Config, processes: Processes = SINGLE_PROCESS) -> None:
    """Check the options, first as pre-training does.

    Raises:
        ValueError: For the first invalid option. The message names the option, the requirement and the value.
    """
    checks.check(config, processes)
    model, adapter_rank = config.training.model, config.output.adapter_rank
    if not model or not (Path(model) / "config.json").is_file():
        raise ValueError(f"`model` must be a folder with config.json, got {model!r}")
    if not (config.data.text or config.data.dataset):
        raise ValueError("`text` or `dataset` must be given, got neither; pass files or folders with --text")
    if not (config.alpha() > 0 and math.isfinite(config.alpha())):
        raise ValueError(f"`alpha` must be positive and finite, got {config.alpha()}")
    if adapter_rank is not None and adapter_rank < 1:
        raise ValueError(f"`adapter_rank` must be at least 1, got {adapter_rank}")
    if config.training.method == "full" and config.output.export == "adapter":
        raise ValueError("`export` must not be 'adapter' for full, which has no low-rank weights; use 'merged'")
    weight_decay = config.optimization.weight_decay
    if weight_decay and config.inner_optimizer() == "muon" and not config.decays_weights():
        raise ValueError(f"`weight_decay` must be 0 for factors that muon trains, got {weight_decay}; use adamw")

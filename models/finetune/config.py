"""What can be set when a model of `transformers` is fine-tuned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.pretrain.config import Config as PretrainConfig
from models.pretrain.ranks import ALONE, Ranks

LEARNING_RATES = {"full": 2e-5, "lora": 2e-4, "relora": 2e-4, "switchlora": 2e-4}


@dataclass(frozen=True)
class Config(PretrainConfig):
    """Fine-tunes a causal language model of `transformers` in a local folder on text, with low-rank factors.

    Only factors are trained unless --train-rest is given. `lr` is 2e-5 for full and 2e-4 otherwise unless given, and
    the tokenizer the model's own.
    """

    model: str = ""
    """Folder of the model, as `save_pretrained` writes it."""
    rank: int = 16
    targets: tuple[str, ...] = ()
    """Names or globs of the weights that become low-rank, all of the linear layers but the head unless given."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of factors, or of the matrices in their place for full."""
    train_rest: bool = False
    """Train embeddings, norms, biases and the head too, full-rank."""
    steps: int = 200
    warmup: int = 10
    export: Literal["merged", "adapter", "both"] = "both"
    """What to write: a model for `from_pretrained`, an adapter of PEFT against the model that was given, or both."""
    adapter_rank: int | None = None
    """Of the adapter, which the whole change is cut to; that of the factors unless given."""

    def check(self, ranks: Ranks = ALONE) -> None:
        """As of the pre-training job."""
        super().check(ranks)
        if not self.model or not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"`model` must be a folder with config.json, got {self.model!r}")
        if not (self.text or self.dataset):
            raise ValueError("`text` must name files or folders to train on, or `dataset` a dataset, got neither")
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise ValueError(f"`adapter_rank` must be at least 1, got {self.adapter_rank}")
        if self.method == "full" and self.export == "adapter":
            raise ValueError("`export` must not be 'adapter' for full, which has no low-rank weights, got 'adapter'")

    def peak_lr(self) -> float:
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    def dense_share(self) -> float:
        """A trained model's embedding, head and norms take no rate that was found for a new one's."""
        return 1.0 if self.dense_lr is None else self.dense_lr / self.peak_lr()

"""What can be set from the command line, and what is wrong with it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, TypeVar

import torch

from models.pretrain.ranks import ALONE, Ranks

LEARNING_RATES = {"full": 1e-3, "lora": 1e-2, "relora": 1e-2, "switchlora": 2e-2}
MUON, BESIDE_MUON = 2e-3, 3.2e-2  # by `bench.quality methods`: the first on this job's batch, the second at size medium
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What may differ between a run and its continuation, since no number depends on it.
_FREE_TO_CHANGE = ("out", "resume", "json", "keep", "check_every")


ConfigT = TypeVar("ConfigT", bound="Config")


@dataclass(frozen=True)
class Config:
    """Pre-trains a LLaMA with low-rank factors that are switched during training.

    Without arguments: byte-level, on the sources of Python's standard library.
    """

    method: Literal["full", "lora", "relora", "switchlora"] = "switchlora"
    """Full-rank AdamW, plain LoRA, LoRA merged and redrawn at times (arXiv:2307.05695), or switched factors
    (arXiv:2406.06564)."""
    model: str = "llama-9m"
    """Configuration of the model: llama-tiny, llama-9m, ..., llama-1b, llama-7b, named by size with 32,100 tokens."""
    rank: int = 32
    """Of the factors; at most the smaller side of every target."""
    targets: tuple[str, ...] = ()
    """Names or globs of the weights that become low-rank, all of attention and feed-forward unless given."""
    candidates: Literal["seeded", "pool"] = "seeded"
    """Where incoming vectors come from: regenerated from a seed, or stored in host memory."""

    text: tuple[Path, ...] = ()
    """Files or folders to train on, instead of the standard library."""
    dataset: str | None = None
    """A Hugging Face dataset, or a local folder in one of its formats, instead."""
    dataset_config: str | None = None
    """Which of the dataset's configurations."""
    text_column: str = "text"
    """The dataset's column of text."""
    dataset_characters: int = 200_000_000
    """Characters of the dataset to read at most; it is kept in memory as tokens."""
    tokenizer: str | None = None
    """A tokenizer's name, folder or file for `transformers`; bytes unless given."""

    steps: int = 400
    batch_size: int = 8
    """Sequences in each backward pass, of all processes together."""
    seq_len: int = 256
    """Tokens in a sequence."""
    grad_accum: int = 1
    """Backward passes whose gradients are averaged for one step."""
    lr: float | None = None
    """Peak learning rate; the papers' for AdamW unless given, 1e-3 full, 1e-2 lora and relora, 2e-2 switchlora, and
    2e-3 for Muon."""
    dense_lr: float | None = None
    """That of embedding, head and norms; `lr` unless given, and 3.2e-2 beside Muon."""
    warmup: int = 50
    """Steps of linear warm-up, then cosine to a tenth; ReLoRA warms up again after each merge, a tenth as long."""
    optimizer: Literal["adamw", "muon"] | None = None
    """Of factors, or of the matrices in their place for full; embedding, head and norms have AdamW. Unless given it is
    muon for switchlora, but for --shard-factors and --moments 8bit, and adamw otherwise."""
    weight_decay: float = 0.0
    clip: float = 1.0
    """Norm that gradients are clipped to."""

    interval: float = 40
    """Steps between two switches of the same vector, at the start."""
    ratio: float = 0.1
    """Share of the run after which vectors are switched 0.3 times as often."""
    freeze: int = 5
    """Steps that the counterpart of a switched vector stands still."""
    compensate: float = 0.0
    """Rate, over the learning rate, at which what the factors miss of the gradient is folded into the bases; 0.1 is a
    good one. It takes the gradients of dense weights, as full-rank training does, but no moments of them; several
    processes reduce them."""
    merge_every: int = 100
    """Steps between ReLoRA's merges."""

    base_dtype: Literal["float32", "bfloat16", "int8", "float8", "nf4"] = "float32"
    """Of the frozen bases."""
    residual: Literal["none", "int8", "bfloat16"] = "bfloat16"
    """What keeps a base below float32 from drifting as it is switched: 0, 1 or 2 bytes for each of its numbers."""
    residual_device: str | None = None
    """Where residuals lie, cpu for host memory; with the bases unless given."""
    shard: bool = False
    """Of several processes, each keeps its share of the rows of every base, and gathers a layer's when it needs it."""
    shard_factors: bool = False
    """With --shard, each process keeps its share of the factors, their gradients and moments as well. A switch then
    sends the rows that it folds into the bases."""
    moments: Literal["float32", "8bit"] = "float32"
    """Of AdamW's two moments: 4 bytes or 1 for each number that it trains."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations, through autocast; factors, full-rank weights and moments are float32."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    """One graph for the whole step. It takes minutes to compile on a CPU, and then saves a third of each step."""
    seed: int = 0

    eval_every: int = 100
    """Steps between two validation losses."""
    eval_batches: int = 8
    """Batches of a validation loss, the same ones each time."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    check_every: int = 100
    """Steps between two looks at whether all processes hold the same state; there is one before each checkpoint too."""
    out: Path | None = None
    """Folder for metrics, checkpoints, plot and model; runs/DATE-TIME-METHOD unless given."""
    resume: bool = False
    """Continue the run in --out from its newest good checkpoint, bit for bit."""
    json: bool = False
    """Print the closing table as one JSON object on the last line."""

    def check(self, ranks: Ranks = ALONE) -> None:
        """Raises ValueError for the first setting that cannot be, naming it, the rule and the value."""
        positive = ("rank", "steps", "batch_size", "seq_len", "grad_accum", "eval_every", "eval_batches", "save_every")
        for name in (*positive, "keep", "check_every", "merge_every", "dataset_characters"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "freeze", "compensate", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        for name in ("lr", "dense_lr", "clip", "ratio", "interval"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive and finite, got {value}")
        if self.text and self.dataset:
            raise ValueError(f"`text` and `dataset` must not both be given, got {self.text[0]} and {self.dataset!r}")
        if self.candidates == "pool" and self.method != "switchlora":
            raise ValueError(f"`candidates` must be 'seeded' except for switchlora, got 'pool' for {self.method}")
        if self.compensate and self.method == "full":
            raise ValueError(f"`compensate` must be 0 for full, which misses nothing, got {self.compensate}")
        if self.base_dtype != "float32" and self.method == "full":
            raise ValueError(f"`base_dtype` must be float32 for full, which has no frozen base, got {self.base_dtype}")
        if self.resume and self.out is None:
            raise ValueError("`resume` must come with --out, the folder of the run, got none")
        self._check_processes(ranks)
        self.torch_device()
        if self.residual_device is not None:
            _device("residual_device", self.residual_device)

    def _check_processes(self, ranks: Ranks) -> None:
        if self.batch_size < ranks.size:
            rule = f"be at least the number of processes, {ranks.size}"
            raise ValueError(f"`batch_size` must {rule}, got {self.batch_size}")
        if self.shard and ranks.group is None:
            raise ValueError("`shard` must come with processes to share between, started by torchrun, got this one")
        if self.shard_factors and self.inner_optimizer() == "muon":
            raise ValueError("`optimizer` must be adamw with --shard-factors, got muon, whose messages nobody counts")
        if self.shard_factors and self.compensate:
            raise ValueError(f"`compensate` must be 0 with --shard-factors, got {self.compensate}")
        if self.shard_factors and (not self.shard or self.candidates == "pool" or self.moments == "8bit"):
            got = f"candidates {self.candidates}, moments {self.moments}, {'with' if self.shard else 'without'} it"
            raise ValueError(
                f"`shard_factors` must come with --shard, seeded candidates and float32 moments, got {got}"
            )
        if self.shard and self.method == "full":
            raise ValueError("`shard` must come with frozen bases, got full, which has none")

    def torch_device(self) -> torch.device:
        return _device("device", self.device)

    def compute_torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.compute_dtype]

    def inner_optimizer(self) -> Literal["adamw", "muon"]:
        if self.optimizer is not None:
            return self.optimizer
        is_muons = self.method == "switchlora" and not self.shard_factors and self.moments == "float32"
        return "muon" if is_muons else "adamw"

    def peak_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        return MUON if self.inner_optimizer() == "muon" else LEARNING_RATES[self.method]

    def dense_share(self) -> float:
        """The learning rate of embedding, head and norms over that of factors."""
        if self.dense_lr is not None:
            return self.dense_lr / self.peak_lr()
        return BESIDE_MUON / self.peak_lr() if self.inner_optimizer() == "muon" else 1.0

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then cosine down to a tenth of the peak at the last step."""
        lr = self.peak_lr() * warmup_cosine(step, self.steps, self.warmup)
        if self.method == "relora" and step >= self.merge_every:
            lr *= min(1.0, (step % self.merge_every + 1) / max(1, self.warmup // 10))
        return lr

    def folder(self) -> Path:
        return self.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{self.method}"


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The learning rate over its peak: linear warm-up, then cosine to a tenth at the last step."""
    progress = min(1.0, max(0.0, (step - warmup) / max(1, steps - warmup)))
    return (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2) * min(1.0, (step + 1) / max(1, warmup))


def continued(config: ConfigT) -> ConfigT:
    """The configuration of processes that were started anew: they go on with what those before them have written.

    Raises:
        ValueError: if they cannot know where that is.
    """
    if config.out is None:
        raise ValueError("`out` must be given for a run to go on after a process has failed, got none")
    return dataclasses.replace(config, resume=(config.out / "config.json").is_file())


def _device(name: str, value: str) -> torch.device:
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"`{name}` must be one that this machine has, got {value!r}: {reason}") from error
    return device


def prepare_folder(config: Config, folder: Path, corpus_digest: str) -> None:
    """Makes the folder of a new run, or sees that a resumed one is the same run.

    Raises:
        ValueError: if the folder holds something else, or another configuration; nothing in it is changed.
    """
    record = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE_TO_CHANGE}
    record = json.loads(json.dumps(record | {"corpus": corpus_digest}, default=str))
    path, temporary = folder / "config.json", folder / "config.writing"
    if config.resume:
        if not path.is_file():
            raise ValueError(f"`out` must hold a run to resume, got {str(folder)!r} without config.json")
        _check_same(_read(path), record, folder)
    elif folder.exists() and (not folder.is_dir() or any(path != temporary for path in folder.iterdir())):
        rule = "be new or empty, or come with --resume"
        raise ValueError(f"`out` must {rule}, got {str(folder)!r}, which holds something")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.rename(path)


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"`resume` must find the run's configuration, got {str(path)!r}, which is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"`resume` must find the run's configuration, got {found!r:.80} in {str(path)!r}")
    return found


def _check_same(old: dict[str, object], new: dict[str, object], folder: Path) -> None:
    changes = [
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if changes:
        raise ValueError(f"`resume` must keep the configuration in {str(folder)!r}, got: {'; '.join(changes)}")

"""Measure the loss of a trained model on a text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models import corpus
from models.pretrain.config import Config
from models.pretrain.device import compute_dtype, find_device
from models.trained import Trained, open_trained

_DEFAULTS = Config()  # for a model that is not of a run


@dataclass(frozen=True)
class Options:
    """Measure the loss of a trained model on a text.

    By default the loss is that of evenly spaced windows, as many and as long as in the validation of the run. On the
    run's validation text it is therefore the validation loss of the run.
    """

    run: tyro.conf.Positional[Path]
    """Folder of a run of models.pretrain or models.finetune, a checkpoint in it, or a model folder for transformers.
    A run means its final model, or its newest checkpoint if it has not ended."""
    text: tuple[Path, ...]
    """Files or folders with the text."""
    every_token: bool = False
    """Predict every token of the text once, in windows that do not overlap."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the model. The default is cuda where torch finds it, and cpu otherwise."""
    json: bool = False
    """Print one JSON object."""


def evaluate(options: Options) -> dict[str, Any]:
    """Return the loss in nats per token and bits per byte, the perplexity, and what was measured.

    Raises:
        ValueError: If an option is invalid, or the model or the text cannot be read.
    """
    device = find_device("device", options.device)
    if not options.text:
        raise ValueError("`text` must be given, got none; pass files or folders with --text")
    documents = corpus.text_files(options.text)
    trained = open_trained(options.run, device)
    name = trained.tokenizer
    tokenizer = corpus.byte_tokenizer() if name is None else corpus.pretrained_tokenizer(name)
    tokens = torch.from_numpy(tokenizer.encode(documents).copy())
    if len(tokens) < 2:
        raise ValueError(f"`text` must have at least 2 tokens, got {len(tokens)}; the first is not predicted")
    loss, predicted = mean_loss(trained, _batches(trained, tokens, every_token=options.every_token), device)
    size = sum(len(document.text.encode()) for document in documents)
    return {
        "source": str(trained.source),
        "bytes": size,
        "tokens": len(tokens),
        "predicted": predicted,
        "nats_per_token": loss,
        "bits_per_byte": loss / math.log(2) * len(tokens) / size,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }


def _batches(trained: Trained, tokens: Tensor, *, every_token: bool) -> Iterator[Tensor]:
    """Yield windows, (batch, length): those of the run's validation, or all."""
    config = trained.config or _DEFAULTS
    batch_size, seq_len = config.data.batch_size, min(config.data.seq_len, trained.context)
    if len(tokens) <= seq_len:
        yield tokens[None]
    elif every_token:
        windows = (len(tokens) - 1) // seq_len
        inputs = tokens[: windows * seq_len].reshape(windows, seq_len)
        targets = tokens[seq_len : windows * seq_len + 1 : seq_len]
        yield from torch.cat([inputs, targets[:, None]], dim=1).split(batch_size)
        if (remainder := tokens[windows * seq_len :]).numel() > 1:
            yield remainder[None]
    else:
        yield from corpus.validation_batches(tokens, config.output.eval_batches, batch_size, window=seq_len + 1)


@torch.no_grad()
def mean_loss(trained: Trained, batches: Iterable[Tensor], device: torch.device) -> tuple[float, int]:
    """Return the mean loss in nats per token, and the number of tokens that were predicted.

    The activations have the type of those in the run.
    """
    dtype = compute_dtype(trained.config or _DEFAULTS)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = _losses(trained.model, batch.long().to(device))
        total, count = total + losses.double().sum().cpu(), count + losses.numel()
    return total.item() / count, count


def _losses(model: nn.Module, tokens: Tensor) -> Tensor:
    output = model(tokens[:, :-1])
    logits = getattr(output, "logits", output)
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")


def lines_of(evaluation: dict[str, Any]) -> list[str]:
    """Return an evaluation as lines for a terminal."""
    return [
        f"{evaluation['source']}: {evaluation['bytes']:,} bytes, {evaluation['tokens']:,} tokens, "
        f"{evaluation['predicted']:,} of them predicted",
        f"nats per token  {evaluation['nats_per_token']:.4f}",
        f"bits per byte   {evaluation['bits_per_byte']:.4f}",
        f"perplexity      {evaluation['perplexity']:.3f}",
    ]

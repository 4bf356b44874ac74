"""Measure the loss of a trained model on a text."""

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from models import corpus
from models.codec import codec
from models.corpus.tokens import TokenFile
from models.pretrain.config import Config, computed
from models.pretrain.device import compute_dtype, find_device
from models.pretrain.run import perplexity
from models.trained import Trained, check_tokens, open_trained

_DEFAULTS = Config()  # the options for a model that does not come from a run


@dataclass(frozen=True)
class Options:
    """Measure the loss of a trained model on a text.

    By default the windows are evenly spaced, as many and as long as in the validation of the run. For the validation
    text of the run, the result is then the validation loss of the run.
    """

    run: tyro.conf.Positional[Path]
    """Use the model of this run of models.pretrain or models.finetune, of this checkpoint, or in this model folder.
    A run has its final model, or the model of its newest checkpoint if the run has not ended."""
    text: Annotated[tuple[Path, ...], computed("the validation text of the run")] = ()
    """Measure these files, and the text files in these folders."""
    every_token: bool = False
    """Predict every token of the text once, in windows that do not overlap."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Compute on this device. The default is cuda where torch finds it, and cpu otherwise."""
    json: bool = False
    """Print one JSON object."""


class Text(NamedTuple):
    """The tokens of a text, and its length in bytes."""

    tokens: np.ndarray
    size: int


def evaluate(options: Options) -> dict[str, Any]:
    """Measure the loss in nats per token, and derive bits per byte and perplexity.

    The result also has the source of the model, and the sizes of the text.

    Raises:
        ValueError: If an option is invalid, or the model or the text cannot be read.
        OSError: If a file cannot be read.
    """
    device = find_device("device", options.device)
    documents = corpus.text_files(options.text, lambda line: print(line, file=sys.stderr)) if options.text else None
    trained = open_trained(options.run, device)
    text = _validation_text(trained) if documents is None else _encoded(trained, documents)
    if len(text.tokens) < 2:
        raise ValueError(f"`text` must have at least 2 tokens, got {len(text.tokens)}; the first is not predicted")
    check_tokens(trained, int(text.tokens.max()))
    loss, predicted = mean_loss(trained, _batches(trained, text.tokens, every_token=options.every_token), device)
    return {
        "source": str(trained.source),
        "bytes": text.size,
        "tokens": len(text.tokens),
        "predicted": predicted,
        "nats_per_token": loss,
        "bits_per_byte": loss / math.log(2) * len(text.tokens) / text.size,
        "perplexity": perplexity(loss),
    }


def _encoded(trained: Trained, documents: Sequence[corpus.TextFile]) -> Text:
    name = trained.tokenizer
    tokenizer = corpus.byte_tokenizer() if name is None else corpus.pretrained_tokenizer(name)
    parts = list(tokenizer.stream(documents))
    return Text(np.concatenate([part.tokens for part in parts]), sum(part.text_bytes for part in parts))


def _validation_text(trained: Trained) -> Text:
    """Return the validation text of the run.

    Raises:
        ValueError: If its tokens are not stored.
    """
    file = None if trained.folder is None else trained.folder / "tokens" / "validation.bin"
    if file is None or not file.is_file():
        raise ValueError("`text` must be given for a model without the tokens of a run, got none; pass --text PATH")
    tokenizer = codec(trained.tokenizer)
    tokens = np.asarray(TokenFile(file, np.min_scalar_type(tokenizer.vocabulary - 1)))
    record = corpus.read_record(file.parent)
    size = record["parts"]["validation"]["text_bytes"] if record else len(tokenizer.decode(tokens.tolist()).encode())
    return Text(tokens, max(1, size))


def _batches(trained: Trained, tokens: np.ndarray, *, every_token: bool) -> Iterator[Tensor]:
    """Yield windows of shape (batch, length), as in validation or for every token."""
    config = trained.config or _DEFAULTS
    batch_size, seq_len = config.data.batch_size, min(config.data.seq_len, trained.context)
    if len(tokens) <= seq_len:
        yield _tensor(tokens[None])
    elif every_token:
        windows = (len(tokens) - 1) // seq_len
        for first in range(0, windows, batch_size):
            count = min(batch_size, windows - first)
            part = tokens[first * seq_len : (first + count) * seq_len + 1]
            yield _tensor(sliding_window_view(part, seq_len + 1)[::seq_len])
        if len(remainder := tokens[windows * seq_len :]) > 1:
            yield _tensor(remainder[None])
    else:
        yield from corpus.validation_batches(tokens, config.output.eval_batches, batch_size, window=seq_len + 1)


def _tensor(windows: np.ndarray) -> Tensor:
    return torch.from_numpy(windows.astype(np.int64))


@torch.no_grad()
def mean_loss(trained: Trained, batches: Iterable[Tensor], device: torch.device) -> tuple[float, int]:
    """Return the mean loss in nats per token, and the number of predicted tokens.

    Activations have the same dtype as in the run.
    """
    dtype = compute_dtype(trained.config or _DEFAULTS)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            losses = _losses(trained.model, batch.to(device))
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

"""Streams of tokens, in memory or in files, and batches of windows from them."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.corpus.split import Split
from models.corpus.tokenizer import Encoded, Tokenizer

Part = Literal["train", "validation"]


class TokenFile:
    """Tokens in a file, which `numpy.asarray` maps into memory.

    Each `numpy.asarray` makes a new map, so tokens that were read through earlier maps do not stay in memory. The file
    remains open, so it may be renamed.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self._file, self._dtype = path.open("rb"), dtype
        self._length = path.stat().st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        mapped = np.memmap(self._file, self._dtype, mode="r") if self._length else np.empty(0, self._dtype)
        return mapped if dtype is None or dtype == self._dtype else mapped.astype(dtype)


Tokens = np.ndarray | Tensor | TokenFile


class Counted(NamedTuple):
    """Counts and a hash of a stream of tokens."""

    documents: int
    frequencies: np.ndarray  # of each token
    text_bytes: int
    digest: bytes


class TokenDigest:
    """A hash of tokens that are passed in blocks.

    Tokens are hashed as uint8 for a vocabulary of 256 and as int32 otherwise, in whatever type they are stored. Older
    versions stored them in these types, so the hashes of their runs remain valid.
    """

    def __init__(self, vocabulary: int):
        self._hash, self._type = hashlib.sha256(), np.uint8 if vocabulary == 256 else np.int32

    def update(self, tokens: np.ndarray) -> None:
        """Add tokens."""
        self._hash.update(np.ascontiguousarray(tokens, self._type))

    def digest(self) -> bytes:
        """Return the hash."""
        return self._hash.digest()


class Corpus(NamedTuple):
    """The tokens of training and validation text, with their counts."""

    train: Tokens  # one stream of tokens, of the smallest integer type
    validation: Tokens
    vocabulary: int
    counted: dict[str, Counted]  # keys "train" and "validation"

    def digest(self) -> str:
        """Return a hash of the training and validation tokens."""
        return hashlib.sha256(self.counted["train"].digest + self.counted["validation"].digest).hexdigest()

    def bits_per_byte(self, loss: float, part: Part = "validation") -> float:
        """Convert a loss from nats per token to bits per byte of the text."""
        return loss / math.log(2) * len(getattr(self, part)) / max(1, self.counted[part].text_bytes)


def tokenize(
    documents: Split,
    tokenizer: Tokenizer,
    *,
    window: int,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Corpus:
    """Return the tokens of training and validation text as one stream each.

    Args:
        documents: The texts, which are read in pieces.
        tokenizer: The tokenizer.
        window: The least number of tokens of a stream.
        folder: The folder for the files train.bin and validation.bin. Default None stores the tokens in memory.
        progress: A function that is called with the number of characters that were encoded since its last call.

    Raises:
        ValueError: If a stream is shorter than `window`.
        OSError: If a text cannot be read, or the tokens cannot be written.
    """
    tokens: list[Tokens] = []
    counted = {}
    for name, texts in documents._asdict().items():
        parts = _announced(tokenizer.stream(texts), progress)
        path = None if folder is None else folder / f"{name}.bin"
        stream, counted[name] = _collect(parts, tokenizer, path)
        check_length(name, stream, window)
        tokens.append(stream)
    return Corpus(*tokens, tokenizer.vocabulary, counted)


def check_length(part: str, stream: Tokens, window: int) -> None:
    """Raise ValueError if a stream is shorter than a window."""
    if len(stream) < window:
        raise ValueError(
            f"the text must give at least {window} tokens for {part}, one more than `seq_len`, got {len(stream)}"
        )


def _announced(parts: Iterable[Encoded], progress: Callable[[int], None]) -> Iterable[Encoded]:
    for part in parts:
        yield part
        progress(part.characters)


def _collect(parts: Iterable[Encoded], tokenizer: Tokenizer, path: Path | None) -> tuple[Tokens, Counted]:
    """Write the parts of a stream to a file, or join them in memory."""
    frequencies, digest = np.zeros(tokenizer.vocabulary, np.int64), TokenDigest(tokenizer.vocabulary)
    documents = text_bytes = 0
    joined: list[np.ndarray] = []
    file = None if path is None else path.open("wb")
    try:
        for part in parts:
            frequencies += np.bincount(part.tokens, minlength=tokenizer.vocabulary)
            digest.update(part.tokens)
            documents += part.documents
            text_bytes += part.text_bytes
            if file is None:
                joined.append(part.tokens)
            else:
                file.write(part.tokens.tobytes())
    finally:
        if file is not None:
            file.close()
    counted = Counted(documents, frequencies, text_bytes, digest.digest())
    if path is not None:
        return TokenFile(path, tokenizer.dtype), counted
    return (np.concatenate(joined) if joined else np.empty(0, tokenizer.dtype)), counted


def batch(tokens: Tokens, shape: Sequence[int], *, window: int, seed: int, step: int) -> Tensor:
    """Draw windows at random places, as int64 of shape (*shape, window).

    Equal seeds and steps draw equal places, whatever was drawn before.
    """
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - window + 1, size=tuple(shape))
    return _windows(tokens, starts, window)


def validation_batches(tokens: Tokens, count: int, size: int, *, window: int) -> Tensor:
    """Return evenly spaced windows, as int64 of shape (count, size, window).

    Every call returns the same windows.
    """
    last = len(tokens) - window
    exact = torch.float32 if last < 1 << 24 else torch.float64  # represents every place exactly
    starts = torch.linspace(0, last, count * size, dtype=exact).long().reshape(count, size)
    return _windows(tokens, starts.numpy(), window)


def _windows(tokens: Tokens, starts: np.ndarray, window: int) -> Tensor:
    places = starts[..., None] + np.arange(window)
    return torch.from_numpy(np.asarray(tokens)[places].astype(np.int64))


def unigram_loss(corpus: Corpus) -> float:
    """Return the validation loss of a unigram model, in nats per token.

    Its probabilities are proportional to the counts of tokens in the training text, plus one.
    """
    counts = corpus.counted["train"].frequencies + 1.0
    validation = corpus.counted["validation"].frequencies
    return float(-(validation * np.log(counts / counts.sum())).sum() / validation.sum())

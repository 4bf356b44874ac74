"""Turn files, folders, Python's sources or a Hugging Face dataset into tokens.

Everything is deterministic: the split depends on names, and a batch on the seed and the step.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

VALIDATION_FRACTION = 0.05
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


class Document(NamedTuple):
    name: str
    text: str


class Split(NamedTuple):
    train: list[Document]
    validation: list[Document]


class Corpus(NamedTuple):
    train: Tensor  # one stream of tokens, uint8 or int32
    validation: Tensor
    vocabulary: int

    def digest(self) -> str:
        """Return a hash that is equal for equal tokens and split."""
        hashes = (hashlib.sha256(tokens.numpy().tobytes()).digest() for tokens in (self.train, self.validation))
        return hashlib.sha256(b"".join(hashes)).hexdigest()


class Tokenizer(NamedTuple):
    encode: Callable[[list[Document]], np.ndarray]
    vocabulary: int


def standard_library() -> list[Document]:
    """Return the sources of Python's standard library without its tests.

    Every machine with Python has this text.
    """
    return python_sources(Path(sysconfig.get_paths()["stdlib"]))


def python_sources(root: Path) -> list[Document]:
    """Return the Python files in a folder, without tests and installed packages."""
    paths = (path for path in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    return list(_text_files(root, paths))


def text_files(paths: Sequence[Path]) -> list[Document]:
    """Return the text of files, and of all text files in folders.

    Hidden and binary files in folders are skipped.

    Raises:
        ValueError: If a path does not exist, is a binary file, or if there is no text at all.
    """
    documents: list[Document] = []
    for path in paths:
        if path.is_dir():
            inside = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path)))
            documents += _text_files(path, inside)
        elif not path.exists():
            raise ValueError(f"`text` must name files or folders, got {str(path)!r}, which does not exist")
        else:
            text = _read(path)
            if text is None:
                raise ValueError(f"`text` must be UTF-8 text, got the binary file {str(path)!r}")
            documents.append(Document(path.name, text))
    if not any(document.text.strip() for document in documents):
        raise ValueError(f"`text` must hold some text, got none in {', '.join(map(str, paths))}")
    return documents


def _text_files(root: Path, paths: Iterable[Path]) -> Iterator[Document]:
    for path in sorted(paths):
        if path.is_file() and (text := _read(path)):
            yield Document(path.relative_to(root).as_posix(), text)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path) -> str | None:
    """Return the text of a file, or None if it is binary."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def split(documents: list[Document]) -> Split:
    """Split into training and validation text, by the hashes of file names.

    Files are taken for validation until they make up a twentieth of the text. A single file is cut at the end of a
    line, and its last tenth is for validation.
    """
    if len(documents) == 1:
        name, text = documents[0]
        cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
        return Split([Document(name, text[:cut])], [Document(name, text[cut:])])
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    lengths = [len(document.text) for document in shuffled]
    count = int(np.searchsorted(np.cumsum(lengths), VALIDATION_FRACTION * sum(lengths))) + 1
    count = min(count, len(shuffled) - 1)
    return Split(train=shuffled[count:], validation=shuffled[:count])


def dataset(name: str, *, config: str | None, column: str, characters: int) -> Split:
    """Stream the documents of a Hugging Face dataset, by its name or local folder.

    The split called "validation" is for validation. Without one, the first twentieth of the documents is.

    Args:
        name: The name or folder, as in `datasets.load_dataset`.
        config: The configuration of the dataset. None means its default.
        column: The column that contains the text.
        characters: The largest number of characters to read for training.

    Raises:
        ValueError: If the dataset cannot be loaded, or has no split "train" or no such column.
    """
    try:
        import datasets  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`dataset` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    try:
        streams = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # of many types: not found, no connection, unknown configuration, unreadable files
        raise ValueError(
            f"`dataset` must be one that `datasets` can load, got {name!r}: {_first_line(error)}"
        ) from error
    if "train" not in streams:
        raise ValueError(f"`dataset` must have a split called 'train', got {name!r} with {sorted(streams)}")
    train = _take(streams["train"], column, characters)
    if "validation" in streams:
        return Split(train, _take(streams["validation"], column, int(characters * VALIDATION_FRACTION)))
    count = max(1, int(len(train) * VALIDATION_FRACTION))
    return Split(train[count:], train[:count])


def _take(stream: Iterable[dict[str, str]], column: str, characters: int) -> list[Document]:
    documents: list[Document] = []
    for index, row in enumerate(stream):
        if column not in row:
            raise ValueError(f"`text_column` must be one of {sorted(row)}, got {column!r}")
        documents.append(Document(str(index), row[column]))
        characters -= len(row[column])
        if characters <= 0:
            break
    return documents


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer to UTF-8 bytes.

    A zero byte, which no text contains, separates documents.
    """
    return Tokenizer(
        lambda documents: np.frombuffer("\0".join(document.text for document in documents).encode(), np.uint8), 256
    )


def pretrained_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer of `transformers` by its name, folder or file.

    Its end token, if it has one, ends each document.

    Raises:
        ValueError: As `load_tokenizer`.
    """
    tokenizer = load_tokenizer(name)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(documents: list[Document]) -> np.ndarray:
        encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        return np.concatenate([np.array(tokens + end, np.int32) for tokens in encoded])

    return Tokenizer(encode, len(tokenizer))


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer of `transformers` by its name, folder or file. No code that comes with it is run.

    Raises:
        ValueError: If `transformers` is missing or cannot load the tokenizer.
    """
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`tokenizer` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    try:
        if Path(name).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the library raises many types for an invalid file or an unknown name
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"`tokenizer` must be a tokenizer's name, folder or file, got {name!r}: {reason}") from error


def tokenize(documents: Split, tokenizer: Tokenizer, *, window: int) -> Corpus:
    """Return the tokens of training and validation text as one stream each.

    Raises:
        ValueError: If a stream is shorter than `window`.
    """
    streams = []
    for name, texts in documents._asdict().items():
        tokens = torch.from_numpy(tokenizer.encode(texts).copy()) if texts else torch.empty(0, dtype=torch.int32)
        if len(tokens) < window:
            raise ValueError(
                f"the text must give at least {window} tokens for {name}, one more than `seq_len`, got {len(tokens)}"
            )
        streams.append(tokens)
    return Corpus(*streams, tokenizer.vocabulary)


def batch(tokens: Tensor, shape: Sequence[int], *, window: int, seed: int, step: int) -> Tensor:
    """Draw windows at random places, (*shape, window), int64.

    The result depends only on the seed and the step.
    """
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - window + 1, size=tuple(shape))
    return tokens[torch.from_numpy(starts)[..., None] + torch.arange(window)].long()


def validation_batches(tokens: Tensor, count: int, size: int, *, window: int) -> Tensor:
    """Return evenly spaced windows, (count, size, window), int64.

    They are the same at each call.
    """
    starts = torch.linspace(0, len(tokens) - window, count * size).long().reshape(count, size)
    return tokens[starts[..., None] + torch.arange(window)].long()


def unigram_loss(corpus: Corpus) -> float:
    """Return the validation loss of a unigram model, in nats per token.

    Its frequencies are the counts of tokens in the training text, plus one.
    """
    counts = torch.bincount(corpus.train.int(), minlength=corpus.vocabulary).double() + 1
    log_frequency = (counts / counts.sum()).log()
    return -log_frequency[corpus.validation.int()].mean().item()

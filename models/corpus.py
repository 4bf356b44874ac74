"""Text to tokens: files, folders, the standard library's sources or a Hugging Face dataset.

Tokens are bytes unless a tokenizer is named. Everything is deterministic: the split depends on names, a batch on the
seed and the number of the step.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

VALIDATION_SHARE = 0.05
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
        """Tells corpora apart: equal for equal tokens and split."""
        parts = (part.numpy().tobytes() for part in (self.train, self.validation))
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


class Tokenizer(NamedTuple):
    encode: Callable[[list[Document]], np.ndarray]
    vocabulary: int


def standard_library() -> list[Document]:
    """The sources of Python's standard library, without its tests: text that every machine with Python has."""
    return python_sources(Path(sysconfig.get_paths()["stdlib"]))


def python_sources(root: Path) -> list[Document]:
    """Python's files in a folder, without tests and packages that are installed in it."""
    paths = (path for path in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    return list(_text_files(root, paths))


def text_files(paths: Sequence[Path]) -> list[Document]:
    """The text of files, and of all text files in folders; hidden and binary files in folders are passed over.

    Raises:
        ValueError: if a path does not exist, a file that is named itself is binary, or there is no text at all.
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
    """The text of a file, or None if it is binary."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def split(documents: list[Document]) -> Split:
    """By file: those whose hashed names come first are for validation, until they make up a twentieth of the text.

    A single file is cut at the end of a line instead, its last tenth for validation.
    """
    if len(documents) == 1:
        name, text = documents[0]
        cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
        return Split([Document(name, text[:cut])], [Document(name, text[cut:])])
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())
    wanted = VALIDATION_SHARE * sum(len(document.text) for document in ranked)
    taken = int(np.searchsorted(np.cumsum([len(document.text) for document in ranked]), wanted)) + 1
    taken = min(taken, len(ranked) - 1)
    return Split(train=ranked[taken:], validation=ranked[:taken])


def dataset(name: str, *, config: str | None, column: str, characters: int) -> Split:
    """Documents of a Hugging Face dataset, or of a local folder in one of its formats, streamed.

    The split called "validation" is for validation, if there is one; otherwise the first twentieth of the documents.

    Args:
        name: as `datasets.load_dataset` takes it.
        config: its configuration, if it has several.
        column: that holds the text.
        characters: to read at most for training.
    """
    try:
        import datasets  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`dataset` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    try:
        streams = datasets.load_dataset(name, config, streaming=True)
    except Exception as error:  # of many types: not found, no connection, no such configuration, unreadable files
        raise ValueError(
            f"`dataset` must be one that `datasets` can load, got {name!r}: {_first_line(error)}"
        ) from error
    if "train" not in streams:
        raise ValueError(f"`dataset` must have a split called 'train', got {name!r} with {sorted(streams)}")
    train = _take(streams["train"], column, characters)
    if "validation" in streams:
        return Split(train, _take(streams["validation"], column, int(characters * VALIDATION_SHARE)))
    taken = max(1, int(len(train) * VALIDATION_SHARE))
    return Split(train[taken:], train[:taken])


def _take(stream: Iterable[dict[str, str]], column: str, characters: int) -> list[Document]:
    documents: list[Document] = []
    for number, row in enumerate(stream):
        if column not in row:
            raise ValueError(f"`text_column` must be one of {sorted(row)}, got {column!r}")
        documents.append(Document(str(number), row[column]))
        characters -= len(row[column])
        if characters <= 0:
            break
    return documents


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes, documents parted by a zero byte, which no text holds."""
    return Tokenizer(
        lambda documents: np.frombuffer("\0".join(document.text for document in documents).encode(), np.uint8), 256
    )


def pretrained_tokenizer(name: str) -> Tokenizer:
    """A tokenizer of `transformers` by its name or folder, or a `tokenizers` file; documents end with its end token."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`tokenizer` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    try:
        is_file = Path(name).is_file()
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=name) if is_file else AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the library raises for a file that is not one, or a name that is not there
        rule = "be a tokenizer's name, folder or file"
        raise ValueError(f"`tokenizer` must {rule}, got {name!r}: {_first_line(error)}") from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(documents: list[Document]) -> np.ndarray:
        encoded = tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
        return np.concatenate([np.array(tokens + end, np.int32) for tokens in encoded])

    return Tokenizer(encode, len(tokenizer))


def tokenize(documents: Split, tokenizer: Tokenizer, *, window: int) -> Corpus:
    """The two streams of tokens.

    Raises:
        ValueError: if one of them is shorter than a window.
    """
    streams = []
    for name, part in documents._asdict().items():
        tokens = torch.from_numpy(tokenizer.encode(part).copy()) if part else torch.empty(0, dtype=torch.int32)
        if len(tokens) < window:
            rule = f"give at least {window} tokens for {name}, one more than `seq_len`"
            raise ValueError(f"the text must {rule}, got {len(tokens)}")
        streams.append(tokens)
    return Corpus(*streams, tokenizer.vocabulary)


def batch(tokens: Tensor, shape: Sequence[int], *, window: int, seed: int, step: int) -> Tensor:
    """Windows at random places, (*shape, window), int64: a pure function of the seed and the step."""
    starts = np.random.default_rng((seed, step)).integers(len(tokens) - window + 1, size=tuple(shape))
    return tokens[torch.from_numpy(starts)[..., None] + torch.arange(window)].long()


def validation_batches(tokens: Tensor, count: int, size: int, *, window: int) -> Tensor:
    """The same windows every time, spread evenly: (count, size, window), int64."""
    starts = torch.linspace(0, len(tokens) - window, count * size).long().reshape(count, size)
    return tokens[starts[..., None] + torch.arange(window)].long()


def unigram_loss(corpus: Corpus) -> float:
    """Nats a token of a model that knows only how often each token occurs in the training text (plus one)."""
    counts = torch.bincount(corpus.train.int(), minlength=corpus.vocabulary).double() + 1
    log_share = (counts / counts.sum()).log()
    return -log_share[corpus.validation.int()].mean().item()

"""Turn texts into tokens: their bytes, or the tokens of a Hugging Face tokenizer."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.corpus.documents import AnyDocument

_BATCH = 1 << 20  # characters after which a batch of pieces is encoded


class Piece(NamedTuple):
    """A piece of a document."""

    text: str
    starts: bool  # whether it starts a document other than the first
    ends: bool  # whether it ends a document


class Encoded(NamedTuple):
    """A part of a stream of tokens."""

    tokens: np.ndarray  # of the smallest integer type
    documents: int  # number of documents that end in this part
    characters: int
    text_bytes: int


class Tokenizer(NamedTuple):
    """A tokenizer, and the tokens that it puts around documents."""

    encode_texts: Callable[[list[str]], Sequence[Any]]  # returns an array or a list of tokens for each text
    vocabulary: int
    between: tuple[int, ...] = ()  # tokens between two documents
    after: tuple[int, ...] = ()  # tokens after each document
    identity: str | None = None  # equal identities mean equal tokens; None means that this is unknown

    def encode(self, documents: Iterable[AnyDocument]) -> np.ndarray:
        """Return the tokens of documents as one stream."""
        parts = [part.tokens for part in self.stream(documents)]
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def stream(self, documents: Iterable[AnyDocument]) -> Iterator[Encoded]:
        """Yield the tokens of documents in parts of about a megabyte of text.

        Long documents are cut at the ends of lines before they are encoded. So no token spans such a cut, even if the
        tokenizer has a token for the end of a line together with the following text.

        Raises:
            ValueError: If a token is not below `vocabulary`.
        """
        between, after = np.array(self.between, self.dtype), np.array(self.after, self.dtype)
        for batch in _batches(_pieces(documents)):
            texts = [piece.text for piece in batch]
            parts = []
            for piece, tokens in zip(batch, self.encode_texts(texts), strict=True):
                array = tokens if isinstance(tokens, np.ndarray) else np.array(tokens, np.int64)
                parts += [between] * piece.starts + [array] + [after] * piece.ends
            joined = np.concatenate(parts)
            if len(joined) and joined.max() >= self.vocabulary:
                raise ValueError(
                    f"`tokenizer` must give tokens below its length, {self.vocabulary}, got the token {joined.max()}"
                )
            text_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
            documents = sum(piece.ends for piece in batch)
            yield Encoded(joined.astype(self.dtype, copy=False), documents, sum(map(len, texts)), text_bytes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest integer type for the tokens."""
        return np.min_scalar_type(self.vocabulary - 1)


def _pieces(documents: Iterable[AnyDocument]) -> Iterator[Piece]:
    is_first = True
    for document in documents:
        starts, before = not is_first, None
        for text in document.pieces():
            if before is not None:
                yield Piece(before, starts, ends=False)
                starts = False
            before = text
        yield Piece(before or "", starts, ends=True)
        is_first = False


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + 1
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose tokens are the UTF-8 bytes of the text.

    A zero byte separates documents. Text files do not contain zero bytes.
    """

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    return Tokenizer(encode, 256, between=(0,), identity="bytes")


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer of `transformers` from its name, folder or file.

    Code that comes with the tokenizer is not run.

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


def pretrained_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer of `transformers` as a `Tokenizer`.

    If the tokenizer has an end token, this token ends each document.

    Args:
        name: The name, folder or file of the tokenizer.

    Raises:
        ValueError: As `load_tokenizer`.
    """
    tokenizer = load_tokenizer(name)
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def encode(texts: list[str]) -> Sequence[Any]:
        # With `verbose`, the tokenizer would warn of texts that are longer than the context of the model.
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        encoded: Sequence[Any] = tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
        return encoded

    return Tokenizer(encode, len(tokenizer), after=end, identity=_identity(tokenizer))


def _identity(tokenizer: Any) -> str | None:
    """Return a hash of a tokenizer and of the version of the library `tokenizers`.

    None means that the tokenizer is Python code, which has no such hash.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    import tokenizers  # noqa: PLC0415, an optional extra

    parts = [type(tokenizer).__qualname__, tokenizers.__version__, len(tokenizer), tokenizer.eos_token_id]
    return hashlib.sha256(f"{parts}{backend.to_str()}".encode()).hexdigest()

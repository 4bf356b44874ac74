"""Record which texts and tokenizer stored tokens come from.

A resumed run with the same texts and tokenizer then uses these tokens instead of encoding them a second time.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.corpus.documents import AnyDocument
from models.corpus.split import Split
from models.corpus.tokenizer import Tokenizer
from models.corpus.tokens import Corpus, Counted, TokenDigest, TokenFile, check_length

RECORD = "encoding.json"
_BLOCK = 1 << 22  # tokens


def write_record(corpus: Corpus, documents: Split, tokenizer: Tokenizer, folder: Path) -> None:
    """Write hashes of the texts and of the tokenizer to a file beside the tokens.

    Nothing is written for a tokenizer without an identity.
    """
    if tokenizer.identity is None:
        return
    parts = {
        part: {"documents": counted.documents, "text_bytes": counted.text_bytes, "digest": counted.digest.hex()}
        for part, counted in corpus.counted.items()
    }
    record = {"sources": _sources(documents), "tokenizer": tokenizer.identity, "parts": parts}
    (folder / RECORD).write_text(json.dumps(record | {"sum": _sum(record)}, indent=1) + "\n")


def stored_corpus(documents: Split, tokenizer: Tokenizer, *, window: int, folder: Path) -> Corpus | None:
    """Return the tokens in a folder, or None if they must be encoded.

    They are returned only if they were encoded from these texts with this tokenizer, and are unchanged since then.

    Raises:
        ValueError: If a stream is shorter than `window`.
        OSError: If a text or the tokens cannot be read.
    """
    record = read_record(folder)
    if tokenizer.identity is None or record is None or record.get("tokenizer") != tokenizer.identity:
        return None
    if record.get("sources") != _sources(documents):
        return None
    counted, streams = {}, {}
    for part in Split._fields:
        path, entry = folder / f"{part}.bin", record["parts"][part]
        if not path.is_file():
            return None
        streams[part] = TokenFile(path, tokenizer.dtype)
        frequencies, digest = _read(streams[part], tokenizer)
        if frequencies is None or digest.hex() != entry["digest"]:
            return None
        counted[part] = Counted(entry["documents"], frequencies, entry["text_bytes"], digest)
    for part, stream in streams.items():
        check_length(part, stream, window)
    return Corpus(**streams, vocabulary=tokenizer.vocabulary, counted=counted)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the tokens in a folder, or None.

    None means that the record is missing or damaged.
    """
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.pop("sum", None) != _sum(record):
        return None
    return record


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sources(documents: Split) -> dict[str, str]:
    return {part: _digest(texts) for part, texts in documents._asdict().items()}


def _digest(documents: Sequence[AnyDocument]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.part_digest)
    return digest.hexdigest()


def _read(stream: TokenFile, tokenizer: Tokenizer) -> tuple[np.ndarray | None, bytes]:
    """Return how often each token occurs, and the digest of all tokens.

    The frequencies are None if a token is beyond the vocabulary.
    """
    frequencies, digest = np.zeros(tokenizer.vocabulary, np.int64), TokenDigest(tokenizer.vocabulary)
    for start in range(0, len(stream), _BLOCK):
        tokens = np.asarray(stream)[start : start + _BLOCK]
        if tokens.max() >= tokenizer.vocabulary:
            return None, b""
        frequencies += np.bincount(tokens, minlength=tokenizer.vocabulary)
        digest.update(tokens)
    return frequencies, digest.digest()

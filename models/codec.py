"""Convert between text and tokens, and write a tokenizer for `transformers`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from models.corpus import load_tokenizer

_SEPARATOR = 0  # the byte between documents


class Codec(NamedTuple):
    """A tokenizer in both directions."""

    encode: Callable[[str], list[int]]  # adds no tokens that begin or end a document
    decode: Callable[[Sequence[int]], str]  # skips such tokens; bytes that are not UTF-8 become U+FFFD
    vocabulary: int  # the number of tokens
    end: int | None  # the token that ends a document
    save: Callable[[Path], None]  # writes the files for `AutoTokenizer.from_pretrained` into a folder


def codec(name: str | None) -> Codec:
    """Return the codec of a tokenizer of `transformers`, or for None the byte codec.

    Raises:
        ValueError: If `transformers` is missing or cannot load the tokenizer.
    """
    return byte_codec() if name is None else pretrained_codec(name)


def byte_codec() -> Codec:
    """Return the codec whose tokens are the bytes of the text in UTF-8."""
    return Codec(
        # On a command line, Python passes bytes that are not UTF-8 as surrogates.
        encode=lambda text: list(text.encode("utf-8", "surrogateescape")),
        decode=lambda tokens: bytes(token for token in tokens if token != _SEPARATOR).decode("utf-8", "replace"),
        vocabulary=256,
        end=_SEPARATOR,
        save=save_byte_tokenizer,
    )


def pretrained_codec(name: str) -> Codec:
    """Return the codec of a tokenizer of `transformers` by its name, folder or file.

    Raises:
        ValueError: If `transformers` is missing or cannot load the tokenizer.
    """
    tokenizer = load_tokenizer(name)

    def encode(text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text must be UTF-8 for the tokenizer {name!r}, got {text!r:.80}") from error
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return tokens

    return Codec(
        encode=encode,
        decode=lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True),
        vocabulary=len(tokenizer),
        end=tokenizer.eos_token_id,
        save=tokenizer.save_pretrained,
    )


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each byte, numbered by the byte.

    The byte 0 is the token that ends a document.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", _byte_level_tokenizer()), ("tokenizer_config.json", _TOKENIZER_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def byte_characters() -> list[str]:
    """Return the character for each byte in byte-level tokenizers, as in GPT-2.

    A printable byte of Latin-1 has the character of its code point. The other bytes have those from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


def _byte_level_tokenizer() -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # The token of the separator is the zero byte. Texts do not contain it, so no text is encoded as this token.
    vocabulary = {"\0": _SEPARATOR} | {character: byte for byte, character in enumerate(byte_characters()) if byte}
    separator = {"id": _SEPARATOR, "content": "\0", "special": True, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [separator | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


_TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "\0",
    "clean_up_tokenization_spaces": False,
}

"""Documents: texts with names, in memory or in files, that are read in pieces."""

import codecs
import hashlib
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

_PIECE = 1 << 18  # most characters or bytes of a piece; shorter texts are not cut
_BLOCK = 1 << 20  # bytes that are read from a file at once


class Document(NamedTuple):
    """A text in memory."""

    name: str
    text: str

    @property
    def characters(self) -> int:
        """The length of the text."""
        return len(self.text)

    @property
    def digest(self) -> bytes:
        """A hash of the text."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def part_digest(self) -> bytes:
        """A hash of this text, which may be a part of a document."""
        return self.digest

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces that end with a line where possible."""
        start = 0
        while len(self.text) - start > _PIECE:
            length = line_end(self.text[start : start + _PIECE])
            yield self.text[start : start + length]
            start += length
        yield self.text[start:]

    def cut(self, at: int) -> tuple["Document", "Document"]:
        """Return two parts, cut at the last end of a line before character `at`.

        If the second part would more than double thereby, the text is cut exactly at this character.
        """
        cut = self.text.rfind("\n", max(0, 2 * at - len(self.text)), at) + 1 or at
        return Document(self.name, self.text[:cut]), Document(self.name, self.text[cut:])


class TextFile(NamedTuple):
    """A text in a file, which is in memory only while it is read."""

    name: str
    path: Path
    start: int  # in bytes
    stop: int
    characters: int
    digest: bytes  # a hash of the whole file without a byte-order mark

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.pieces())

    @property
    def part_digest(self) -> bytes:
        """A hash of the file, and of where this text starts and stops in it."""
        return hashlib.sha256(self.digest + f"{self.start}:{self.stop}".encode()).digest()

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces that end with a line where possible.

        Raises:
            ValueError: If the file has changed since it was found.
        """
        decoder, rest, left = codecs.getincrementaldecoder("utf-8")(), "", self.stop - self.start
        with self.path.open("rb") as file:
            file.seek(self.start)
            while left:
                block = file.read(min(_PIECE, left))
                left -= len(block)
                try:
                    text = rest + decoder.decode(block, final=not left)
                except UnicodeDecodeError:
                    block = b""
                if not block:
                    raise ValueError(f"the text must not change while it is read, got another in {str(self.path)!r}")
                length = line_end(text) if left else len(text)
                yield text[:length]
                rest = text[length:]

    def cut(self, at: int) -> tuple["TextFile", "TextFile"]:
        """Return two parts, cut at the last end of a line before character `at`.

        If the second part would more than double thereby, the text is cut exactly at this character.
        """
        byte = self._offset(at)
        with self.path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            byte = content.rfind(b"\n", max(self.start, 2 * byte - self.stop), byte) + 1 or byte
        first = self._replace(stop=byte)
        characters = sum(int(starts.sum()) for starts in first._starts())
        second = self._replace(start=byte, characters=self.characters - characters)
        return first._replace(characters=characters), second

    def _offset(self, at: int) -> int:
        """Return the offset in the file, in bytes, of character `at` of this text."""
        place = self.start
        for starts in self._starts():
            count = int(starts.sum())
            if at < count:
                return place + int(np.flatnonzero(starts)[at])
            at -= count
            place += len(starts)
        return self.stop

    def _starts(self) -> Iterator[np.ndarray]:
        """Yield, for each block of the text, whether each byte starts a character."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for place in range(self.start, self.stop, _BLOCK):
                yield np.frombuffer(file.read(min(_BLOCK, self.stop - place)), np.uint8) & 0xC0 != 0x80


AnyDocument = Document | TextFile


def line_end(text: str) -> int:
    """Return the length of a text up to its last end of a line.

    A text without an end of a line is cut after its last blank, and without a blank not at all.
    """
    return text.rfind("\n") + 1 or text.rfind(" ") + 1 or len(text)


def scan(path: Path, name: str) -> TextFile | str:
    """Return a file as UTF-8 text, or the reason why it is not UTF-8 text.

    The reason is "binary", "UTF-16" or "not UTF-8". A byte-order mark is not a part of the text.
    """
    decoder, digest, characters, start, stop = codecs.getincrementaldecoder("utf-8")(), hashlib.sha256(), 0, 0, 0
    with path.open("rb") as file:
        if (head := file.read(3)) == codecs.BOM_UTF8:
            start = stop = 3
        elif head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "UTF-16"
        file.seek(start)
        is_utf8 = True
        while block := file.read(_BLOCK):
            if b"\0" in block:
                return "binary"
            try:
                characters += len(decoder.decode(block)) if is_utf8 else 0
            except UnicodeDecodeError:
                is_utf8 = False
            digest.update(block)
            stop += len(block)
        try:
            decoder.decode(b"", final=is_utf8)
        except UnicodeDecodeError:
            is_utf8 = False
    return TextFile(name, path, start, stop, characters, digest.digest()) if is_utf8 else "not UTF-8"

"""Damage to files, drawn from a seed."""

import json
import os
import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def damage_by_truncation(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_by_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Damage:
    """Spoils a file in a way drawn from a seed.

    It changes its bytes, its JSON or its safetensors header.
    """

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.story = ""

    def spoil(self, path: Path) -> None:
        content = path.read_bytes()
        ways = [self._cut, self._flip, self._insert, self._remove, self._blank, self._replace, self._pickle]
        if path.suffix in (".json", ".jsonl"):
            ways += [self._json] * 7
        if path.suffix == ".safetensors":
            ways += [self._header] * 7
        way = self.random.choice(ways)
        self.story = f"{way.__name__.strip('_')} of {path.name}"
        path.write_bytes(way(content))

    def _at(self, content: bytes) -> int:
        """Draw a position, mostly where names and sizes are."""
        return self.random.randrange(max(1, min(len(content), self.random.choice([9, 200, len(content)]))))

    def _cut(self, content: bytes) -> bytes:
        return content[: self._at(content)]

    def _flip(self, content: bytes) -> bytes:
        changed = bytearray(content or b" ")
        for _ in range(self.random.choice([1, 1, 8])):
            changed[self._at(bytes(changed))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def _insert(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + self.random.randbytes(self.random.choice([1, 8, 64])) + content[at:]

    def _remove(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + content[at + self.random.choice([1, 8, 64]) :]

    def _blank(self, content: bytes) -> bytes:
        at = self._at(content)
        return content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]

    def _replace(self, content: bytes) -> bytes:
        return self.random.randbytes(self.random.choice([0, 1, 8, len(content)]))

    def _pickle(self, content: bytes) -> bytes:
        return pickle.dumps(Payload()) + content

    def _json(self, content: bytes) -> bytes:
        lines = content.decode().splitlines() if content.count(b"\n{") else [content.decode()]
        at = self.random.randrange(len(lines))
        lines[at] = json.dumps(self._changed(json.loads(lines[at])))
        return ("\n".join(lines) + "\n").encode()

    def _header(self, content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(self._changed(json.loads(content[8 : 8 + size]))).encode()
        return len(header).to_bytes(8, "little") + header + content[8 + size :]

    def _changed(self, tree: Any) -> Any:
        """Change a value, or add, remove or rename a key."""
        if isinstance(tree, dict | list) and tree and self.random.random() < 0.85:
            key = self.random.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
            if isinstance(tree, dict) and self.random.random() < 0.2:
                value = tree.pop(key)
                if self.random.random() < 0.5:
                    tree[key + "?"] = value
                return tree
            tree[key] = self._changed(tree[key])
            return tree
        numbers = [None, True, 0, -1, 7, 2**63, 2**70, 0.5, float("nan")]
        return self.random.choice([*numbers, "", "F32", "I8", "../x", "*(", [], [1], [-1, 2], {}, {"a": 1}, [[0, 1]]])


class Payload:
    """Creates a folder when its pickle is loaded."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("/nonexistent/executed",))


class Watched:
    """Records what no reader may do: load pickles, or start anything."""

    EVENTS = ("pickle.find_class", "os.system", "subprocess.Popen", "os.mkdir")

    def __init__(self) -> None:
        self.is_on, self.events = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: Any) -> None:
        if self.is_on and event in self.EVENTS:
            self.events.append((event, args))


WATCHED = Watched()


@contextmanager
def nothing_run() -> Iterator[None]:
    WATCHED.is_on, WATCHED.events = True, []
    try:
        yield
    finally:
        WATCHED.is_on = False
    assert not WATCHED.events, WATCHED.events

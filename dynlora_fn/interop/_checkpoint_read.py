"""Read the tensors of a checkpoint into existing memory.

Any number of processes may have written the checkpoint.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynlora_fn._core._dtypes import byte_view
from dynlora_fn.interop._checkpoint_state import DTYPES, Contents, Piece, describe_tensor, describe_value
from dynlora_fn.interop._safetensors import safetensors

OFFSETS = "DCP_SHARDING_INFO"  # the name in `torch.distributed.checkpoint`, whose reader opens these files too
DESCRIPTION = "dynlora_fn"


class Chunk(NamedTuple):
    """A box of a tensor that one file contains."""

    file: Path
    start: int  # of its bytes in the file
    offsets: tuple[int, ...]  # of the box in the unsharded tensor
    shape: tuple[int, ...]  # of the box
    dtype: torch.dtype


class Stored(NamedTuple):
    """The headers of all files of a checkpoint."""

    chunks: dict[str, list[Chunk]]
    description: dict[str, Any]  # step, settings, values and constants; empty in older checkpoints

    def shape(self, path: str) -> tuple[int, ...]:
        """Return the shape of the unsharded tensor of a path."""
        return _full_shape(self.chunks[path])

    def described(self) -> dict[str, str]:
        """Return a text for each leaf, as `Contents.described` does."""
        tensors = {path: describe_tensor(self.shape(path), chunks[0].dtype) for path, chunks in self.chunks.items()}
        values = {path: describe_value(value) for path, value in self.description.get("values", {}).items()}
        constants: dict[str, str] = self.description.get("constants", {})
        return tensors | values | constants


def read_headers(folder: Path) -> Stored:
    """Read the headers of the files of a checkpoint.

    Raises:
        ValueError: If a file is damaged, or the files do not belong together. The message names the file.
    """
    chunks: dict[str, list[Chunk]] = {}
    descriptions: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            header, metadata, start = _read_header(file)
            places = json.loads(metadata.get(OFFSETS, "{}"))
            for path, entry in header.items():
                chunks.setdefault(path, []).append(_chunk(file, path, entry, places, start))
            descriptions[file.name] = metadata.get(DESCRIPTION, "{}")
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file.name} has no header of a checkpoint ({error!r})") from error
    if not descriptions:
        raise ValueError("it has no safetensors file")
    if len(set(descriptions.values())) > 1:
        raise ValueError(f"its files are of different checkpoints: {sorted(descriptions)[:4]}")
    for path, boxes in chunks.items():
        if prod(_full_shape(boxes)) != sum(prod(chunk.shape) for chunk in boxes):
            raise ValueError(f"{path} lacks entries of its shape {_full_shape(boxes)}; a file is missing")
    return Stored(chunks, _parse_description(*next(iter(descriptions.items()))))


def _read_header(file: Path) -> tuple[dict[str, Any], Mapping[str, str], int]:
    """Return the entries of a header, its metadata, and where the data starts.

    `safetensors` checks that the entries fill the file.
    """
    package = safetensors()
    try:
        with package.safe_open(file, framework="pt", backend="pread") as handle:
            metadata = handle.metadata() or {}
    except package.SafetensorError as error:
        raise ValueError(f"{file.name} is not a complete safetensors file ({error})") from error
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return header, metadata, 8 + size


def _chunk(file: Path, path: str, entry: Any, places: Mapping[str, Any], start: int) -> Chunk:
    shape = tuple(entry["shape"])
    offsets = tuple(places[path]["saved_offsets"]) if path in places else (0,) * len(shape)
    if len(offsets) != len(shape) or not all(isinstance(offset, int) and offset >= 0 for offset in offsets):
        raise ValueError(f"{file.name} has the offsets {offsets} for {path} of shape {shape}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{file.name} has the dtype {entry['dtype']!r} for {path}, which no checkpoint contains")
    return Chunk(file, start + entry["data_offsets"][0], offsets, shape, DTYPES[entry["dtype"]])


def _parse_description(file: str, text: str) -> dict[str, Any]:
    description = json.loads(text)
    kinds = {"step": int, "settings": dict, "values": dict, "constants": dict}
    if description and {name: type(value) for name, value in description.items()} != kinds:
        raise ValueError(f"{file} has {text[:60]!r} as the description of a checkpoint")
    return dict(description)


def find_mismatch(stored: Stored, contents: Contents) -> str | None:
    """Describe the first leaf in which a state and a checkpoint differ.

    The leaf is only in one of them, or has another kind, shape or dtype. A number, flag or text may be None in the
    other. Return None if they match.
    """
    found, wanted = stored.described(), contents.described()
    for path, text in wanted.items():
        if path not in found:
            if text == "None" and not stored.description:
                continue
            return f"it contains other tensors: {path or 'its root'}, {text}, is missing"
        kinds = {found[path], text}
        if len(kinds) > 1 and not ("None" in kinds and kinds <= {"None", "a flag", "a text", "a number"}):
            return f"{path or 'its root'} is {found[path]} instead of {text}"
    extra = next((path for path in found if path not in wanted), None)
    return None if extra is None else f"it contains other tensors: {extra or 'its root'}, {found[extra]}, has no place"


def read_into(piece: Piece, chunks: list[Chunk]) -> None:
    """Read the entries of a piece from all chunks that have some of them.

    A contiguous tensor on the CPU is filled without a copy.

    Raises:
        ValueError: If a file ends too early, because it was cut after its verification.
    """
    target = piece.tensor
    is_direct = target.is_contiguous() and target.device.type == "cpu"
    buffer = target if is_direct else torch.empty(target.shape, dtype=target.dtype, device="cpu")
    content: Any = byte_view(buffer).numpy()
    for chunk in chunks:
        with chunk.file.open("rb") as file:
            for source, place, length in _runs(piece, chunk):
                size = chunk.dtype.itemsize
                file.seek(chunk.start + source * size)
                if file.readinto(content[place * size : (place + length) * size]) != length * size:
                    raise ValueError(f"{str(chunk.file)!r} has become shorter while it was read; load again")
    if not is_direct:
        target.copy_(buffer)


def _runs(piece: Piece, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
    """Yield the runs of entries that are contiguous in a chunk and in a piece.

    A run is its place in the chunk, its place in the piece, and its length.
    """
    shape = tuple(piece.tensor.shape)
    pairs = list(zip(chunk.offsets, chunk.shape, piece.offsets, shape, strict=True))
    starts = [max(first, other) for first, _, other, _ in pairs]
    ends = [min(first + count, other + extent) for first, count, other, extent in pairs]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    if any(count <= 0 for count in counts):
        return
    # Along later axes, chunk and piece have the same entries, so a run of them is contiguous in both.
    axis = max((at for at, count in enumerate(counts) if not count == chunk.shape[at] == shape[at]), default=0)
    length = prod(counts[axis:])
    for index in product(
        *(range(start, start + count) for start, count in zip(starts[:axis], counts[:axis], strict=True))
    ):
        corner = (*index, *starts[axis:])
        yield _place(corner, chunk.offsets, chunk.shape), _place(corner, piece.offsets, shape), length


def _place(corner: tuple[int, ...], offsets: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return the place of a corner in the row-major entries of a box.

    `corner` and `offsets`, where the box starts, are in the unsharded tensor.
    """
    place = 0
    for at, offset, count in zip(corner, offsets, shape, strict=True):
        place = place * count + at - offset
    return place


def _full_shape(chunks: list[Chunk]) -> tuple[int, ...]:
    ends = [[offset + count for offset, count in zip(chunk.offsets, chunk.shape, strict=True)] for chunk in chunks]
    return tuple(map(max, zip(*ends, strict=True)))

"""Write safetensors files, with one tensor in memory at a time.

The package `safetensors` needs all tensors in memory. Here it makes only the header, and the data follows tensor by
tensor. The file has the bytes that ``safetensors.torch.save_file`` would write.
"""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dynlora_fn._core._check import check_by_name, check_path, described
from dynlora_fn._core._dtypes import byte_view
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._torch import is_of_transform, is_traceable_wrapper_subclass
from dynlora_fn.interop._arguments import check_tensors
from dynlora_fn.interop._lazy import LazyTensor, bytes_of, lazy
from dynlora_fn.interop._safetensors import safetensors

_METADATA = "__metadata__"
_CHUNK = 1 << 17  # bytes that are read back at once; larger buffers are allocated each time, which is slower


def save_weights(
    weights: Mapping[str, Tensor],
    file: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write one safetensors file that `open_weights` reads.

    The file appears complete, by renaming. After an error nothing is left behind, and an existing file is unchanged.
    Tensors that are not contiguous, or on another device, are copied one at a time. Tied tensors are written under each
    of their names.

    Args:
        weights: The tensors by name.
        file: The file to write. Its folder is created if it does not exist.
        metadata: Texts by name, which are written into the header of the file. Default None writes none.
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

    Raises:
        TypeError: If a weight is not a tensor, or another argument has a wrong type.
        ValueError: If a weight is sparse, on the meta device, or a tensor subclass such as torchao's. Also if `file`
            exists and is not a regular file.
        OSError: If the file cannot be written.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import torch
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> file = f"{tempfile.mkdtemp()}/weights.safetensors"
        >>> save_weights({"w": torch.ones(2)}, file)
        >>> dict(dl.interop.open_weights(file))
        {'w': tensor([1., 1.])}
    """
    check_tensors("weights", weights)
    check_path("file", file)
    _check_metadata(metadata)
    check_progress(progress)
    tensors = dict(weights)
    check_tensors("weights", tensors)  # also those of a mapping that reads them
    write({name: lazy(weight) for name, weight in tensors.items()}, file, metadata=metadata, progress=progress)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    check_by_name("metadata", metadata, of="texts")
    for key, text in metadata.items():
        if not isinstance(text, str):
            raise TypeError(f"`metadata` has {described(text)} for {key!r}; use a text")


def write(
    weights: Mapping[str, LazyTensor],
    file: Path | str,
    *,
    metadata: Mapping[str, str] | None = None,
    read_back: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write tensors that are computed one at a time.

    The tensors are in the order in which `safetensors` sorts them. With `read_back`, everything is read back and
    compared before the file appears.

    Raises:
        OSError: If the file, read back, has other bytes than were written.
    """
    header, names = _header(weights, metadata)
    report = reporter(progress, bytes_of(weights))
    with _replacing(Path(file)) as stream:
        start = len(header).to_bytes(8, "little") + header
        if not _put(stream, start, read_back=read_back):
            raise OSError(f"{str(file)!r} has another header than was written; check the disk, and write it again")
        for name in names:
            if not _put(stream, content_of(name, weights[name].read()), read_back=read_back):
                raise OSError(
                    f"{str(file)!r} has another tensor {name!r} than was written; check the disk, and write it again"
                )
            report(weights[name].nbytes)
        if stream.tell() != len(start) + bytes_of(weights):
            raise ValueError(f"a tensor for {str(file)!r} has another size than its shape says; this is a bug")


def _put(stream: BinaryIO, content: Any, *, read_back: bool) -> bool:
    """Write a buffer, and return whether it is read back with the same bytes.

    It is read back in chunks. Without `read_back`, return True.
    """
    start = stream.tell()
    stream.write(content)
    if not read_back:
        return True
    stream.seek(start)
    chunks = (content[at : at + _CHUNK] for at in range(0, len(content), _CHUNK))
    is_equal = all(stream.read(len(chunk)) == bytes(chunk) for chunk in chunks)
    stream.seek(0, os.SEEK_END)
    return is_equal


def part_of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Return a function that reports the progress of one of several files.

    `before` bytes of `total` are done before this file.
    """
    return None if progress is None else lambda done, _: progress(before + done, total)


def _header(weights: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None) -> tuple[bytes, list[str]]:
    """Return the header, and the names in the order of the data.

    `safetensors` writes the header for tensors without entries, which gives the order, the dtypes and the escaped
    names. Shapes and offsets are then filled in.
    """
    empty = {
        name: torch.empty((0, *weight.shape), dtype=weight.dtype, device="cpu") for name, weight in weights.items()
    }
    if _METADATA in weights:
        raise ValueError(f"`weights` has the name {_METADATA!r}, which is no tensor in a safetensors file; rename it")
    save = safetensors().torch.save
    try:
        header = json.loads(save(empty, metadata=dict(metadata or {}))[8:])
    except Exception:  # of several types, for names and dtypes
        _name_refused(empty, save)
        raise
    if metadata:
        header[_METADATA] = dict(metadata)  # in this order, while the order of `safetensors` varies
    names, end = [name for name in header if name != _METADATA], 0
    for name in names:
        start, end = end, end + weights[name].nbytes
        header[name] |= {"shape": header[name]["shape"][1:], "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return content + b" " * (-len(content) % 8), names


def _name_refused(tensors: Mapping[str, Tensor], save: Callable[..., bytes]) -> None:
    """Raise TypeError for the first tensor that `safetensors` refuses."""
    for name, tensor in tensors.items():
        try:
            save({name: tensor})
        except Exception as error:
            raise TypeError(
                f"`weights` has {name!r} of dtype {tensor.dtype}, which a safetensors file cannot have ({error}); "
                "convert or rename it"
            ) from error


def content_of(name: str, tensor: Tensor) -> Any:
    """Return a buffer with the bytes of a tensor in row-major order.

    A contiguous tensor on the CPU is not copied.

    Raises:
        ValueError: If the tensor has no plain bytes: it is sparse, on the meta device, or a subclass.
    """
    kinds = {
        f"of type {type(tensor).__name__}": is_traceable_wrapper_subclass(tensor),
        f"of layout {tensor.layout}": tensor.layout != torch.strided,
        "on the meta device": tensor.device.type == "meta",
        "inside of a transform of `torch.func`": is_of_transform(tensor),
    }
    if kind := next((kind for kind, is_kind in kinds.items() if is_kind), None):
        raise ValueError(f"`weights` has {name!r} {kind}, which has no bytes to write; use a dense tensor with data")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return byte_view(plain).numpy()


@contextmanager
def _replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `file` at the end of the block.

    After an error the new file is removed.
    """
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files have little-endian numbers; write them on such a machine")
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise ValueError(f"`file` is {str(file)!r}, which exists and is not a regular file; pass the name of a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".writing-{secrets.token_hex(8)}")
    try:
        with temporary.open("x+b") as stream:
            yield stream
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""Save parameters as the files of their model, with dense weights."""

import copy
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_path, first_names
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._types import Params
from dynlora_fn.interop._folder import filled
from dynlora_fn.interop._lazy import LazyTensor, bytes_of
from dynlora_fn.interop._safetensors import SINGLE, open_weights
from dynlora_fn.interop._save import content_of, write
from dynlora_fn.interop._state_dict import lazy_state_dict
from dynlora_fn.interop._transformers import check_pretrained, is_pretrained, write_pretrained

Content: TypeAlias = tuple[tuple[int, ...], torch.dtype, int]  # shape, dtype and checksum of a tensor

_PICKLED = ("bin", "pt", "pth", "ckpt")  # endings of files of tensors by torch.save


@torch.no_grad()
def save_merged(model: nn.Module, params: Params, folder: Path | str, *, progress: Progress | None = None) -> None:
    """Write the model with dense weights, for a reader without this library.

    The files appear complete, or not at all. What was written is read back and compared first. Read the model with
    ``from_pretrained`` or ``load_state_dict``.

    ============================  =====================================================  ==================
    the model                     files                                                  in memory
    ============================  =====================================================  ==================
    a model of `transformers`     the files of its ``save_pretrained``                   one dense weight
    another module with           the files that ``save_pretrained`` writes for a copy   all dense weights
    ``save_pretrained``           with the trained weights
    any other module              model.safetensors, for                                 one dense weight
                                  ``load_state_dict(dict(open_weights(folder)))``
    ============================  =====================================================  ==================

    Weights that `transformers` converts together, such as the experts of a layer, are in memory together.

    Args:
        model: The model, read as in `state_dict`.
        params: The parameters, as for `call`.
        folder: The folder, which is created if it does not exist.
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

    Raises:
        TypeError: If an argument has a wrong type, or a parameter another kind than the model's, as in `state_dict`.
        ValueError: If a parameter is missing, unknown or of another shape, as in `state_dict`. Also if
            ``save_pretrained`` of the model does not write a weight that changed, or the model is quantized.
        OSError: If the files, read back, have other tensors than were written.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> model, folder = nn.Linear(6, 4), tempfile.mkdtemp()
        >>> save_merged(model, dl.init(model, rank=2, seed=0, targets=["weight"]), folder)
        >>> model.load_state_dict(dict(dl.interop.open_weights(folder)))
        <All keys matched successfully>
    """
    check_path("folder", folder)
    check_progress(progress)
    weights = lazy_state_dict(model, params)
    check_pretrained(model)
    with filled(Path(folder)) as aside:
        if is_pretrained(model):
            write_pretrained(model, weights, aside, progress=progress)
        elif callable(getattr(model, "save_pretrained", None)):
            _write_copy(model, weights, aside, progress)
        else:
            write(weights, aside / SINGLE, read_back=True, progress=progress)


def _write_copy(model: Any, weights: dict[str, LazyTensor], folder: Path, progress: Progress | None) -> None:
    """Write a copy of the model with the trained weights by its `save_pretrained`.

    Raises:
        ValueError: If `save_pretrained` fails, or does not write a weight that changed.
    """
    kind, report = type(model).__name__, reporter(progress, bytes_of(weights))
    replacements = _replacements(model, weights)
    changed = {
        name: content
        for name, (tensor, replacement) in replacements.items()
        if not replacement.is_meta  # a buffer without values
        and (content := _content(name, replacement)) != (None if tensor.is_meta else _content(name, tensor))
    }
    try:
        copied = copy.deepcopy(model, {id(old): new for old, new in replacements.values()})
        copied.save_pretrained(str(folder))
    except Exception as error:
        raise ValueError(
            f"`model` is a {kind}, and `save_pretrained` of a copy with the trained weights failed"
            f" ({type(error).__name__}: {error}); load `state_dict(model, params)` into it and save it"
        ) from error
    found = set(_contents(folder))
    if lost := [name for name, content in changed.items() if content not in found]:
        raise ValueError(
            f"`model` is a {kind}, whose `save_pretrained` did not write the trained {first_names(lost)};"
            " load `state_dict(model, params)` into it, and save it in another way"
        )
    report(bytes_of(weights))


def _replacements(model: nn.Module, weights: dict[str, LazyTensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each parameter and saved buffer with its replacement in a copy, by name.

    A tied parameter is included once.
    """
    parameters = dict(model.named_parameters())
    if missing := [name for name in parameters if name not in weights]:
        raise ValueError(
            f"`model` has {first_names(missing)}, which its state dict leaves out; write all parameters into it"
        )
    saved = [(name, buffer) for name, buffer in model.named_buffers() if name in weights]
    buffers = {name: (buffer, weights[name].read().clone()) for name, buffer in saved}
    return buffers | {
        name: (parameter, nn.Parameter(weights[name].read().clone(), parameter.requires_grad))
        for name, parameter in parameters.items()
    }


def _content(name: str, tensor: Tensor) -> Content:
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(content_of(name, tensor))


def _contents(folder: Path) -> Iterator[Content]:
    """Yield the contents of the tensors in all files of a folder, without names."""
    for file in sorted(folder.rglob("*.safetensors")):
        with open_weights(file) as weights:
            for name in weights:
                yield _content(name, weights[name])
    for file in sorted(path for kind in _PICKLED for path in folder.rglob(f"*.{kind}")):
        with suppress(Exception):  # a file that cannot be read without unpickling objects counts as not written
            for tensor in _tensors_in(torch.load(file, map_location="cpu", weights_only=True)):
                yield _content(file.name, tensor)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for member in value.values():
            yield from _tensors_in(member)

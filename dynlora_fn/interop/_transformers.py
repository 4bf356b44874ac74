"""Write the files of `transformers`' `save_pretrained`, one tensor at a time.

`save_pretrained` drops tied names, and converts weights to the layout of the model's files: fused experts become one
weight for each expert. Both functions are internal to `transformers`, checked on version 5.24. Here they run on tensors
without data, which gives names and shapes, and shows which weights are converted together.
"""

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dynlora_fn._core._progress import Progress
from dynlora_fn.interop._lazy import LazyTensor, bytes_of
from dynlora_fn.interop._safetensors import INDEX
from dynlora_fn.interop._save import part_of, write

Convert: TypeAlias = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def is_pretrained(model: nn.Module) -> bool:
    """Return whether a model has the `save_pretrained` of `transformers`.

    A model that overrides the method outside `transformers` does not.
    """
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return False
    return str(type(model).save_pretrained.__module__).partition(".")[0] == "transformers"


def check_pretrained(model: Any) -> None:
    """Raise ValueError if ``save_pretrained`` does not write the weights it is passed."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            f"`model` is a quantized {type(model).__name__}, whose `save_pretrained` writes the quantized weights"
            " and not the weights of `params`; pass the model that is not quantized"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"`model` is a {type(model).__name__} with an adapter in it, and its `save_pretrained` writes only the"
            " adapter; pass the model without the adapter"
        )


def write_pretrained(
    model: Any,
    weights: dict[str, LazyTensor],
    folder: Path,
    *,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the files of ``model.save_pretrained(folder)``, with other weights.

    Args:
        model: The model, whose weights are not read.
        weights: The weights under the names of the model.
        folder: An empty folder.
        max_shard_size: The largest size of a file. Default None means the default of ``save_pretrained``.
        progress: A function that is called as ``progress(done, total)`` with bytes. Default None means no reports.

    Raises:
        ValueError: If weights share memory in a way that `transformers` cannot restore.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # noqa: PLC0415, comes with transformers
    from transformers.modeling_utils import PreTrainedModel  # noqa: PLC0415, takes seconds

    if max_shard_size is None:
        max_shard_size = inspect.signature(PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    entries = entries_of(model, weights)
    model.save_pretrained(str(folder), state_dict={})  # the configurations
    split = split_torch_state_dict_into_shards(_without_data(entries), max_shard_size=max_shard_size)
    done, total = 0, bytes_of(entries)
    for file, names in split.filename_to_tensors.items():
        shard = {name: entries[name] for name in names}
        write(
            shard,
            folder / file,
            metadata={"format": "pt"},
            read_back=True,
            progress=part_of(progress, done, total),
        )
        done += bytes_of(shard)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def entries_of(model: Any, weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors that ``save_pretrained`` writes, in the layout of its files.

    Of tied weights, only one name is included.

    Raises:
        ValueError: If weights share memory in a way that `transformers` cannot restore.
    """
    from transformers.modeling_utils import remove_tied_weights_from_state_dict  # noqa: PLC0415, takes seconds

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    weights = {name: weight for name, weight in weights.items() if name not in ignored}
    try:
        names = list(remove_tied_weights_from_state_dict(_without_data(weights), model))
    except RuntimeError as error:
        raise ValueError(
            f"`model` is a {type(model).__name__} with weights that share memory, which its `save_pretrained` cannot"
            f" write ({error}); untie them"
        ) from error
    return converted(_conversion(model), {name: weights[name] for name in names})


def _conversion(model: Any) -> Convert:
    try:
        from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415, takes seconds
    except ImportError:  # before transformers 5, files have the layout of the model
        return dict
    return partial(revert_weight_conversion, model)


def converted(convert: Convert, weights: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the results of a conversion of weights, each computed when it is read.

    A renamed weight is passed on. Weights that are converted together, such as the parts of a fused weight, are
    computed together and dropped once all of their results have been read.

    Args:
        convert: A function from tensors by name to tensors by their new names. It must accept tensors without data.
        weights: The weights by name.
    """
    inputs = _without_data(weights)
    names = {id(tensor): name for name, tensor in inputs.items()}
    results = convert(dict(inputs))
    renamed = {names[id(result)] for result in results.values() if id(result) in names}
    formed = {name: result for name, result in results.items() if id(result) not in names}
    rest = {name: tensor for name, tensor in inputs.items() if name not in renamed}
    groups = _groups(convert, weights, rest, formed)
    return {
        name: weights[names[id(result)]]
        if id(result) in names
        else LazyTensor(tuple(result.shape), result.dtype, partial(groups[name].read, weights, name))
        for name, result in results.items()
    }


class _Group:
    """Weights that are converted together."""

    def __init__(self, convert: Convert, names: Iterable[str]):
        self._convert, self._names = convert, list(names)
        self._results: dict[str, Tensor] = {}

    def read(self, weights: Mapping[str, LazyTensor], result: str) -> Tensor:
        """Return a result, and drop it."""
        if result not in self._results:
            self._results = self._convert({name: weights[name].read() for name in self._names})
        return self._results.pop(result)


def _groups(
    convert: Convert, every: Iterable[str], inputs: dict[str, Tensor], results: dict[str, Tensor]
) -> dict[str, _Group]:
    """Return the group of each result.

    Two weights belong to one group if converting each of them gives a result of the same name. If converting the groups
    does not give all results, all weights are in one group.
    """
    groups: list[tuple[set[str], set[str]]] = []  # names of weights and of results
    try:
        for name, tensor in inputs.items():
            members, keys = {name}, set(convert({name: tensor}))
            for group in [group for group in groups if group[1] & keys]:
                groups.remove(group)
                members, keys = members | group[0], keys | group[1]
            groups.append((members, keys))
        parts = [{name: tensor for name, tensor in inputs.items() if name in members} for members, _ in groups]
        formed = [(part, convert(dict(part))) for part in parts]
    except Exception:  # a conversion may need several weights at once; then all are converted together
        formed = []
    shapes = {key: result.shape for _, part in formed for key, result in part.items()}
    if shapes != {key: result.shape for key, result in results.items()}:
        return dict.fromkeys(results, _Group(convert, every))
    return {key: group for names, part in formed for group in [_Group(convert, names)] for key in part}


def _without_data(weights: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in weights.items()}

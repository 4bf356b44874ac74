"""Find what each tensor in a file of PEFT belongs to.

A tensor that belongs to nothing is refused, and so is a file that lacks a tensor.
"""

import math
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn.interop._peft_alphas import alphas, ranks
from dynlora_fn.interop._peft_layers import PREFIX, Pair, PairShapes, aliases_of, factors_of, shapes_in_file
from dynlora_fn.interop._peft_layout import Layout, Slot, layout_of
from dynlora_fn.interop._safetensors import Weights

_NAMED_ADAPTER = re.compile(r"(\.lora_[^.]+)\.default(\.weight)?$")  # the name that PEFT reads by default


class PairInFile(NamedTuple):
    """The keys of the factors of one layer in a file, to be read when they are needed."""

    up: str
    down: str
    kind: str
    shapes: PairShapes
    alpha: float  # the product is multiplied by alpha / rank
    rank: int  # of the parameter

    def read(self, weights: Weights) -> Pair:
        """Read the factors, in float32 or float64."""
        return Pair(_real(weights, self.up), _real(weights, self.down))

    @property
    def entries(self) -> int:
        """The number of entries of both factors."""
        return sum(map(math.prod, self.shapes))


class Tensors(NamedTuple):
    """The tensors of a file by the names of the model."""

    pairs: dict[str, PairInFile]
    dense: dict[str, str]  # the keys of full-rank parameters and of bases
    buffers: dict[str, str]  # the keys of buffers whose values differ from the model's


def _real(weights: Weights, key: str) -> Tensor:
    tensor = weights[key]
    if not tensor.is_floating_point():
        raise ValueError(f"the adapter has {key!r} of dtype {tensor.dtype}; write factors of a floating-point dtype")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def find_tensors(model: nn.Module, settings: Mapping[str, Any], weights: Weights) -> Tensors:
    """Return where a file has the factors and the other tensors of a model.

    Raises:
        ValueError: If the file has a tensor that this model and these settings do not have, lacks a tensor, or has one
            of another shape. The message names the tensor. Also if tied weights are not adapted in the same way.
    """
    layout = layout_of(model, settings)
    keys = _standard_keys(layout, weights)
    _check_all_known(model, layout, keys, weights)
    if not keys:
        raise ValueError(
            f"the adapter has no tensors, and {settings.get('target_modules')!r:.100} as `target_modules`; write the "
            "factors of every layer"
        )
    pairs = _pairs(model, settings, layout.slots, keys, weights)
    dense = _dense(model, settings, layout, keys, weights)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in dense}
    changed = {
        name: dense[name]
        for name, like in buffers.items()
        if like.is_meta or not torch.equal(weights[dense[name]].to(like), like)
    }
    dense = {name: key for name, key in dense.items() if name not in buffers}
    return Tensors(_merge_tied(model, weights, pairs), dense, changed)


def _standard_keys(layout: Layout, weights: Weights) -> dict[str, str]:
    """Return the keys of a file by their standard form, without PEFT's additions.

    PEFT may add the name of the adapter and of its wrapper. With ``bias="all"`` PEFT writes the biases of a module that
    is stored whole three times: under the plain key, below ``modules_to_save``, and with the old values below
    ``original_module``. It does not read the old values, so they are left out.
    """
    known = {key for slot in layout.slots for key in (slot.up, slot.down)} | layout.dense.keys()
    keys: dict[str, str] = {}
    for key in weights:
        standard = key if key in known else _NAMED_ADAPTER.sub(r"\1\2", key)
        if layout.dense.get(standard.replace(".original_module.", ".")) in layout.saved and standard not in known:
            continue
        if standard not in known:
            standard = re.sub(r"\.modules_to_save(\.default)?\.", ".", key)
        if standard in keys and not torch.equal(weights[key], weights[keys[standard]]):
            raise ValueError(f"the adapter has {key!r} and {keys[standard]!r} for one tensor; write only one of them")
        keys[standard] = key
    return keys


def _check_all_known(model: nn.Module, layout: Layout, keys: Mapping[str, str], weights: Weights) -> None:
    known = {key for slot in layout.slots for key in (slot.up, slot.down)} | layout.dense.keys()
    for standard, key in keys.items():
        if standard in known:
            continue
        name = re.sub(r"\.lora_.*|\.base_layer|\.modules_to_save", "", standard).removeprefix(PREFIX)
        is_there = name in layout.dense.values() or any(name == path for path, _ in model.named_modules())
        selects_none = f"but its settings select no such tensor of {name!r}, so that PEFT ignores it"
        reason = selects_none if is_there else f"but the model has no {name!r}"
        raise ValueError(
            f"the adapter has {key!r} of shape {weights.shape(key)}, {reason}; load it into the model that it was made "
            "for"
        )


def _pairs(
    model: nn.Module, settings: Mapping[str, Any], slots: Iterable[Slot], keys: Mapping[str, str], weights: Weights
) -> dict[str, PairInFile]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    alpha_of, rank_of = alphas(settings), ranks(settings)
    pairs = {}
    for slot in slots:
        if not slot.is_needed and slot.up not in keys and slot.down not in keys:
            continue
        for key, other in ((slot.down, slot.up), (slot.up, slot.down)):
            if key not in keys:
                beside = f" beside {keys[other]!r}" if other in keys else ""
                raise ValueError(
                    f"the adapter has no {key!r}{beside}, which its settings select;"
                    f" write both factors of {slot.name!r}"
                )
        shape, rank = tuple(parameters[slot.name].shape), rank_of(slot.layer)
        found = PairShapes(weights.shape(keys[slot.up]), weights.shape(keys[slot.down]))
        _check_shapes(slot, found, shape, rank)
        matrix = (shape[0], math.prod(shape[1:])) if slot.kind == "convolution" else shape[-2:]
        alpha, least = slot.times * alpha_of(slot.layer), min(rank, *matrix)
        if alpha == 0:
            raise ValueError(
                f"the adapter has factors whose `alpha` is 0 for {slot.name!r}, with which they change nothing; remove "
                "them from the adapter"
            )
        alpha *= math.sqrt(rank) if settings.get("use_rslora") else 1
        alpha *= least / rank if least < rank else 1  # factors that are cut keep the scale alpha / rank
        pairs[slot.name] = PairInFile(keys[slot.up], keys[slot.down], slot.kind, found, alpha, least)
    return pairs


def _check_shapes(slot: Slot, found: PairShapes, shape: tuple[int, ...], rank: int) -> None:
    wanted = shapes_in_file(slot.kind, shape, rank)
    if found == wanted:
        return
    raise ValueError(
        f"the adapter has factors of {found.up} and {found.down} for {slot.name!r} of {shape}, and the rank {rank} for "
        f"{slot.layer!r} in its settings, which takes {wanted.up} and {wanted.down}; load it into the model that it "
        "was made for"
    )


def _dense(
    model: nn.Module, settings: Mapping[str, Any], layout: Layout, keys: Mapping[str, str], weights: Weights
) -> dict[str, str]:
    """Return the keys of replaced parameters and buffers, by their first names."""
    found = {name: keys[key] for key, name in layout.dense.items() if key in keys}
    bias, layers = settings.get("bias") or "none", {slot.name.removesuffix(".weight") for slot in layout.slots}
    biases = {name for name in layout.dense.values() if bias != "none" and _is_bias_in_file(name, bias, layers)}
    needed = layout.saved | biases
    if missing := sorted(needed - found.keys()):
        raise ValueError(
            f"the adapter has no tensor for {missing[0]!r}, which `modules_to_save` or `bias` of its settings selects; "
            "write all of them"
        )
    if not found:
        return {}
    tensors = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for name, key in found.items():
        _check_alike(key, weights, tensors[name])
    return _first_names(model, layout, found, weights)


def _check_alike(key: str, weights: Weights, like: Tensor) -> None:
    if weights.shape(key) != tuple(like.shape):
        raise ValueError(
            f"the adapter has shape {weights.shape(key)} for {key!r}, but the model has {tuple(like.shape)}; "
            "load it into the model that it was made for"
        )
    dtype = weights[key].dtype
    if (dtype.is_floating_point, dtype.is_complex) != (like.is_floating_point(), like.is_complex()):
        raise ValueError(
            f"the adapter has dtype {dtype} for {key!r}, but the model has {like.dtype}; load it into the model that "
            "it was made for"
        )


def _is_bias_in_file(name: str, bias: str, layers: Container[str]) -> bool:
    """Return whether PEFT writes a parameter for this value of the setting `bias`."""
    layer, _, leaf_name = name.rpartition(".")
    return leaf_name == "bias" and (bias == "all" or (bias == "lora_only" and layer in layers))


def _first_names(model: nn.Module, layout: Layout, found: Mapping[str, str], weights: Weights) -> dict[str, str]:
    """Return the keys by the first names of parameters and buffers.

    PEFT copies all tensors of a module that is stored completely, including tied tensors. So all names of a tied tensor
    must have equal values.
    """
    aliases, first_names = aliases_of(model, with_buffers=True), dict[str, str]()
    for name, key in found.items():
        first_names.setdefault(aliases[name][0], key)
        if len(aliases[name]) == 1:
            continue
        tensor = weights[key]
        for other in aliases[name]:
            is_other = other in found and not torch.equal(weights[found[other]], tensor)
            if is_other or (other not in found and name in layout.saved and not _is_same_module(model, name, other)):
                raise ValueError(
                    f"the adapter has other values for {name!r} than for {other!r}, which are tied in the model; "
                    "store both alike, or untie them in the model"
                )
    return first_names


def _is_same_module(model: nn.Module, name: str, other: str) -> bool:
    """Return whether two names of a tensor lead to one module under two paths."""
    one, two = (model.get_submodule(path.rpartition(".")[0]) for path in (name, other))
    return one is two


def _merge_tied(model: nn.Module, weights: Weights, pairs: dict[str, PairInFile]) -> dict[str, PairInFile]:
    """Keep the first name of tied weights, whose factors must all be equal.

    PEFT adapts each layer of a tied weight. In `params` the weight is one parameter.
    """
    merged, aliases = {}, aliases_of(model)
    for name, pair in pairs.items():
        first = aliases[name][0]
        merged[first] = pairs.get(first, pair)
        if len(aliases[name]) == 1:
            continue
        shape = tuple(model.get_parameter(name).shape)
        factors = factors_of(pair.kind, pair.read(weights), shape)
        for other in aliases[name]:
            if other not in pairs and _is_same_module(model, name, other):
                continue
            second = pairs.get(other)
            others = None if second is None else factors_of(second.kind, second.read(weights), shape)
            is_alike = second is not None and second.alpha == pair.alpha
            if others is None or not is_alike or not all(map(torch.equal, others, factors)):
                raise ValueError(
                    f"the adapter has different factors for the tied weights {other!r} and {name!r}; "
                    "adapt both alike, or untie them in the model"
                )
    return merged

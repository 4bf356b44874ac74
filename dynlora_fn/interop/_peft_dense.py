"""The tensors of an adapter that are not low-rank.

They are biases of adapted layers, and PEFT's `modules_to_save`. PEFT replaces every module whose name ends with an
entry of `modules_to_save` by a copy, with or without a dot before the entry. The file must have all tensors of these
modules. So this module finds the names that PEFT would take, and writes a change only if PEFT reads exactly that
change.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn.interop._lazy import LazyTensor
from dynlora_fn.interop._peft_layers import PREFIX
from dynlora_fn.interop._peft_names import paths_above

# Names of the children of a layer that PEFT has adapted. An entry must not be the end of one of them.
_OF_PEFT = ("base_layer", "default", "lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B")
_WITHOUT_FORWARD = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


class DenseChanges(NamedTuple):
    """Tensors that differ from the original and are not low-rank."""

    entries: dict[str, LazyTensor]  # all tensors that the file needs for them, by key
    modules: list[str]  # PEFT's `modules_to_save`
    has_biases: bool  # whether `entries` has the biases of all adapted layers
    lost: list[str]  # names of changed tensors that PEFT cannot save


def dense_changes(
    model: nn.Module,
    weights: Mapping[str, LazyTensor],
    original: Mapping[str, Tensor],
    adapted: Collection[str],
    skipped: Collection[str],
    aliases: Mapping[str, list[str]],
) -> DenseChanges:
    """Return the tensors that an adapter needs besides its factors.

    Args:
        model: The model.
        weights: The state dict of the trained model.
        original: The state dict of the model that the adapter is for.
        adapted: All names of the weights that have factors in the adapter.
        skipped: The names of low-rank weights that are left out.
        aliases: All names of each parameter.

    Raises:
        ValueError: If `original` lacks a tensor.
    """
    changed = [
        name
        for name, weight in weights.items()
        if name not in adapted
        and name not in skipped
        and _has_changed(name, weight, original, aliases.get(name, [name]))
    ]
    places = _Places(model, adapted)
    biases = [name for name in weights if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in adapted]
    if not set(biases).intersection(changed):
        biases = []  # PEFT writes the biases of all adapted layers or none
    entries: dict[str, list[str]] = {}
    for name in changed:
        if name not in biases:
            entries.setdefault(places.module_of(name), []).append(name)
    refused = {entry for entry in entries if not places.takes_only(entry)}
    while more := places.entangled(set(entries) - refused) | _with_a_lost_tie(entries, refused, aliases):
        refused |= more
    modules = places.outermost(set(entries) - refused)
    saved = places.taken_by(modules)
    files = {PREFIX + name: weight for name, weight in weights.items() if places.has_above(name, saved)}
    if biases:  # PEFT writes the biases of all adapted layers
        biases = [name for name in weights if name.endswith(".bias") and name.removesuffix(".bias") in places.adapted]
    files |= {f"{PREFIX}{name.removesuffix('.bias')}.base_layer.bias": weights[name] for name in biases}
    lost = [name for entry in entries if entry in refused for name in entries[entry]]
    return DenseChanges(files, sorted(modules), bool(biases), lost)


def _has_changed(name: str, weight: LazyTensor, original: Mapping[str, Tensor], names: Iterable[str]) -> bool:
    before = tensor_of_original(original, names)
    if before is None or tuple(before.shape) != weight.shape:
        found = "nothing" if before is None else f"shape {tuple(before.shape)}"
        raise ValueError(
            f"`original` has {found} for {name!r} of shape {weight.shape}; pass the state dict of this model"
        )
    after = weight.read()
    return not torch.equal(after, before.to(after))


def tensor_of_original(original: Mapping[str, Tensor], names: Iterable[str]) -> Tensor | None:
    """Return the tensor with any of these names. A file has one name for tied weights."""
    return next((original[name] for name in names if name in original), None)


def _with_a_lost_tie(entries: Mapping[str, list[str]], refused: set[str], aliases: Mapping[str, list[str]]) -> set[str]:
    """Return the other entries with a tensor that is tied to one of a refused entry."""
    lost = {alias for entry in refused for name in entries[entry] for alias in aliases.get(name, [name])}
    return {entry for entry, names in entries.items() if entry not in refused and not lost.isdisjoint(names)}


class _Places:
    """The modules of a model, and which of them an entry of `modules_to_save` takes."""

    def __init__(self, model: nn.Module, adapted: Collection[str]):
        self._model = model
        self.adapted = {name.rpartition(".")[0] for name in adapted}
        self._parents = {above for layer in self.adapted for above in paths_above(layer)}
        names = (name for name, _ in model.named_modules(remove_duplicate=False) if name)
        self._modules = "".join(f"{PREFIX}{name}\n" for name in names)  # one search is faster than 10,000 comparisons
        self._layers = "".join(f".{layer}.\n" for layer in self.adapted)
        self._leaves = list(model.state_dict(keep_vars=True))

    def module_of(self, name: str) -> str:
        """Return the innermost module with a forward method that contains a tensor."""
        path = name.rpartition(".")[0]
        while path and isinstance(self._model.get_submodule(path), _WITHOUT_FORWARD):
            path = path.rpartition(".")[0]
        return path

    def taken_by(self, entries: Iterable[str]) -> set[str]:
        """Return the names of the modules that PEFT replaces by copies."""
        return {name for entry in entries for name in self._taken_by(entry)}

    def takes_only(self, entry: str) -> bool:
        """Return whether PEFT can replace the modules of an entry by copies.

        The adapted layers must stay the same.
        """
        if not entry or "base_model.model".endswith(entry) or "base_model".endswith(entry):
            return False  # PEFT takes the model itself
        if any(part.endswith(entry) for part in _OF_PEFT):
            return False
        if f".{entry}." in self._layers:
            return False  # PEFT does not adapt a layer whose name contains an entry
        names = self._taken_by(entry)
        return not any(
            name in self.adapted or name in self._parents or self.has_above(name, self.adapted) for name in names
        )

    def outermost(self, entries: set[str]) -> set[str]:
        """Return the entries that are not inside another entry."""
        return {entry for entry in entries if entries.isdisjoint(paths_above(entry))}

    def entangled(self, entries: set[str]) -> set[str]:
        """Return the entries for which PEFT would take a module inside a taken one."""
        outer = self.outermost(entries)
        taken = self.taken_by(outer)
        inner = {name for name in taken if not taken.isdisjoint(paths_above(name)) and self._has_tensors(name)}
        return {entry for entry in outer if not inner.isdisjoint(self._taken_by(entry))}

    def has_above(self, name: str, modules: Collection[str]) -> bool:
        """Return whether a tensor or module is one of these modules or inside one."""
        return name in modules or any(path in modules for path in paths_above(name))

    def _taken_by(self, entry: str) -> list[str]:
        names, end = [], 0
        while (at := self._modules.find(f"{entry}\n", end)) >= 0:
            start, end = self._modules.rfind("\n", 0, at) + 1, at + len(entry)
            names.append(self._modules[start:end].removeprefix(PREFIX))
        return names

    def _has_tensors(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self._leaves)

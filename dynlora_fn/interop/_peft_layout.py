"""Find the keys that a file of PEFT has for the tensors of a model.

They follow from the settings of the adapter and the names of modules. PEFT replaces each adapted module by a wrapper,
whose child ``base_layer`` is the module. A module with several adapted parameters gets a wrapper for each, the first
one innermost::

    base_model.model.q_proj.lora_A.weight                 an adapted layer: `lora_A` and `lora_B`
    base_model.model.embed.lora_embedding_A               an adapted embedding
    base_model.model.q_proj.base_layer.bias               any other parameter of an adapted layer
    base_model.model.experts.base_layer.lora_A.weight     the first of two adapted parameters of `experts`
    base_model.model.attn.lora_A.weight                   the `in_proj_weight` of `nn.MultiheadAttention`, and
    base_model.model.attn.base_layer.out_proj.lora_A...   its `out_proj`
    base_model.model.head.weight                          a module that is stored whole
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from dynlora_fn.interop._peft_differences import LayerCheck
from dynlora_fn.interop._peft_layers import PREFIX, aliases_of, kind_of_parameter
from dynlora_fn.interop._peft_names import paths_above
from dynlora_fn.interop._peft_targets import adapted_modules, adapted_parameters, saved_modules

OWNER, INSTEAD = "the adapter", "merge it into the model with PEFT"


class Slot(NamedTuple):
    """The factors of one parameter in a file."""

    name: str  # of the parameter
    kind: str  # of its layer, as in `_peft_layers`
    up: str  # the key of B
    down: str  # the key of A
    layer: str  # the name that PEFT compares with `rank_pattern` and `alpha_pattern`
    is_needed: bool = True  # False for a further name of a module, whose factors may be missing
    times: int = 1  # how often PEFT adds the product


class Layout(NamedTuple):
    """The tensors that a file may have."""

    slots: list[Slot]
    dense: dict[str, str]  # the names of parameters and buffers, by their keys in the file
    saved: frozenset[str]  # the names in modules that are stored whole; a file must have all of them


def layout_of(model: nn.Module, settings: Mapping[str, Any]) -> Layout:
    """Return the layout of a file with these settings.

    Raises:
        ValueError: If PEFT has no LoRA for an adapted layer, or its adapter is not a change of the weight. Also if the
            settings select a module and another one inside it.
    """
    wrapped = _Wrapped(model, settings)
    slots = [slot for path in wrapped.modules for slot in wrapped.slots(path)]
    dense = dict(wrapped.dense())
    saved = frozenset(name for name in dense.values() if wrapped.is_saved(name))
    return Layout(slots, dense, saved)


class _Wrapped:
    """The modules that PEFT wraps, by all their names."""

    def __init__(self, model: nn.Module, settings: Mapping[str, Any]):
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._model, self._check = model, LayerCheck(model, owner=OWNER, instead=INSTEAD)
        self._first: dict[int, str] = {}
        for path, module in self.modules.items():
            self._first.setdefault(id(module), path)
        is_saved, is_adapted = saved_modules(settings), adapted_modules(settings)
        self.saved = {path for path in self.modules if path and is_saved(path)}
        self.adapted = {path for path, module in self.modules.items() if is_adapted(self._first[id(module)])}
        if settings.get("ensure_weight_tying"):
            self._add_tied()
        self.parameters = {path: list[str]() for path in self.modules}
        if settings.get("target_parameters"):
            is_adapted = adapted_parameters(settings)
            self.parameters = {
                path: [
                    name
                    for name, _ in module.named_parameters(recurse=False)
                    if path and is_adapted(f"{self._first[id(module)]}.{name}")
                ]
                for path, module in self.modules.items()
            }
        self._refuse_both()

    def _add_tied(self) -> None:
        """Add the modules that PEFT wraps because of `ensure_weight_tying`.

        Their weights are tied to the weight of a wrapped module.
        """
        aliases = aliases_of(self._model)
        for paths in (self.adapted, self.saved):
            for path in list(paths):
                paths |= {alias.rpartition(".")[0] for alias in aliases.get(f"{path}.weight", ())}

    def _refuse_both(self) -> None:
        for path in self.modules:
            outer = next((outer for outer in paths_above(path) if outer in self.saved), None)
            is_wrapped = path in self.saved or path in self.adapted or self.parameters[path]
            if outer is not None and is_wrapped:
                raise ValueError(
                    f"the adapter has {outer!r} in `modules_to_save`, and adapts or stores {path!r} inside it, which "
                    "PEFT cannot read; select only one of them"
                )
            if path in self.adapted and (path in self.saved or self.parameters[path]):
                raise ValueError(
                    f"the adapter selects {path!r} in two ways, which PEFT cannot read; select it in one setting"
                )

    def slots(self, path: str) -> Iterator[Slot]:
        """Yield the factors of a module and of its parameters."""
        module = self.modules[path]
        first, key = self._first[id(module)], PREFIX + self._path(path, inside=False)
        is_needed = first == path
        if path in self.adapted and isinstance(module, nn.MultiheadAttention):
            self._check_attention(first, module)
            # PEFT 0.21 merges the factors of `out_proj` in two places for each forward pass, so they count twice.
            parts = ("in_proj_weight", key, 1), ("out_proj.weight", f"{key}.base_layer.out_proj", 2)
            for name, stem, times in parts:
                yield Slot(f"{path}.{name}", "linear", *_keys(stem, "linear"), first, is_needed, times)
        elif path in self.adapted:
            kind = self._check.layer(f"{first}.weight")
            yield Slot(f"{path}.weight", kind, *_keys(key, kind), first, is_needed)
        for index, name in enumerate(self.parameters[path]):
            outer = len(self.parameters[path]) - 1 - index
            self._check.parameter(f"{first}.{name}")
            kind = kind_of_parameter(self._model, f"{first}.{name}", owner=OWNER, instead=INSTEAD)
            keys = _keys(key + outer * ".base_layer", kind)
            yield Slot(f"{path}.{name}", kind, *keys, f"{first}.{name}", is_needed)

    def _check_attention(self, path: str, module: nn.MultiheadAttention) -> None:
        self._check.parameter(f"{path}.in_proj_weight")
        if not module._qkv_same_embed_dim:
            raise ValueError(
                f"the adapter has a low-rank {path!r} of MultiheadAttention with `kdim` or `vdim`, for which PEFT has "
                f"no LoRA; {INSTEAD}"
            )

    def dense(self) -> Iterator[tuple[str, str]]:
        """Yield the keys and the names of all parameters and persistent buffers."""
        for path, module in self.modules.items():
            key = PREFIX + self._path(path, inside=True)
            buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
            for name in [*module._parameters, *buffers]:
                if getattr(module, name) is not None:
                    yield f"{key}.{name}" if path else key + name, f"{path}.{name}" if path else name

    def is_saved(self, name: str) -> bool:
        """Return whether a parameter or buffer is in a module that is stored whole."""
        return any(path in self.saved for path in paths_above(name))

    def _path(self, path: str, *, inside: bool) -> str:
        """Return the path of a module, or of its outermost wrapper, in PEFT's model."""
        parts, result = path.split("."), []
        for end in range(1, len(parts) + 1):
            here = ".".join(parts[:end])
            result.append(parts[end - 1])
            if inside or end < len(parts):
                result += ["base_layer"] * self._wrappers(here)
        return ".".join(result)

    def _wrappers(self, path: str) -> int:
        if path not in self.modules:
            return 0
        parent, _, leaf_name = path.rpartition(".")
        is_output = leaf_name == "out_proj" and parent in self.adapted
        is_output = is_output and isinstance(self.modules[parent], nn.MultiheadAttention)
        return (path in self.adapted) + len(self.parameters[path]) + is_output


def _keys(stem: str, kind: str) -> tuple[str, str]:
    """Return the keys of B and A."""
    if kind == "embedding":
        return f"{stem}.lora_embedding_B", f"{stem}.lora_embedding_A"
    return f"{stem}.lora_B.weight", f"{stem}.lora_A.weight"

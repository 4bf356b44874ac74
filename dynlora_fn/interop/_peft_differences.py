"""Find layers where an adapter of PEFT is not a change of the weight.

PEFT adds ``alpha / rank * B A x`` to the result of a layer's forward method. Here the weight changes. Both are the same
if the layer is called and returns the product with its weight. Layers for which types or a small input show otherwise
are refused by name. Only a run of the model can find the others, such as a layer whose parent reads the weight itself:
the argument `check` of `load_adapter` compares outputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, linear

from dynlora_fn.interop._peft_layers import kind_of_module

# Layers whose weights these models read in a kernel. PEFT refuses them.
_READ_BY_MAMBA = frozenset({"out_proj", "conv1d"})
_MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
# Names that PEFT 0.21 replaces by the parameters of the fused experts, by the kind of the mixture of experts.
_REWRITTEN = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
_PLAIN: Mapping[str, list[Any]] = {
    "linear": [nn.Linear],
    "embedding": [nn.Embedding],
    "convolution": [nn.Conv1d, nn.Conv2d, nn.Conv3d],
}
_TOLERANCE = 1e-5  # relative, in float32, between two ways to compute one product


class LayerCheck:
    """Checks of the layers of one model."""

    def __init__(self, model: nn.Module, *, owner: str, instead: str):
        """Look up the modules of a model.

        Args:
            model: The model.
            owner: What has the low-rank weights, as error messages begin.
            instead: What to do instead, as error messages end.
        """
        self._owner, self._instead = owner, instead
        self._model_type: object = getattr(getattr(model, "config", None), "model_type", None)
        self._rewritten = _rewritten(self._model_type)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._places: dict[int, list[str]] = {}  # a child of a module that is registered twice has one place
        for path, parent in model.named_modules():
            for name, child in parent._modules.items():
                self._places.setdefault(id(child), []).append(f"{path}.{name}" if path else name)

    def layer(self, name: str) -> str:
        """Return the kind of the layer that has a weight.

        Raises:
            ValueError: If PEFT has no adapter for it, or the adapter would not be a change of the weight. The message
                names the weight.
        """
        path = name.rpartition(".")[0]
        layer = self._modules[path]
        kind = kind_of_module(layer, name, owner=self._owner, instead=self._instead)
        reason = (
            self._if_used_otherwise(path, layer)
            or self._if_rewritten(path)
            or _if_options_differ(layer)
            or _if_forward_differs(layer, kind)
        )
        self._refuse(name, layer, reason)
        return kind

    def parameter(self, name: str) -> None:
        """Raise ValueError if a parameter is used without a call of its module.

        PEFT adapts the parameter only during a call.
        """
        path = name.rpartition(".")[0]
        module = self._modules[path]
        self._refuse(name, module, self._if_used_otherwise(path, module))

    def _refuse(self, name: str, module: nn.Module, reason: str | None) -> None:
        if reason:
            raise ValueError(
                f"{self._owner} has a low-rank {name!r} of {type(module).__name__}, {reason}; {self._instead}"
            )

    def _if_used_otherwise(self, path: str, module: nn.Module) -> str | None:
        places = self._places.get(id(module), [])
        if len(places) > 1:
            return f"a module under the names {', '.join(map(repr, places))}; PEFT adapts only the first one"
        parent = self._modules[path.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            return "whose forward `MultiheadAttention` never calls, so that an adapter of PEFT has no effect"
        if isinstance(parent, nn.TransformerEncoderLayer) and _has_fast_path(parent):
            return "whose weight `TransformerEncoderLayer` reads itself in evaluation, where PEFT has no effect"
        return None

    def _if_rewritten(self, path: str) -> str | None:
        leaf_name = path.rpartition(".")[2]
        if leaf_name in self._rewritten:
            return f"which PEFT replaces by the fused experts in models of type {self._model_type!r}"
        if self._model_type in _MAMBA and leaf_name in _READ_BY_MAMBA:
            return f"whose weight models of type {self._model_type!r} read themselves"
        return None


def _rewritten(model_type: object) -> frozenset[str]:
    """Return the names of layers that PEFT replaces by fused experts.

    PEFT 0.21 replaces all layers of these names in models of some types, shared experts and dense layers included. A
    table of `transformers` gives the types.
    """
    if model_type is None:
        return frozenset()
    try:
        from transformers import conversion_mapping  # noqa: PLC0415, transformers is no requirement
    except ImportError:
        return frozenset()
    kinds: Mapping[object, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return _REWRITTEN.get(str(kinds.get(model_type, model_type)), frozenset())


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    attention: Any = layer.self_attn
    return bool(
        isinstance(attention, nn.MultiheadAttention)
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and layer.activation_relu_or_gelu
        and layer.norm1.eps == layer.norm2.eps
    )


def _if_options_differ(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "with `max_norm`, which PEFT applies to the factors too"
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if any(step != 1 for step in getattr(layer, "dilation", ())):
            return "with `dilation`, which PEFT's factors do not have"
        if layer.padding_mode != "zeros":
            return f"with `padding_mode` {layer.padding_mode!r}, which PEFT's factors do not have"
    return None


def _if_forward_differs(layer: nn.Module, kind: str) -> str | None:
    """Return why a layer returns more than the product with its weight, or None.

    A layer with forward hooks or another forward method than the plain one is run on a small input.
    """
    is_hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
    plain = [base.forward for base in _PLAIN.get(kind, [type(layer)])]
    has_forward = "forward" in vars(layer) or type(layer).forward not in plain
    if not (is_hooked or has_forward) or (kind in _PRODUCTS and _is_product(layer, _PRODUCTS[kind])):
        return None
    what = "with forward hooks" if is_hooked else "which has a forward method itself"
    return f"{what} that returns more than the product with its weight, to which PEFT adds"


class _Product(NamedTuple):
    inputs: Callable[[Any, Tensor], Tensor]  # of the layer and its weight
    multiply: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]  # of the layer, inputs, weight and bias


def _counted(like: Tensor, count: int) -> Tensor:
    """Return 0, 1, ... in float32, whatever the default dtype is."""
    return torch.arange(count, dtype=torch.float32, device=like.device)


_PRODUCTS = {
    "linear": _Product(
        lambda layer, weight: _counted(weight, 2 * weight.shape[1]).sin().reshape(2, -1),
        lambda layer, x, weight, bias: linear(x, weight, bias),
    ),
    "embedding": _Product(
        lambda layer, weight: torch.tensor([0, len(weight) // 2, len(weight) - 1], device=weight.device),
        lambda layer, x, weight, bias: embedding(x, weight) * getattr(layer, "embed_scale", 1.0),  # as in PEFT
    ),
}


@torch.no_grad()
def _is_product(layer: nn.Module, product: _Product) -> bool:
    """Return whether a layer returns the product with its weight.

    The layer runs with another weight, so that the result cannot be right by chance.
    """
    tensors = {name: parameter.float() for name, parameter in layer.named_parameters(recurse=False)}
    weight = tensors["weight"]
    rows, columns = (_counted(weight, size) + 1 for size in weight.shape)
    weight = tensors["weight"] = (rows[:, None] + 1.3 * columns).cos()
    x = product.inputs(layer, weight)
    expected = product.multiply(layer, x, weight, tensors.get("bias"))
    try:
        output = functional_call(layer, tensors, (x,))
    except Exception:  # it does not take the inputs of the plain layer
        return False
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= _TOLERANCE * expected.abs().max())

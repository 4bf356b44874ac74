"""LoRA adapters of PEFT, in."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import Factors, LowRank, Param
from dynlora_fn.interop._init import init
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, Pair, aliases_of, factors_of
from dynlora_fn.interop._safetensors import open_weights, read_json

_REFUSED = ("use_dora", "lora_bias", "use_qalora", "layer_replication", "trainable_token_indices", "target_parameters")


def load_adapter(
    model: nn.Module, folder: Path | str, *, seed: int, dtype: torch.dtype = torch.float32, stack: bool = True
) -> dict[str, Param]:
    """The model's parameters with a PEFT LoRA adapter for factors: together they give the logits of PEFT's model.

    Args:
        model: that the adapter was made for; left as it is. Its weights become the bases.
        folder: with adapter_model.safetensors and adapter_config.json.
        seed, dtype, stack: as in `init`; the seed names the bases that later switches draw from.

    Raises:
        ValueError: if the adapter is of another kind, or does not fit the model; it names what and both shapes.
    """
    folder = Path(folder)
    config, weights = _read_config(folder), dict(open_weights(folder / WEIGHTS))
    pairs, whole = _sorted(model, config, weights)
    ranks = {name: pair.down.shape[0] for name, pair in pairs.items()}
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    params = init(model, rank=ranks, seed=seed, targets=list(ranks), start="lora", dtype=dtype, stack=stack)
    for pattern, param in params.items():
        if isinstance(param, LowRank):
            names = list(unstack({pattern: param}))
            factors = [factors_of(model, name, pairs[name], tuple(own[name].shape)) for name in names]
            b, a = (torch.stack(side).to(dtype) for side in zip(*factors, strict=True))
            shapes = param.factors.b.shape, param.factors.a.shape
            params[pattern] = param._replace(factors=Factors(b.reshape(shapes[0]), a.reshape(shapes[1])))
        else:
            names = list(unstack({pattern: param}))
            members = [whole.get(name, own[name]).to(own[name].dtype) for name in names]
            params[pattern] = torch.stack(members).reshape(param.shape)
    return params


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"`folder` must hold {CONFIG}, got {str(folder)!r}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`folder` must hold an adapter of type 'LORA', got {config.get('peft_type')!r}")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"the adapter must be plain LoRA, got {name} = {config[name]!r}")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(map(_is_number, (config.get("lora_alpha"), *alphas.values()))):
        got = f"{config.get('lora_alpha')!r} and {alphas!r}"
        raise ValueError(f"{CONFIG} must hold numbers as `lora_alpha` and in `alpha_pattern`, got {got}")
    for pattern in alphas:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{CONFIG} must hold patterns of names in `alpha_pattern`, got {pattern!r}") from error
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _sorted(
    model: nn.Module, config: dict[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Of the file the factors, scaled, and the whole tensors, by the model's names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs: dict[str, Pair] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        name = f"{layer}.weight" if kind else layer.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name not in named:
            raise ValueError(
                f"the adapter must fit the model, got {key!r} of shape {tuple(tensor.shape)} and no {name!r}"
            )
        if not kind:
            if tensor.shape != named[name].shape:
                got = f"{key!r} of shape {tuple(tensor.shape)} for {tuple(named[name].shape)}"
                raise ValueError(f"the adapter must fit the model, got {got}")
            whole[name] = tensor
        elif kind.removesuffix(".weight") in ("A", "embedding_A"):
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in weights:
                raise ValueError(f"the adapter must hold both factors of every layer, got none called {other!r}")
            pairs[name] = Pair(
                weights[other].flatten(1).float() * _scale(config, layer, tensor.shape[0]), tensor.float()
            )
    return _once(model, pairs), whole


def _once(model: nn.Module, pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Of tied weights the first name, if all of its layers are adapted alike: here they have but one weight."""
    found, aliases = {}, aliases_of(model)
    for name, pair in pairs.items():
        first, shape = aliases[name][0], tuple(model.get_parameter(name).shape)
        factors = factors_of(model, name, pair, shape)
        for other in aliases[name]:
            own = factors_of(model, other, pairs[other], shape) if other in pairs else None
            if own is None or not all(map(torch.equal, own, factors)):
                raise ValueError(
                    f"the adapter must be the same for tied weights, got another for {other!r} than {name!r}"
                )
        found[first] = pairs[first]
    return found


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    found = next((alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer)), None)
    alpha: float = config["lora_alpha"] if found is None else found
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

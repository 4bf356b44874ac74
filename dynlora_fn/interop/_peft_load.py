"""Load LoRA adapters of PEFT."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_module, check_path
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import Factors, FrozenTensor, LowRank, Param
from dynlora_fn.interop._init import init
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, Pair, aliases_of, factors_of
from dynlora_fn.interop._safetensors import open_weights, read_json

_REFUSED = ("use_dora", "lora_bias", "use_qalora", "layer_replication", "trainable_token_indices", "target_parameters")


def load_adapter(
    model: nn.Module, folder: Path | str, *, seed: int, dtype: torch.dtype = torch.float32, stack: bool = True
) -> dict[str, Param]:
    """Return the parameters of a model with a PEFT LoRA adapter as their factors.

    `call` with them gives the logits of PEFT's model. The weights of the model become the bases::

        weight = base + b @ a / rank,    b = alpha * B (alpha * sqrt(rank) * B with rslora),  a = A

    Args:
        model: The model that the adapter was made for. It is not changed.
        folder: The folder with adapter_model.safetensors and adapter_config.json.
        seed: The seed of the bases from which later switches draw, as in `init`.
        dtype: The dtype of the factors, as in `init`.
        stack: Whether repeated weights are stacked, as in `init`.

    Returns:
        The parameters, as `init` returns them.

    Raises:
        ValueError: If the adapter is not plain LoRA, or does not fit the model. The message gives both shapes.
        ImportError: If the extra `files` is not installed.

    Example:
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> model, folder = nn.Sequential(nn.Linear(6, 4)), tempfile.mkdtemp()
        >>> params = dl.init(model, rank=2, seed=0, targets=["0.weight"])
        >>> _ = dl.interop.save_adapter(model, params, folder, original=model.state_dict())
        >>> load_adapter(model, folder, seed=0)["0.weight"].factors.b.shape
        torch.Size([4, 2])
    """
    check_module("model", model)
    check_path("folder", folder)
    folder = Path(folder)
    config, weights = _read_config(folder), dict(open_weights(folder / WEIGHTS))
    pairs, dense = _pairs_and_dense(model, config, weights)
    ranks = {name: pair.down.shape[0] for name, pair in pairs.items()}
    originals = {name: parameter.detach() for name, parameter in model.named_parameters()}
    params = init(model, rank=ranks, seed=seed, targets=list(ranks), start="lora", dtype=dtype, stack=stack)
    for pattern, param in params.items():
        if isinstance(param, LowRank):
            names = list(unstack({pattern: param}))
            factors = [factors_of(model, name, pairs[name], tuple(originals[name].shape)) for name in names]
            b, a = (torch.stack(side).to(dtype) for side in zip(*factors, strict=True))
            shapes = param.factors.b.shape, param.factors.a.shape
            params[pattern] = param._replace(factors=Factors(b.reshape(shapes[0]), a.reshape(shapes[1])))
        else:
            names = list(unstack({pattern: param}))
            if isinstance(param, FrozenTensor) and not dense.keys() & names:
                continue
            members = [dense.get(name, originals[name]).to(originals[name].dtype) for name in names]
            tensor = torch.stack(members).reshape(param.shape)
            params[pattern] = FrozenTensor(tensor) if isinstance(param, FrozenTensor) else tensor
    return params


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"`folder` has no {CONFIG} in {str(folder)!r}; pass the folder of a PEFT adapter")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`folder` has an adapter of type {config.get('peft_type')!r}; pass one of type 'LORA'")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(
                f"the adapter has {name} = {config[name]!r}, which is not plain LoRA; merge it into the model with PEFT"
            )
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(map(_is_number, (config.get("lora_alpha"), *alphas.values()))):
        raise ValueError(
            f"{CONFIG} has {config.get('lora_alpha')!r} as `lora_alpha` and {alphas!r} as `alpha_pattern`; use numbers"
        )
    for pattern in alphas:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"{CONFIG} has {pattern!r} in `alpha_pattern`; use regular expressions of layer names"
            ) from error
    return config


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _pairs_and_dense(
    model: nn.Module, config: dict[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Return the scaled factors and the dense tensors of a file, by the names of the model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs: dict[str, Pair] = {}
    dense: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        name = f"{layer}.weight" if kind else layer.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name not in parameters:
            raise ValueError(
                f"the adapter has {key!r} of shape {tuple(tensor.shape)}, but the model has no {name!r}; "
                "load it into the model that it was made for"
            )
        if not kind:
            if tensor.shape != parameters[name].shape:
                raise ValueError(
                    f"the adapter has shape {tuple(tensor.shape)} for {key!r}, but the model has "
                    f"{tuple(parameters[name].shape)}; load it into the model that it was made for"
                )
            dense[name] = tensor
        elif kind.removesuffix(".weight") in ("A", "embedding_A"):
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in weights:
                raise ValueError(f"the adapter has {key!r} but no {other!r}; write both factors of every layer")
            pairs[name] = Pair(
                weights[other].flatten(1).float() * _scale(config, layer, tensor.shape[0]), tensor.float()
            )
    return _merge_tied(model, pairs), dense


def _merge_tied(model: nn.Module, pairs: dict[str, Pair]) -> dict[str, Pair]:
    """Keep the first name of tied weights, whose layers must all have the same factors.

    PEFT adapts each layer; in `params` a tied weight is one parameter.
    """
    merged, aliases = {}, aliases_of(model)
    for name, pair in pairs.items():
        first, shape = aliases[name][0], tuple(model.get_parameter(name).shape)
        factors = factors_of(model, name, pair, shape)
        for other in aliases[name]:
            other_factors = factors_of(model, other, pairs[other], shape) if other in pairs else None
            if other_factors is None or not all(map(torch.equal, other_factors, factors)):
                raise ValueError(
                    f"the adapter has different factors for the tied weights {other!r} and {name!r}; "
                    "adapt both alike, or untie them in the model"
                )
        merged[first] = pairs[first]
    return merged


def _scale(config: dict[str, Any], layer: str, rank: int) -> float:
    alphas = config.get("alpha_pattern") or {}
    matching = next((alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", layer)), None)
    alpha: float = config["lora_alpha"] if matching is None else matching
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

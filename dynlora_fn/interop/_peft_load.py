"""Load LoRA adapters of PEFT."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dynlora_fn._core._check import check_dtype, check_module, check_path
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import AnyFactors, FrozenTensor, LowRank, Param
from dynlora_fn.interop._init import init
from dynlora_fn.interop._peft_alphas import alphas
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, Pair, aliases_of, factors_of
from dynlora_fn.interop._safetensors import Weights, open_weights, read_json


class PairInFile(NamedTuple):
    """The keys of the factors of one layer, which are read when they are needed."""

    up: str
    down: str
    alpha: float  # the product is multiplied by alpha / rank

    def read(self, weights: Weights) -> Pair:
        """Read the factors, in float32."""
        return Pair(weights[self.up].flatten(1).float(), weights[self.down].float())

    def entries(self, weights: Weights) -> int:
        """Return the number of entries of both factors."""
        return sum(math.prod(weights.shape(key)) for key in (self.up, self.down))

    def on_meta(self, weights: Weights) -> Pair:
        """Return the factors without data."""
        up, down = (torch.empty(weights.shape(key), device="meta") for key in (self.up, self.down))
        return Pair(up.flatten(1), down)


_REFUSED = ("use_dora", "lora_bias", "use_qalora", "layer_replication", "trainable_token_indices", "target_parameters")


def load_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
    progress: Progress | None = None,
) -> dict[str, Param]:
    """Return the parameters of a model with a PEFT LoRA adapter as their factors.

    `call` with them gives the logits of PEFT's model. The weights of the model become the bases, and the factors are
    those of the file, bit for bit::

        weight = base + alpha / rank * b @ a,    b = B,  a = A

    Alpha is that of the layer in the file, with rslora times ``sqrt(rank)``. So gradients are PEFT's, and an optimizer
    makes PEFT's step at the same rate: `adamw` with `factor_decay` as `torch.optim.AdamW` with `weight_decay`, any
    optimizer written by hand, and after clipping by norm. `save_adapter` writes factors and alpha back.

    Args:
        model: The model that the adapter was made for. It is not changed.
        folder: The folder with adapter_model.safetensors and adapter_config.json.
        seed: The seed of the bases from which later switches draw, as in `init`.
        dtype: The dtype of the factors, as in `init`.
        stack: Whether repeated weights are stacked, as in `init`.
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

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
    check_dtype("dtype", dtype)
    check_progress(progress)
    folder = Path(folder)
    config = _read_config(folder)
    with open_weights(folder / WEIGHTS) as weights:
        pairs, dense = _pairs_and_dense(model, config, weights)
        ranks = {name: weights.shape(pair.down)[0] for name, pair in pairs.items()}
        alpha_by_name = {name: pair.alpha for name, pair in pairs.items()}
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        factor_bytes = sum(pair.entries(weights) * dtype.itemsize for pair in pairs.values())
        report = reporter(progress, model_bytes + factor_bytes)
        kinds: dict[str, Any] = {"rank": ranks, "alpha": alpha_by_name, "start": "lora", "dtype": dtype, "stack": stack}
        params = init(model, seed=seed, targets=list(ranks), **kinds)
        report(model_bytes)
        originals = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for pattern, param in params.items():
            names = list(unstack({pattern: param}))
            if isinstance(param, LowRank):
                params[pattern] = param._replace(factors=_read_factors(model, weights, pairs, names, param.factors))
                report(sum(pairs[name].entries(weights) * dtype.itemsize for name in names))
            elif not dense.keys().isdisjoint(names):
                members = [weights[dense[name]] if name in dense else originals[name] for name in names]
                tensor = torch.stack([member.to(originals[names[0]].dtype) for member in members]).reshape(param.shape)
                params[pattern] = FrozenTensor(tensor) if isinstance(param, FrozenTensor) else tensor
    return params


def _read_factors(
    model: nn.Module, weights: Weights, pairs: Mapping[str, PairInFile], names: list[str], like: AnyFactors
) -> AnyFactors:
    """Return the factors of a stack of weights, or of one."""
    read = [
        factors_of(model, name, pairs[name].read(weights), tuple(model.get_parameter(name).shape)) for name in names
    ]
    b, a = (torch.stack(side).to(like.b.dtype) for side in zip(*read, strict=True))
    return like._replace(b=b.reshape(like.b.shape), a=a.reshape(like.a.shape))


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
    model: nn.Module, config: dict[str, Any], weights: Weights
) -> tuple[dict[str, PairInFile], dict[str, str]]:
    """Return where the factors and the dense tensors of a file are, by the names of the model."""
    parameters, alpha_of = dict(model.named_parameters(remove_duplicate=False)), alphas(config)
    pairs: dict[str, PairInFile] = {}
    dense: dict[str, str] = {}
    for key in weights:
        layer, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        name = f"{layer}.weight" if kind else layer.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if name not in parameters:
            raise ValueError(
                f"the adapter has {key!r} of shape {weights.shape(key)}, but the model has no {name!r}; "
                "load it into the model that it was made for"
            )
        if not kind:
            if weights.shape(key) != parameters[name].shape:
                raise ValueError(
                    f"the adapter has shape {weights.shape(key)} for {key!r}, but the model has "
                    f"{tuple(parameters[name].shape)}; load it into the model that it was made for"
                )
            dense[name] = key
        elif kind.removesuffix(".weight") in ("A", "embedding_A"):
            other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
            if other not in weights:
                raise ValueError(f"the adapter has {key!r} but no {other!r}; write both factors of every layer")
            rank = weights.shape(key)[0]
            alpha = alpha_of(layer) * (math.sqrt(rank) if config.get("use_rslora") else 1)
            pairs[name] = PairInFile(up=other, down=key, alpha=alpha)
            # Shapes are checked before anything is computed.
            factors_of(model, name, pairs[name].on_meta(weights), tuple(parameters[name].shape))
    return _merge_tied(model, weights, pairs), dense


def _merge_tied(model: nn.Module, weights: Weights, pairs: dict[str, PairInFile]) -> dict[str, PairInFile]:
    """Keep the first name of tied weights, whose layers must all have the same factors.

    PEFT adapts each layer; in `params` a tied weight is one parameter.
    """
    merged, aliases = {}, aliases_of(model)
    for name, pair in pairs.items():
        first = aliases[name][0]
        merged[first] = pairs.get(first, pair)
        if len(aliases[name]) == 1:
            continue
        shape = tuple(model.get_parameter(name).shape)
        factors = factors_of(model, name, pair.read(weights), shape)
        for other in aliases[name]:
            others = factors_of(model, other, pairs[other].read(weights), shape) if other in pairs else None
            is_alike = others is not None and pairs[other].alpha == pair.alpha
            if others is None or not is_alike or not all(map(torch.equal, others, factors)):
                raise ValueError(
                    f"the adapter has different factors for the tied weights {other!r} and {name!r}; "
                    "adapt both alike, or untie them in the model"
                )
    return merged

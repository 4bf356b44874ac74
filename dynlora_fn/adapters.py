"""LoRA adapters of PEFT, in and out: adapter_model.safetensors and adapter_config.json.

PEFT's weight is ``weight + alpha / rank * B @ A`` (``alpha / sqrt(rank)`` with rslora), with A at the layer's input.
The scale here is always ``1 / rank``, and so whatever differs is multiplied into `b`.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn.export import state_dict
from dynlora_fn.files import open_weights, save_merged, save_weights
from dynlora_fn.initial import init
from dynlora_fn.stacking import unstack
from dynlora_fn.types import Factors, LowRank, Param, Params
from dynlora_fn.views import ROWS, View, dense, view_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_REFUSED = ("use_dora", "lora_bias", "use_qalora", "layer_replication", "trainable_token_indices", "target_parameters")


class Pair(NamedTuple):
    """``up @ down`` is added to a weight as its layer has it, (out, in), or (rows of an embedding's weight).T."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)


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
            factors = [_factors(model, name, pairs[name], tuple(own[name].shape)) for name in names]
            b, a = (torch.stack(side).to(dtype) for side in zip(*factors, strict=True))
            shapes = param.factors.b.shape, param.factors.a.shape
            params[pattern] = param._replace(factors=Factors(b.reshape(shapes[0]), a.reshape(shapes[1])))
        else:
            names = list(unstack({pattern: param}))
            members = [whole.get(name, own[name]).to(own[name].dtype) for name in names]
            params[pattern] = torch.stack(members).reshape(param.shape)
    return params


def save_adapter(
    model: nn.Module,
    params: Params,
    folder: Path | str,
    *,
    original: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Writes a PEFT LoRA adapter, which only means something beside the weights that it is added to.

    Without `original`, the factors as they are, and the bases with all else as a model in ``folder/base``. Given the
    weights that the model once had, the adapter is what has come of them: of each low-rank weight the whole change,
    switches and merges included, as its truncated singular value decomposition; of all else, whatever has changed.

    Args:
        model: as for `call`; looked at for the kinds of its layers.
        params: of `nn.Linear`, `nn.Embedding`, convolutions without groups, and Hugging Face's Conv1D, fused or not.
        folder: is made if it is not there.
        original: state dict of the model that the adapter is for.
        rank: of the decompositions; the parameter's own unless given. At twice the number of vectors that were ever in
            a slot nothing is lost.

    Returns:
        The relative error of each low-rank weight's change, in the Frobenius norm; zeros without `original`.

    Raises:
        ValueError: if a parameter is of a layer that PEFT has no adapter for, or its change cannot be told apart.
    """
    if rank is not None and original is None:
        raise ValueError(f"`rank` must come with `original`, for the factors are written as they are, got {rank}")
    folder, pairs, errors = Path(folder), {}, {}
    aliases = _aliases(model)
    for name, param in unstack(params).items():
        if isinstance(param, LowRank):
            view = view_of(name, param, model.get_parameter(name).shape)
            pair, errors[name] = _pair(view) if original is None else _change(view, original, rank)
            pairs.update({other: _as_layer(model, other, pair, view.shape) for other in aliases[name]})
    entries = {key: tensor for name, pair in pairs.items() for key, tensor in _entries(model, name, pair).items()}
    config = _config(model, pairs)
    if original is None:
        save_merged(model, {name: _without_product(param) for name, param in params.items()}, folder / "base")
        config["base_model_name_or_path"] = str(folder / "base")
    else:
        entries |= _changed_whole(model, state_dict(model, params), original, pairs, config)
    save_weights(entries, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return errors


def _without_product(param: Param) -> Param:
    if not isinstance(param, LowRank):
        return param
    return param._replace(factors=param.factors._replace(b=torch.zeros_like(param.factors.b)))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {name: [other for other in named if named[other] is named[name]] for name in named}


# A layer's own names and shapes.


def _kind(model: nn.Module, name: str) -> str:
    """Of a layer that PEFT adapts, by what it is; "transposed" has its weight as (in, out)."""
    prefix, _, own = name.rpartition(".")
    layer = model.get_submodule(prefix)
    if own == "weight":
        if isinstance(layer, nn.Linear):
            return "linear"
        if isinstance(layer, nn.Embedding):
            return "embedding"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1:
            return "convolution"
        if type(layer).__name__ == "Conv1D":
            return "transposed"
    got = f"{name!r} of {type(layer).__name__}" + (" in groups" if getattr(layer, "groups", 1) > 1 else "")
    raise ValueError(f"`params` must be of layers that PEFT has LoRA for, got {got}")


def _as_layer(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Pair:
    """The factors of a parameter as PEFT has them for its layer."""
    up, down = pair
    kind = _kind(model, name)
    if kind in ("embedding", "transposed"):
        return Pair(down.mT, up.mT)
    return Pair(up, down.reshape(-1, *shape[1:])) if kind == "convolution" else pair


def _factors(model: nn.Module, name: str, pair: Pair, shape: tuple[int, ...]) -> Factors:
    """The way back, with the scale, which `pair` has in it, out of `b`."""
    up, down = pair
    if _kind(model, name) in ("embedding", "transposed"):
        up, down = down.mT, up.mT
    down = down.flatten(1)
    if (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
        got = f"{name!r} with factors of {tuple(pair.up.shape)} and {tuple(pair.down.shape)} for {shape}"
        raise ValueError(f"the adapter must fit the model, got {got}")
    return Factors(b=up * down.shape[0], a=down)


def _entries(model: nn.Module, name: str, pair: Pair) -> dict[str, Tensor]:
    kind, layer = _kind(model, name), _PREFIX + name.rpartition(".")[0]
    if kind == "embedding":
        return {f"{layer}.lora_embedding_A": pair.down, f"{layer}.lora_embedding_B": pair.up}
    up = pair.up
    if kind == "convolution":
        up = up.reshape(*up.shape, *(1 for _ in pair.down.shape[2:]))
    return {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": up}


# Out.


def _pair(view: View) -> tuple[Pair, float]:
    """``up @ down`` for ``b @ a / rank``; for parts of a fused weight side by side, of all of their ranks together."""
    ups = [part.factors.b.float() / part.factors.b.shape[-1] for part in view.parts]
    downs = [part.factors.a.float() for part in view.parts]
    if view.parts[0].seed.ndim:
        raise ValueError(f"`params` must be of layers that PEFT has LoRA for, got the stack {view.name!r}")
    if view.axis == ROWS:
        return Pair(_block_diagonal(ups), torch.cat(downs)), 0.0
    return Pair(torch.cat(ups, dim=1), _block_diagonal(downs)), 0.0


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    whole: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _change(view: View, original: Mapping[str, Tensor], rank: int | None) -> tuple[Pair, float]:
    own = original.get(view.name)
    if own is None or tuple(own.shape) != view.shape:
        got = "none" if own is None else f"shape {tuple(own.shape)}"
        raise ValueError(f"`original` must fit the model, got {got} for {view.name!r} of shape {view.shape}")
    change = (dense(view).double() - own.to(view.parts[0].factors.b.device).double()).flatten(1)
    rank = min(rank or sum(part.factors.b.shape[-1] for part in view.parts), *change.shape)
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    root = s[:rank].sqrt()
    error = (s[rank:].norm() / s.norm().clamp(min=torch.finfo(s.dtype).tiny)).item()
    return Pair((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float()), error


def _changed_whole(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    pairs: Mapping[str, Pair],
    config: dict[str, Any],
) -> dict[str, Tensor]:
    """What is not low-rank and differs from the original: biases of adapted layers, and other layers as a whole."""
    adapted = {name.rpartition(".")[0] for name in pairs}
    parents = {layer[: match.start()] for layer in adapted for match in re.finditer(r"\.", layer)} | {""}
    found, layers = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in pairs:
            continue
        if name not in original or original[name].shape != parameter.shape:
            got = f"shape {tuple(original[name].shape)}" if name in original else "none"
            raise ValueError(f"`original` must fit the model, got {got} for {name!r} of {tuple(parameter.shape)}")
        if torch.equal(weights[name], original[name].to(weights[name])):
            continue
        layer, _, own = name.rpartition(".")
        if layer in adapted and own == "bias":
            found[f"{_PREFIX}{layer}.base_layer.bias"] = weights[name]
            config["bias"] = "all"
        elif layer in adapted | parents:
            raise ValueError(f"`params` must have changed in layers that PEFT can save alone, got {name!r}")
        else:
            layers.add(layer)
    found |= {_PREFIX + name: weight for name, weight in weights.items() if name.rpartition(".")[0] in layers}
    config["modules_to_save"] = sorted(layers) or None
    return found


def _config(model: nn.Module, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """With alpha equal to the rank: the scale is in `b`. Names are matched as a whole, by a regular expression."""
    ranks = {name.rpartition(".")[0]: pair.up.shape[1] for name, pair in pairs.items()}
    if not ranks:
        raise ValueError("`params` must hold a low-rank weight to be an adapter, got none")
    most = max(ranks.values())
    others = {re.escape(layer): rank for layer, rank in ranks.items() if rank != most}
    return {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": "|".join(re.escape(layer) for layer in ranks),
        "fan_in_fan_out": any(_kind(model, name) == "transposed" for name in pairs),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }


# In.


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"`folder` must hold {CONFIG}, got {str(folder)!r}")
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`folder` must hold an adapter of type 'LORA', got {config.get('peft_type')!r}")
    for name in _REFUSED:
        if config.get(name):
            raise ValueError(f"the adapter must be plain LoRA, got {name} = {config[name]!r}")
    return config


def _sorted(
    model: nn.Module, config: dict[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Of the file the factors, scaled, and the whole tensors, by the model's names."""
    named = dict(model.named_parameters(remove_duplicate=False))
    pairs: dict[str, Pair] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        layer, _, kind = key.removeprefix(_PREFIX).partition(".lora_")
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
    found, aliases = {}, _aliases(model)
    for name, pair in pairs.items():
        first, shape = aliases[name][0], tuple(model.get_parameter(name).shape)
        factors = _factors(model, name, pair, shape)
        for other in aliases[name]:
            own = _factors(model, other, pairs[other], shape) if other in pairs else None
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

"""LoRA adapters of PEFT, out."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, Pair, aliases_of, as_layer, kind_of_layer
from dynlora_fn.interop._safetensors import save_merged, save_weights
from dynlora_fn.interop._state_dict import state_dict
from dynlora_fn.nn._view import ROWS, View, dense, view_of


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
    aliases = aliases_of(model)
    for name, param in unstack(params).items():
        if isinstance(param, LowRank):
            view = view_of(name, param, model.get_parameter(name).shape)
            pair, errors[name] = _pair(view) if original is None else _change(view, original, rank)
            pairs.update({other: as_layer(model, other, pair, view.shape) for other in aliases[name]})
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


def _entries(model: nn.Module, name: str, pair: Pair) -> dict[str, Tensor]:
    kind, layer = kind_of_layer(model, name), PREFIX + name.rpartition(".")[0]
    if kind == "embedding":
        return {f"{layer}.lora_embedding_A": pair.down, f"{layer}.lora_embedding_B": pair.up}
    up = pair.up
    if kind == "convolution":
        up = up.reshape(*up.shape, *(1 for _ in pair.down.shape[2:]))
    return {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": up}


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
            found[f"{PREFIX}{layer}.base_layer.bias"] = weights[name]
            config["bias"] = "all"
        elif layer in adapted | parents:
            raise ValueError(f"`params` must have changed in layers that PEFT can save alone, got {name!r}")
        else:
            layers.add(layer)
    found |= {PREFIX + name: weight for name, weight in weights.items() if name.rpartition(".")[0] in layers}
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
        "fan_in_fan_out": any(kind_of_layer(model, name) == "transposed" for name in pairs),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }

"""Save parameters as LoRA adapters of PEFT."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_integer, check_module, check_path
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.interop._arguments import check_tensors
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, Pair, aliases_of, as_layer, kind_of_layer
from dynlora_fn.interop._save import save_merged, save_weights
from dynlora_fn.interop._state_dict import state_dict
from dynlora_fn.interop._truncated_svd import truncated_svd
from dynlora_fn.nn._view import ROWS, View, dense, gathered, view_of


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    params: Params,
    folder: Path | str,
    *,
    original: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
) -> dict[str, float]:
    """Write a PEFT LoRA adapter, and return the error of each weight.

    Without `original`, the factors are written unchanged. The bases and all other parameters are written as a model in
    ``folder/base``, and the adapter only applies to that model.

    With `original`, the adapter applies to those weights. For each low-rank weight it contains the full change,
    switches and merges included, as its truncated singular value decomposition. Other parameters are written if they
    changed.

    Args:
        model: The model, as for `call`. The kinds of its layers are read.
        params: The parameters. Low-rank ones belong to `nn.Linear`, `nn.Embedding`, convolutions without groups, or
            Conv1D of Hugging Face, fused or not.
        folder: The folder, which is created if it does not exist.
        original: The state dict of the model that the adapter is for. Default None writes the factors.
        rank: The rank of the decompositions. Default None means the rank of each parameter. Nothing is lost at twice
            the number of vectors that were ever in a slot.

    Returns:
        The relative error of the change of each low-rank weight in the Frobenius norm; zeros without `original`.

    Raises:
        ValueError: If PEFT has no adapter for the layer of a low-rank parameter, if a parameter changed that PEFT
            cannot save, or if `original` does not fit the model.
        ImportError: If the extra `files` is not installed.

    Numerics: The change is formed and decomposed in float64, and written in float32. Only the vectors of `rank` are
        computed. The error is the norm of what is cut, and exceeds that of a full decomposition by at most 1e-7 of it.

    Example:
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> params = dl.init(model, rank=2, seed=0, targets=["0.weight"])
        >>> save_adapter(model, params, tempfile.mkdtemp())
        {'0.weight': 0.0}
    """
    check_module("model", model)
    check_path("folder", folder)
    if original is not None:
        check_tensors("original", original)
    if rank is not None:
        check_integer("rank", rank, least=1)
    if rank is not None and original is None:
        raise ValueError(
            f"`rank` is {rank} without `original`, but then the factors are written unchanged; pass `original` too"
        )
    folder, pairs, errors = Path(folder), {}, {}
    aliases = aliases_of(model)
    for name, param in unstack(params).items():
        if name not in aliases:
            raise ValueError(f"`params` has {name!r}, which the model does not have; make `params` from this model")
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
        entries |= _changed_dense(model, state_dict(model, params), original, pairs, config)
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
    """Return ``up @ down = b @ a / rank``. The rank of a fused weight is the sum of the ranks of its parts."""
    view = gathered(view)
    ups = [part.factors.b.float() / part.factors.b.shape[-1] for part in view.parts]
    downs = [part.factors.a.float() for part in view.parts]
    if view.parts[0].seed.ndim:
        raise ValueError(
            f"`params` has the stack {view.name!r}, for which PEFT has no LoRA; write the model with `save_merged`"
        )
    if view.axis == ROWS:
        return Pair(_block_diagonal(ups), torch.cat(downs)), 0.0
    return Pair(torch.cat(ups, dim=1), _block_diagonal(downs)), 0.0


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _change(view: View, original: Mapping[str, Tensor], rank: int | None) -> tuple[Pair, float]:
    """Return the change of a weight as two factors of a rank, and the relative error of cutting it to that rank."""
    before = original.get(view.name)
    if before is None or tuple(before.shape) != view.shape:
        found = "nothing" if before is None else f"shape {tuple(before.shape)}"
        raise ValueError(
            f"`original` has {found} for {view.name!r} of shape {view.shape}; pass the state dict of this model"
        )
    change = dense(view).double()
    change -= before.to(change.device)
    change = change.flatten(1)
    norm = change.norm()
    if not norm.isfinite():
        raise ValueError(
            f"`params` or `original` has {view.name!r} with entries that are not finite; use weights of a step before"
        )
    rank = min(rank or sum(part.factors.b.shape[-1] for part in view.parts), *change.shape)
    u, s, vh = truncated_svd(change, rank)
    change.addmm_(u * s, vh, alpha=-1)
    error = (change.norm() / norm.clamp(min=torch.finfo(norm.dtype).tiny)).item()
    root = s.sqrt()
    return Pair((u * root).float(), (root[:, None] * vh).float()), error


def _changed_dense(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    pairs: Mapping[str, Pair],
    config: dict[str, Any],
) -> dict[str, Tensor]:
    """Return the parameters that are not low-rank and differ from the original, and enter them into `config`.

    Those are biases of adapted layers, and all parameters of other layers.
    """
    adapted = {name.rpartition(".")[0] for name in pairs}
    parents = {layer[: match.start()] for layer in adapted for match in re.finditer(r"\.", layer)} | {""}
    changed, layers = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in pairs:
            continue
        if name not in original or original[name].shape != parameter.shape:
            found = f"shape {tuple(original[name].shape)}" if name in original else "nothing"
            raise ValueError(
                f"`original` has {found} for {name!r} of shape {tuple(parameter.shape)}; "
                "pass the state dict of this model"
            )
        if torch.equal(weights[name], original[name].to(weights[name])):
            continue
        layer, _, leaf_name = name.rpartition(".")
        if layer in adapted and leaf_name == "bias":
            changed[f"{PREFIX}{layer}.base_layer.bias"] = weights[name]
            config["bias"] = "all"
        elif layer in adapted | parents:
            raise ValueError(
                f"`params` has a changed {name!r}, which PEFT cannot save beside an adapter; "
                "freeze it, or write the model with `save_merged`"
            )
        else:
            layers.add(layer)
    changed |= {PREFIX + name: weight for name, weight in weights.items() if name.rpartition(".")[0] in layers}
    config["modules_to_save"] = sorted(layers) or None
    return changed


def _config(model: nn.Module, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Return PEFT's configuration, with alpha equal to the rank, since the scale is in `b`.

    `target_modules` is a regular expression, which PEFT matches against full names.
    """
    ranks = {name.rpartition(".")[0]: pair.up.shape[1] for name, pair in pairs.items()}
    if not ranks:
        raise ValueError("`params` has no low-rank weight to write as an adapter; make them with `init` and `targets`")
    largest = max(ranks.values())
    smaller = {re.escape(layer): rank for layer, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": "|".join(re.escape(layer) for layer in ranks),
        "fan_in_fan_out": any(kind_of_layer(model, name) == "transposed" for name in pairs),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }

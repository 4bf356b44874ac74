"""Save parameters as LoRA adapters of PEFT."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_integer, check_module, check_path
from dynlora_fn._core._progress import Progress, check_progress
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.interop._arguments import check_tensors
from dynlora_fn.interop._lazy import LazyTensor, bytes_of
from dynlora_fn.interop._peft_factors import AdapterFactors
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, aliases_of, kind_of_layer
from dynlora_fn.interop._save import part_of, save_merged, write
from dynlora_fn.interop._state_dict import lazy_state_dict


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    params: Params,
    folder: Path | str,
    *,
    original: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write a PEFT LoRA adapter, and return the error of each weight.

    Without `original`, factors and alpha are written unchanged, so that `load_adapter` returns them bit for bit. The
    bases and all other parameters are written as a model in ``folder/base``, and the adapter only applies to that one.

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
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

    Returns:
        The relative error of the change of each low-rank weight in the Frobenius norm; zeros without `original`.

    Raises:
        ValueError: If PEFT has no adapter for the layer of a low-rank parameter, if a parameter changed that PEFT
            cannot save, or if `original` does not fit the model.
        ImportError: If the extra `files` is not installed.

    Numerics: The change is formed and decomposed in float64, and written in float32. Only the vectors of `rank` are
        computed. The error is the norm of what is cut. A full
        decomposition would lower it by at most 1e-7 of it.

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
        rank = check_integer("rank", rank, least=1)
    if rank is not None and original is None:
        raise ValueError(
            f"`rank` is {rank} without `original`, but then the factors are written unchanged; pass `original` too"
        )
    check_progress(progress)
    folder, aliases, factors = Path(folder), aliases_of(model), AdapterFactors(model, original, rank)
    for name, param in unstack(params).items():
        if name not in aliases:
            raise ValueError(f"`params` has {name!r}, which the model does not have; make `params` from this model")
        if isinstance(param, LowRank):
            factors.add(name, param, aliases[name])
    config = _config(model, factors.ranks, factors.alphas)
    if original is None:
        base = {name: _without_product(param) for name, param in params.items()}
        base_bytes, entries = bytes_of(lazy_state_dict(model, base)), factors.entries
    else:
        base_bytes, entries = 0, factors.entries | _changed_dense(model, params, original, factors.ranks, config)
    total = base_bytes + bytes_of(entries)
    if original is None:
        save_merged(model, base, folder / "base", progress=part_of(progress, 0, total))
        config["base_model_name_or_path"] = str(folder / "base")
    write(entries, folder / WEIGHTS, metadata={"format": "pt"}, progress=part_of(progress, base_bytes, total))
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return factors.errors


def _without_product(param: Param) -> Param:
    if not isinstance(param, LowRank):
        return param
    return param._replace(factors=param.factors._replace(b=torch.zeros_like(param.factors.b)))


def _changed_dense(
    model: nn.Module,
    params: Params,
    original: Mapping[str, Tensor],
    adapted: Collection[str],
    config: dict[str, Any],
) -> dict[str, LazyTensor]:
    """Return the parameters that are not low-rank and differ from the original, and enter them into `config`.

    Those are biases of adapted layers, and all parameters of other layers.
    """
    weights = lazy_state_dict(model, params)
    adapted_layers = {name.rpartition(".")[0] for name in adapted}
    parents = {layer[: match.start()] for layer in adapted_layers for match in re.finditer(r"\.", layer)} | {""}
    changed, layers = {}, set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in adapted:
            continue
        before = original.get(name)
        if before is None or before.shape != parameter.shape:
            found = "nothing" if before is None else f"shape {tuple(before.shape)}"
            raise ValueError(
                f"`original` has {found} for {name!r} of shape {tuple(parameter.shape)}; "
                "pass the state dict of this model"
            )
        weight = weights[name].read()
        if torch.equal(weight, before.to(weight)):
            continue
        layer, _, leaf_name = name.rpartition(".")
        if layer in adapted_layers and leaf_name == "bias":
            changed[f"{PREFIX}{layer}.base_layer.bias"] = weights[name]
            config["bias"] = "all"
        elif layer in adapted_layers | parents:
            raise ValueError(
                f"`params` has a changed {name!r}, which PEFT cannot save beside an adapter; "
                "freeze it, or write the model with `save_merged`"
            )
        else:
            layers.add(layer)
    changed |= {PREFIX + name: weight for name, weight in weights.items() if name.rpartition(".")[0] in layers}
    config["modules_to_save"] = sorted(layers) or None
    return changed


def _config(model: nn.Module, rank_by_name: Mapping[str, int], alpha_by_name: Mapping[str, float]) -> dict[str, Any]:
    """Return PEFT's configuration.

    `target_modules` is a regular expression, which PEFT matches against full names.
    """
    ranks = {name.rpartition(".")[0]: rank for name, rank in rank_by_name.items()}
    if not ranks:
        raise ValueError("`params` has no low-rank weight to write as an adapter; make them with `init` and `targets`")
    largest = max(ranks.values())
    alphas = {name.rpartition(".")[0]: _plain(alpha) for name, alpha in alpha_by_name.items()}
    usual = next(alphas[layer] for layer, rank in ranks.items() if rank == largest)
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": usual,
        "rank_pattern": {re.escape(layer): rank for layer, rank in ranks.items() if rank != largest},
        "alpha_pattern": {re.escape(layer): alpha for layer, alpha in alphas.items() if alpha != usual},
        "target_modules": "|".join(re.escape(layer) for layer in ranks),
        "fan_in_fan_out": any(kind_of_layer(model, name) == "transposed" for name in rank_by_name),
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }


def _plain(alpha: float) -> float:
    """Return an integer where a number is one, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha

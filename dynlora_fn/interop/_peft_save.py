"""Save parameters as LoRA adapters of PEFT."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_flag, check_integer, check_module, check_path
from dynlora_fn._core._progress import Progress, check_progress
from dynlora_fn._core._stacking import member_names, unstack
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.interop._arguments import check_tensors
from dynlora_fn.interop._folder import filled
from dynlora_fn.interop._lazy import bytes_of
from dynlora_fn.interop._peft_dense import dense_changes
from dynlora_fn.interop._peft_factors import AdapterFactors, without_product
from dynlora_fn.interop._peft_layers import CONFIG, PREFIX, WEIGHTS, aliases_of, kind_of_layer
from dynlora_fn.interop._peft_names import ends_of
from dynlora_fn.interop._peft_parameters import check_names
from dynlora_fn.interop._save import part_of, write
from dynlora_fn.interop._save_merged import save_merged
from dynlora_fn.interop._state_dict import lazy_state_dict


@torch.no_grad()
def save_adapter(
    model: nn.Module,
    params: Params,
    folder: Path | str,
    *,
    original: Mapping[str, Tensor] | None = None,
    rank: int | None = None,
    skip_unsupported: bool = False,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Write a PEFT LoRA adapter, and return the error of each weight.

    The files appear complete, or not at all. What was written is read back and compared first.

    Without `original`, factors and alpha are written unchanged, so `load_adapter` returns them bit for bit. The bases
    and all other parameters are written as a model in ``folder/base``, and the adapter applies only to that model.

    With `original`, the adapter applies to those weights. For each low-rank weight it contains the full change,
    switches and merges included, cut to `rank` by a singular value decomposition. Other tensors that changed are
    written too, also buffers such as running statistics. They are biases of adapted layers, and PEFT's
    `modules_to_save` for modules without adapted layers. PEFT cannot save changed tensors beside or above an adapted
    layer.

    Args:
        model: The model, as for `call`. The kinds of its layers are read.
        params: The parameters. Low-rank weights must belong to `nn.Linear`, `nn.Embedding`, convolutions without
            groups, Conv1D of Hugging Face, or fused attention (`in_proj_weight`), or be stacks of experts.
        folder: The folder, which is created if it does not exist.
        original: The state dict of the model that the adapter is for. Default None writes the factors.
        rank: The rank of the decompositions. Default None means the rank of each parameter. Nothing is lost at twice
            the number of vectors that were ever in a slot.
        skip_unsupported: Whether to leave out tensors that PEFT cannot save. With `original` such a tensor has the
            error 1. Without, the model in ``folder/base`` has it, and nothing is lost. Default False refuses it by
            name.
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

    Returns:
        The relative error of the change in the Frobenius norm, by the names of low-rank weights and of tensors that
        were left out. It is 0 for a weight that has not changed, and without `original`.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If PEFT has no adapter for the layer of a low-rank parameter, or cannot save a tensor that changed.
            The message says what to freeze. Also if `original` does not fit the model, or nothing differs from it.
        OSError: If the files, read back, have other tensors than were written.
        ImportError: If the extra `files` is not installed.

    Numerics: The change is computed and decomposed in float64, and written in float32. Where possible only the leading
        `rank` singular vectors are computed. The error is the norm of the part that is cut, at most 1 + 1e-7 times the
        least possible error.

    Example:
        >>> import tempfile
        >>> import dynlora_fn as dl
        >>> model = nn.Sequential(nn.Linear(6, 4))
        >>> params = dl.init(model, rank=2, seed=0, targets=["0.weight"])
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(model, params, folder)
        {'0.weight': 0.0}
        >>> base = dl.interop.open_weights(f"{folder}/base")
        >>> _ = model.load_state_dict(dict(base))  # the adapter applies to this model
        >>> loaded = dl.interop.load_adapter(model, folder, seed=0)
        >>> bool((loaded["0.weight"].factors.b == params["0.weight"].factors.b).all())
        True
    """
    folder, rank = _check_arguments(model, folder, original, rank, skip_unsupported, progress)
    aliases, weights, flat = aliases_of(model), lazy_state_dict(model, params), unstack(params)
    factors = AdapterFactors(model, original, rank)
    skipped = _add_layers(factors, flat, aliases, skip_unsupported=skip_unsupported)
    config, entries, base_bytes = _config(model, factors), factors.entries(), 0
    base = {
        name: without_product(param) if isinstance(param, LowRank) and name in factors.ranks else param
        for name, param in flat.items()
    }
    if original is None:
        base_bytes = bytes_of(lazy_state_dict(model, base))
        config["base_model_name_or_path"] = str(folder / "base")
    else:
        dense = dense_changes(model, weights, original, factors.ranks, skipped, aliases)
        if dense.lost and not skip_unsupported:
            _refuse(params, dense.lost, aliases)
        if not dense.entries:
            factors.check_changed()
        entries |= dense.entries
        config |= {"modules_to_save": dense.modules or None, "bias": "lora_only" if dense.has_biases else "none"}
        lost = [name for name in (*skipped, *dense.lost) if PREFIX + name not in entries]
        factors.errors.update(dict.fromkeys(lost, 1.0))
    total = base_bytes + bytes_of(entries)
    with filled(folder) as aside:
        if original is None:
            save_merged(model, base, aside / "base", progress=part_of(progress, 0, total))
        report = part_of(progress, base_bytes, total)
        write(entries, aside / WEIGHTS, metadata={"format": "pt"}, read_back=True, progress=report)
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return factors.errors


def _check_arguments(
    model: Any, folder: Any, original: Any, rank: Any, skip_unsupported: Any, progress: Any
) -> tuple[Path, int | None]:
    """Return the folder and the rank, or raise if an argument is wrong."""
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
    check_flag("skip_unsupported", skip_unsupported)
    check_progress(progress)
    return Path(folder), rank


def _add_layers(
    factors: AdapterFactors, flat: Params, aliases: Mapping[str, list[str]], *, skip_unsupported: bool
) -> list[str]:
    """Add the low-rank weights to the factors, and return the names of those left out.

    A weight is left out if PEFT has no LoRA for it and `skip_unsupported` is True. All of its names are returned.
    """
    skipped: list[str] = []
    for name, param in flat.items():
        if isinstance(param, LowRank):
            try:
                factors.check_layer(name, param, aliases[name])
            except ValueError:
                if not skip_unsupported:
                    raise
                skipped += aliases[name]
            else:
                factors.add(name, param, aliases[name])
    return skipped


def _refuse(params: Params, lost: Collection[str], aliases: Mapping[str, list[str]]) -> None:
    """Raise ValueError for tensors that PEFT cannot save.

    The message names parameters as `partition` takes them.
    """
    buffers = [name for name in lost if name not in aliases]
    owner = "`params`" if set(buffers) & params.keys() else "`model`"
    parameters = {alias for name in lost for alias in aliases.get(name, [])}
    names = [name for name, param in params.items() if not parameters.isdisjoint(member_names(name, param.shape))]
    owners = [f"`params` has a changed {', '.join(map(repr, names))}"] if names else []
    owners += [f"{owner} has a changed buffer {', '.join(map(repr, buffers))}"] if buffers else []
    freeze = f"freeze it with `partition(params, frozen={names})`, " if names else ""
    raise ValueError(
        f"{' and '.join(owners)}, which PEFT cannot save beside an adapter; {freeze}"
        "leave it out with `skip_unsupported=True`, or write the model with `save_merged`"
    )


def _config(model: nn.Module, factors: AdapterFactors) -> dict[str, Any]:
    """Return PEFT's configuration.

    `target_modules` is a regular expression, which PEFT matches against full names.
    """
    parameters = factors.parameters
    ranks = {_name_in_peft(name, parameters): rank for name, rank in factors.ranks.items()}
    if not ranks:
        raise ValueError("`params` has no low-rank weight to write as an adapter; make them with `init` and `targets`")
    check_names(model, parameters)
    largest, patterns = max(ranks.values()), _patterns(ranks)
    alphas = {_name_in_peft(name, parameters): _plain(alpha) for name, alpha in factors.alphas.items()}
    usual = next(alphas[layer] for layer, rank in ranks.items() if rank == largest)
    layers = [layer for layer in ranks if layer not in parameters]
    is_transposed = any(kind_of_layer(model, f"{layer}.weight") == "transposed" for layer in layers)
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": usual,
        "rank_pattern": {patterns[layer]: rank for layer, rank in ranks.items() if rank != largest},
        "alpha_pattern": {patterns[layer]: alpha for layer, alpha in alphas.items() if alpha != usual},
        "target_modules": "|".join(map(re.escape, layers)) or [],
        "target_parameters": sorted(parameters) or None,
        "fan_in_fan_out": is_transposed and not parameters,  # PEFT refuses both, and finds transposed layers itself
        "bias": "none",
        "inference_mode": True,
        "task_type": None,
    }


def _name_in_peft(name: str, parameters: Collection[str]) -> str:
    """Return the name under which PEFT adapts a weight: the parameter or its layer."""
    return name if name in parameters else name.rpartition(".")[0]


def _patterns(layers: Collection[str]) -> dict[str, str]:
    """Return a regular expression for each layer, which matches only that layer.

    PEFT also matches patterns with the ends of names after a dot. So a name that is such an end starts with ``^``.
    """
    ends = {end for layer in layers for end in ends_of(layer)[1:]}
    return {layer: ("^" if layer in ends else "") + re.escape(layer) for layer in layers}


def _plain(alpha: float) -> float:
    """Return a number as an integer if it is one, as PEFT writes it."""
    return int(alpha) if alpha == int(alpha) else alpha

"""Load LoRA adapters of PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_dtype, check_module, check_path
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._stacking import member_names
from dynlora_fn._core._types import AnyFactors, FrozenTensor, LowRank, Param
from dynlora_fn.interop._init import init
from dynlora_fn.interop._peft_check import check_outputs
from dynlora_fn.interop._peft_layers import WEIGHTS, factors_of
from dynlora_fn.interop._peft_settings import read_settings
from dynlora_fn.interop._peft_tensors import PairInFile, find_tensors
from dynlora_fn.interop._safetensors import Weights, open_weights


def load_adapter(
    model: nn.Module,
    folder: Path | str,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
    check: Sequence[Any] | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Param]:
    """Create the parameters of a model with a PEFT LoRA adapter as their factors.

    `call` with them gives the logits of PEFT's model. The weights of the model become the bases, and the factors have
    the bits of the file::

        weight = base + alpha / rank * b @ a,    b = B,  a = A

    Alpha is the alpha of the layer in the file, or ``sqrt(rank)`` times that alpha for rslora. So gradients equal
    PEFT's, and an optimizer takes PEFT's step at the same rate, also after clipping by norm. `adamw` with
    `factor_decay` takes the step of `torch.optim.AdamW` with `weight_decay`. `save_adapter` writes factors and alpha
    back.

    The adapter is refused if a tensor or a setting is unknown, so nothing in the file is ignored. Layers, ranks and
    alphas are selected by name as in PEFT. An adapter of experts (`target_parameters`) becomes a stack of factors. An
    adapter of an `nn.MultiheadAttention` belongs to its `in_proj_weight`.

    DoRA is refused: its magnitude and norm scale the frozen base too, so no step changes only the factors.

    A rank above min(out, in), as for a classifier, is cut to min(out, in). The product of the factors and its scale
    ``alpha / rank`` stay the same, but steps of an optimizer then differ from PEFT's. Gradients differ too for an
    embedding with a `padding_idx`, if the loss depends on that row. Here the row contributes to no gradient, and in
    PEFT it contributes to the gradient of `lora_embedding_B`.

    Args:
        model: The model that the adapter was trained for. It is not changed.
        folder: The folder with adapter_model.safetensors and adapter_config.json.
        seed: The seed of the bases from which later switches draw, as in `init`.
        dtype: The dtype of the factors, as in `init`.
        stack: Whether repeated weights are stacked, as in `init`.
        check: Arguments of the model, as a tuple or a dict by name. The output of `call` must equal the output of
            PEFT's model, for which PEFT must be installed and a copy of the model is in memory. The copy is in float32
            if the model has 16 bits, since their roundings would hide differences. The check finds differences that
            types cannot show, such as a module that reads the weight of another. Default None means no check.
        progress: A function that is called as ``progress(done, total)`` with the bytes that are done and in total.
            Default None means no reports.

    Returns:
        The parameters, as `init` returns them. A buffer in the file with other values than the model's, such as running
        statistics, is a `FrozenTensor` under its name, which `call` uses in place of the model's buffer. Dropout of the
        adapter is not applied.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the adapter is not plain LoRA, or does not fit the model. The message gives both shapes. Also if
            a setting or a tensor is unknown or missing, or `check` finds another output. Also if PEFT's adapter is not
            a change of the weight: for a forward method or hooks that scale the product, a module under two names, or
            only `MultiheadAttention.out_proj`.
        ImportError: If the extra `files` is not installed, or PEFT for `check`.

    Numerics: Factors are read in float32, or in float64 if the file stores float64, and rounded to `dtype` once.
        Factors of a rank above min(out, in) are cut by a QR decomposition in float64.

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
    settings = read_settings(folder)
    _check_weights_file(folder)
    with open_weights(folder / WEIGHTS) as weights:
        pairs, dense, changed_buffers = find_tensors(model, settings, weights)
        ranks = {name: pair.rank for name, pair in pairs.items()}
        model_bytes = sum(parameter.nbytes for parameter in model.parameters())
        factor_bytes = sum(pair.entries * dtype.itemsize for pair in pairs.values())
        report = reporter(progress, model_bytes + factor_bytes)
        alpha_by_name = {name: pair.alpha for name, pair in pairs.items()}
        kinds: dict[str, Any] = {"rank": ranks, "alpha": alpha_by_name, "start": "lora", "dtype": dtype, "stack": stack}
        params = init(model, seed=seed, targets=list(ranks), **kinds)
        report(model_bytes)
        originals = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for pattern, param in params.items():
            names = member_names(pattern, param.shape)
            if not dense.keys().isdisjoint(names):
                param = _with_dense(param, names, dense, originals, weights)  # noqa: PLW2901
            if isinstance(param, LowRank):
                factors = _read_factors(weights, [pairs[name] for name in names], names, originals, param.factors)
                param = param._replace(factors=factors)  # noqa: PLW2901
                report(sum(pairs[name].entries * dtype.itemsize for name in names))
            params[pattern] = param
        buffers = dict(model.named_buffers())
        for name, key in changed_buffers.items():
            params[name] = FrozenTensor(weights[key].to(buffers[name], copy=True))
    if check is not None:
        check_outputs(model, params, folder, check)
    return params


def _check_weights_file(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        pickled = folder / WEIGHTS.replace(".safetensors", ".bin")
        advice = "load and save it with PEFT, because a pickle is not read" if pickled.is_file() else "add the file"
        raise ValueError(f"`folder` has no {WEIGHTS} in {str(folder)!r}; {advice}")


def _with_dense(
    param: Param,
    names: Sequence[str],
    dense: Mapping[str, str],
    originals: Mapping[str, Tensor],
    weights: Weights,
) -> Param:
    """Return a parameter with the values of the file, which are the base if low-rank.

    Raises:
        ValueError: If the base is in low precision.
    """
    members = [weights[dense[name]] if name in dense else originals[name] for name in names]
    like = originals[names[0]]
    tensor = torch.stack([member.to(like) for member in members])
    if not isinstance(param, LowRank):
        tensor = tensor.reshape(param.shape)
        return FrozenTensor(tensor) if isinstance(param, FrozenTensor) else tensor
    if not isinstance(param.base, Tensor):
        raise ValueError(
            f"the adapter has a base for {names[0]!r}, which is in low precision in the model; load the adapter into "
            "the dense model"
        )
    return param._replace(base=tensor.reshape(param.base.shape))


def _read_factors(
    weights: Weights,
    pairs: Sequence[PairInFile],
    names: Sequence[str],
    originals: Mapping[str, Tensor],
    like: AnyFactors,
) -> AnyFactors:
    """Return the factors of a stack of weights, or of one."""
    read = [
        factors_of(pair.kind, pair.read(weights), tuple(originals[name].shape))
        for pair, name in zip(pairs, names, strict=True)
    ]
    b, a = (torch.stack(side).to(like.b) for side in zip(*read, strict=True))  # on the device of the model too
    return like._replace(b=b.reshape(like.b.shape), a=a.reshape(like.a.shape))

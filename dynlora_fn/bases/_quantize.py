"""`quantize` bases, and measure the `drift` of weights from their exact values."""

from collections.abc import Mapping
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor

from dynlora_fn._core._check import check_by_name, described
from dynlora_fn._core._check_trees import check_one_or_more
from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import Base, StoredBase, as_base
from dynlora_fn.bases._fold import fold
from dynlora_fn.bases._formats import format_of, stored
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.bases._quantized import Quantized
from dynlora_fn.bases._refusals import refuse, refuse_attached
from dynlora_fn.bases._residual import Device, ResidualKind, check_residual, make_residual, residual_codes
from dynlora_fn.bases._rewrite import check_finite
from dynlora_fn.bases._stacks import stack_bases, stack_members


@overload
def quantize(
    params: LowRank,
    base: object,
    *,
    residual: ResidualKind = ...,
    residual_device: Device = ...,
    progress: Progress | None = ...,
) -> LowRank: ...
@overload
def quantize(
    params: Params,
    base: object,
    *,
    residual: ResidualKind = ...,
    residual_device: Device = ...,
    progress: Progress | None = ...,
) -> dict[str, Param]: ...
def quantize(
    params: LowRank | Params,
    base: object,
    *,
    residual: ResidualKind = "bfloat16",
    residual_device: Device = None,
    progress: Progress | None = None,
) -> LowRank | dict[str, Param]:
    """Quantize the bases of low-rank weights.

    The error of a weight does not exceed one quantization error, however many folds follow. Products read
    ``dequantize(codes) + alpha / rank * b @ a``. The residual stores the rounding error of the codes, and each fold of
    `switch` or `merge` starts from both::

        target = codes + residual + difference
        codes = quantize(target);   residual = target - codes

    Without a residual the errors of all folds add up. An int8 base is then off by 45 % of the weights' standard
    deviation after 8,000 steps.

    Args:
        params: One weight, or weights by name. Tensors are returned unchanged. A quantized base, with its residual, is
            converted to the new format.
        base: The name of a format in the table below, or a configuration of torchao: Int8WeightOnlyConfig or
            Float8WeightOnlyConfig with PerRow, or the prototype NVFP4WeightOnlyConfig.
        residual: The format of the residual: "bfloat16" (2 bytes for each entry), "int8" with one scale for each row
            (1 byte), or None for no residual.
        residual_device: The device of the residuals, such as "cpu" for host memory. Default None means the device of
            the codes. Only folds read and write residuals.
        progress: A function that is called as ``progress(done, total)`` with the bytes of weights done so far and the
            total bytes. Default None means no reports.

    Returns:
        The same weights with `Quantized` bases. For "bfloat16" without a residual, the bases are plain tensors.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If the format is unknown, or does not fit the shape of a weight. Also if a weight is not finite, or
            a base is sharded or deferred.
        NotImplementedError: If a base requires a gradient or has a tangent.

    Numerics: The codes are bitwise equal to torchao's for the base in float32, except that rows or blocks of zeros stay
        zero. The table has the largest error of an entry, which is half a step. For nf4 the scales are rounded too. Add
        1/128 of the largest ``|m - mean|`` over the blocks that share a factor. Here m is the largest magnitude of a
        block, and the mean of m is taken over all blocks when the base is first quantized.

        ========  ================================  =======================================================
        format    layout                            error of an entry, at most
        ========  ================================  =======================================================
        int8      one scale for each row            ``scale / 2``
        float8    one scale for each row            for e4m3, ``2**-4`` of the entry or ``scale / 2**10``
        bfloat16  no scale                          ``2**-9`` of the entry
        nf4       blocks of 64                      0.152 of the largest entry of its block, plus the term above
        nvfp4     blocks of 16, torchao prototype   a fifth of the largest entry of its block, or ``2**-19``
                                                    of the largest entry of the weight
        mxfp4     blocks of 32, torchao prototype   a fifth of the largest entry of its block
        ========  ================================  =======================================================

        Prototypes may change with a new version of torchao.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32, bias=False), rank=4, seed=0, targets=["weight"])
        >>> base = dl.bases.quantize(params, "int8")["weight"].base
        >>> base.codes.codes.dtype, base.codes.scale.shape, base.residual.dtype
        (torch.int8, torch.Size([32, 1]), torch.bfloat16)
    """
    check_residual(residual, residual_device)
    check_progress(progress)
    check_one_or_more("params", params)
    by_name = params if isinstance(params, Mapping) else {"param": params}
    low_rank = {name: param for name, param in by_name.items() if isinstance(param, LowRank)}
    report = reporter(progress, sum(map(_bytes_of, low_rank.values())))
    new = {}
    for name, param in low_rank.items():
        new[name] = _quantize(name, param, base, residual, residual_device)
        report(_bytes_of(param))
    return (
        new["param"] if isinstance(params, LowRank) else {name: new.get(name, param) for name, param in by_name.items()}
    )


def _bytes_of(param: LowRank) -> int:
    return param.shape.numel() * as_base(param.base).weight_dtype.itemsize


def _quantize(name: str, param: LowRank, base: object, residual: ResidualKind, residual_device: Device) -> LowRank:
    old = as_base(param.base)
    if old.pending_folds:
        refuse("quantize, deferred", name=name)
    if old.sharding:
        refuse("quantize, sharded", name=name)
    return param._replace(base=quantize_base(name, param.base, base, residual, residual_device, old.weight_dtype))


def quantize_base(
    name: str,
    old: StoredBase,
    base: object,
    residual: ResidualKind,
    residual_device: Device,
    dtype: torch.dtype,
) -> StoredBase:
    """Quantize one base, as `quantize` does.

    `dtype` is the dtype of the weight in the model. For "bfloat16" without a residual the result is a plain tensor.
    """
    refuse_attached("gradient, quantize", old, name=name)
    format_type, code_dtype = format_of(base)

    def quantized(member: Base) -> Quantized:
        weight = member.exact(widest(member.sum_dtype))
        check_finite(weight, name)
        codes = format_type.empty(name, weight, code_dtype).encode(weight)
        error = weight.sub_(codes.decode(weight.dtype))
        check_finite(error, name)  # the largest values may round to infinity
        # torchao does not support int8 for float64.
        is_half = codes.keeps_half_precision and dtype in (torch.bfloat16, torch.float16)
        like = error.new_empty(0, dtype=dtype if is_half else torch.float32)
        return Quantized(stored(codes), make_residual(name, error, residual, residual_device), like)

    members, stack = map(quantized, map(as_base, stack_members(old))), as_base(old).shape[:-2]
    new = stack_bases(members, stack) if stack else next(members)
    return new.codes if isinstance(new.codes, Tensor) and residual is None else new


# --- drift


@overload
def drift(params: LowRank, exact: Tensor | None = ...) -> Float[Tensor, ""]: ...
@overload
def drift(params: Params, exact: Mapping[str, Tensor] | None = ...) -> dict[str, Float[Tensor, ""]]: ...
def drift(params: LowRank | Params, exact: Any = None) -> Float[Tensor, ""] | dict[str, Float[Tensor, ""]]:
    """Return the relative error of the weight that products read.

    The error is ``|weight - exact| / |exact|`` in Frobenius norms. This takes about as long as a fold. Sharded bases
    are gathered. In that case this is collective: call it on every process.

    Args:
        params: One weight, or weights by name. A stack counts as one weight.
        exact: The exact dense weight (*stack, out, in), or a dict of them by name. Default None means the weight with
            its residual. The result is NaN if the base has no residual, because the exact weight is then unknown.

    Returns:
        A 0-d float32 tensor, or a dict of them with the name of each low-rank weight. The error of a
        weight of zeros is 0 if nothing is missing.

    Raises:
        TypeError: If `exact` is not a tensor of a floating dtype.
        ValueError: If `exact` has no entry for a weight, or differs from the weight in shape or device.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(64, 32, bias=False), rank=4, seed=0, targets=["weight"], base="int8")
        >>> bool(dl.bases.drift(params)["weight"] < 0.01)
        True
    """
    check_one_or_more("params", params)
    if isinstance(params, LowRank):
        if exact is not None:
            _check_exact("param", params, exact)
        return _drift("param", params, exact)
    low_rank = {name: param for name, param in params.items() if isinstance(param, LowRank)}
    if exact is not None:
        check_by_name("exact", exact, of="dense weights")
        if missing := [name for name in low_rank if name not in exact]:
            raise ValueError(f"`exact` has no weight for {missing}; pass one for each low-rank weight")
        for name, param in low_rank.items():
            _check_exact(name, param, exact[name])
    return {name: _drift(name, param, None if exact is None else exact[name]) for name, param in low_rank.items()}


def _check_exact(name: str, param: LowRank, exact: Any) -> None:
    if not isinstance(exact, Tensor) or not exact.is_floating_point():
        raise TypeError(f"`exact` has {described(exact)} for {name!r}; pass the dense weight, of a floating dtype")
    if exact.shape != param.shape:
        raise ValueError(
            f"`exact` has shape {tuple(exact.shape)} for {name!r}, but the weight has {tuple(param.shape)};"
            " pass the dense weight"
        )
    if exact.device != param.factors.b.device:
        raise ValueError(
            f"`exact` has {name!r} on {exact.device}, but the weight is on {param.factors.b.device}; move it"
        )


def _drift(name: str, param: LowRank, exact: Tensor | None) -> Tensor:
    joined = with_pending(param)
    base, (b, a) = as_base(joined.base).gather(), whole_factors(joined)
    if exact is None and residual_codes(as_base(base).residual) is None:
        return torch.full((), torch.nan, dtype=torch.float32, device=b.device)
    stack, wide = param.shape[:-2].numel(), widest(b.dtype)
    b, a = b.reshape(stack, *b.shape[-2:]), a.reshape(stack, *a.shape[-2:])
    targets = [None] * stack if exact is None else exact.reshape(stack, *exact.shape[-2:])
    squares = []
    for index, (member, target) in enumerate(zip(map(as_base, stack_members(base)), targets, strict=True)):
        weight = fold(member.dequantize(wide), b[index], a[index], divisor=joined.divisor)
        missing = residual_codes(member.residual)
        if target is None and missing is not None:
            error = missing.decode(weight.dtype).to(weight.device)
            target = weight + error  # noqa: PLW2901
        else:
            error = target - weight
        squares.append(torch.stack([error.square().sum(), target.square().sum()]))
    error_square, exact_square = torch.stack(squares).sum(0)
    relative: Tensor = torch.where(error_square == 0, 0, error_square / exact_square).sqrt()
    return relative.float()

"""Tensor parallelism for `models.llama` and `models.mlp` (arXiv:1909.08053), by DTensor.

Each process holds some heads of every attention and some of the hidden numbers of every feed-forward layer, with what
belongs to them of bases, factors and moments. Of a perceptron it holds rows and columns by turns, and of layers that
are stacked rows.

=================  =====================================  ==============  ==============  ==========================
weights            of                                     base            b               a
=================  =====================================  ==============  ==============  ==========================
columns of x W^T   query, key, value, gate, up;           rows of `out`   rows of `out`   whole
                   layers.0, layers.2, ..., layers.*
rows of x W^T      output, down; layers.1, layers.3, ...  part of `in`    whole           part of `in`
others             embedding, norms, head, biases         whole
=================  =====================================  ==============  ==============  ==========================

A state holds this process's part of each tensor, so that the optimizer and a switch are those of `dynlora_fn` as they
are; `placed` says for the loss what the parts are parts of. A switch folds parts into parts and sends nothing. A step
is run under torch's `implicit_replication`, since positions and tokens are plain tensors.

Bases go into low precision once they are parts, ``dynlora_fn.quantize(split(params, mesh), "int8")``: each part has
scales of its own, so that a fold stays within it. Each process dequantizes its part, one weight at a time.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.bases._ops import decode_exact

BY_OUT = (".query.weight", ".key.weight", ".value.weight", ".gate.weight", ".up.weight")
BY_IN = (".attention.output.weight", ".down.weight")
LAYER = re.compile(r"layers\.(\d+|\*)\.weight")  # of a perceptron
_OUT, _IN = -2, -1


def _axis(name: str) -> int | None:
    """Which axis of a weight the processes share."""
    if layer := LAYER.fullmatch(name):
        return _IN if layer[1] != "*" and int(layer[1]) % 2 else _OUT
    return _OUT if name.endswith(BY_OUT) else _IN if name.endswith(BY_IN) else None


def _axes(name: str) -> dict[str, int | None]:
    axis = _axis(name)
    return {"base": axis, "b": axis if axis == _OUT else None, "a": axis if axis == _IN else None}


def _part(leaf: Tensor, axis: int | None, mesh: DeviceMesh) -> Tensor:
    return leaf if axis is None else leaf.chunk(mesh.size(), axis)[mesh.get_local_rank()].clone()


def split(params: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """This process's part of parameters that are whole, with bases in full precision.

    Raises:
        ValueError: if a size is no multiple of the number of processes, or a base is in low precision or shared
            otherwise; it names the weight.
    """
    parts: dict[str, Any] = {}
    for name, param in params.items():
        if not isinstance(param, dl.LowRank):
            parts[name] = param
            continue
        axes, size = _axes(name), mesh.size()
        if not isinstance(param.base, Tensor):
            rule = "have bases in full precision to be split, and can be quantized then"
            raise ValueError(f"`params` must {rule}, got {type(param.base).__name__} for {name!r}")
        if axes["base"] is not None and param.shape[axes["base"]] % size:
            raise ValueError(f"`params` must divide into {size} parts, got {name!r} of shape {tuple(param.shape)}")
        factors = dl.Factors(*(_part(leaf, axes[side], mesh) for side, leaf in param.factors._asdict().items()))
        parts[name] = param._replace(base=_part(param.base, axes["base"], mesh), factors=factors)
    return parts


def _place(leaf: Tensor, axis: int | None, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(leaf, mesh, [_placement(leaf, axis)], run_check=False)


def _placement(leaf: Tensor, axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(leaf.ndim + axis)


@register_sharding(torch.ops.dynlora_fn.dequantize.default)
def _dequantized(codes: Any, kind: str, dtype: torch.dtype) -> list[Any]:
    """A part of the weight, of the same part of all its tensors."""
    placements = [Replicate(), *map(Shard, range(len(codes[0].shape)))]
    return [([placement], [placement] * len(codes) + [None, None]) for placement in placements]


def _place_base(name: str, base: Any, axis: int | None, mesh: DeviceMesh) -> Any:
    """A residual stays as it is: no product reads it."""
    if isinstance(base, Tensor):
        return _place(base, axis, mesh)
    if not isinstance(base, dl.bases.Quantized) or isinstance(base.codes, dl.bases.NF4Codes | dl.bases.NVFP4Codes):
        kind = type(base.codes if isinstance(base, dl.bases.Quantized) else base).__name__
        rule = "have bases whose rows have scales of their own, neither deferred nor sharded otherwise"
        raise ValueError(f"`parts` must {rule}, got {kind} for {name!r}")
    return base._replace(codes=tree_map(lambda leaf: _place(leaf, axis, mesh), base.codes))


def placed(parts: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """DTensors in the same memory, of `parts` as `split` or `dynlora_fn.partition` gives them.

    Raises:
        ValueError: if a base is in nf4 or nvfp4, whose rows share a factor; it names the weight.
    """

    def place(name: str, leaf: Any) -> Any:
        axes = _axes(name)
        if isinstance(leaf, dl.Factors):
            return dl.Factors(*(_place(side, axes[key], mesh) for key, side in leaf._asdict().items()))
        if isinstance(leaf, dl.Frozen):
            return leaf._replace(base=_place_base(name, leaf.base, axes["base"], mesh))
        if isinstance(leaf, dl.LowRank):
            base = _place_base(name, leaf.base, axes["base"], mesh)
            return leaf._replace(base=base, factors=place(name, leaf.factors))
        return _place(leaf, None, mesh)

    return {name: place(name, leaf) for name, leaf in parts.items()}


def own(grads: Mapping[str, Any]) -> dict[str, Any]:
    """This process's parts of the gradients by what is `placed`: those of what is whole are summed up."""

    def part(leaf: DTensor, axis: int | None) -> Tensor:
        return leaf.redistribute(placements=[_placement(leaf, axis)]).to_local()

    return {
        name: dl.Factors(*(part(side, _axes(name)[key]) for key, side in leaf._asdict().items()))
        if isinstance(leaf, dl.Factors)
        else part(leaf, None)
        for name, leaf in grads.items()
    }


def value_and_grad(loss_fn: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., dl.nn.ValueAndGrad]:
    """`dynlora_fn.value_and_grad` of what is `placed`: the loss, and each process's parts of the gradients."""

    def function(trainable: Mapping[str, Any], *args: Any) -> dl.nn.ValueAndGrad:
        with sdpa_kernel(SDPBackend.MATH) if mesh.device_type == "cpu" else nullcontext():  # DTensor has no other there
            loss, grads = dl.value_and_grad(loss_fn)(trainable, *args)
        return dl.nn.ValueAndGrad(loss.full_tensor(), own(grads))

    return function


def outline(parts: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Whole parameters without memory or numbers, for what goes by shapes and seeds alone: schedules and candidates."""

    def shape(leaf: Tensor, axis: int | None) -> Tensor:
        sizes = list(leaf.shape)
        if axis is not None:
            sizes[axis] *= mesh.size()
        return leaf.new_zeros(()).expand(sizes)

    whole: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, dl.LowRank):
            axes = _axes(name)
            factors = dl.Factors(*(shape(leaf, axes[side]) for side, leaf in part.factors._asdict().items()))
            base = factors.b.new_zeros(()).expand(*factors.b.shape[:-1], factors.a.shape[-1])
            whole[name] = part._replace(base=base, factors=factors)
        else:
            whole[name] = part
    return whole


def switch(parts: Mapping[str, Any], plan: Mapping[str, dl.Plan], mesh: DeviceMesh) -> dict[str, Any]:
    """`dynlora_fn.switch` of whole parameters, in parts: every process draws all vectors and takes its part of them."""
    incoming = {
        name: dl.Factors(*(_part(leaf, _axes(name)[side], mesh) for side, leaf in vectors._asdict().items()))
        for name, vectors in dl.candidates(outline(parts, mesh), plan).items()
    }
    return dl.switch(parts, plan, incoming=incoming).params


def joined(parts: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """The whole parameters of all processes, which all must ask for, with bases in full precision."""
    whole = placed(in_full_precision(parts), mesh)
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, whole)


def in_full_precision(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with what codes and residuals stand for together as bases, in float32."""

    def full(param: Any) -> Any:
        if not isinstance(param, dl.LowRank) or not isinstance(param.base, dl.bases.Quantized):
            return param
        return param._replace(base=decode_exact(param.base.codes, param.base.residual, torch.float32))

    return {name: full(param) for name, param in params.items()}

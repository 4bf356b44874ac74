"""Tensor parallelism for `models.llama` and `models.mlp`, with DTensor.

The weights are sharded as in arXiv:1909.08053: attention by heads, and a feed-forward layer by its hidden units. The
layers of a perceptron are sharded by `out` and by `in` in turn, and layers that are stacked by `out`.

==================  =====================================  =========  ==========  ==========
sharded             weights                                base       b           a
==================  =====================================  =========  ==========  ==========
columns of `x W^T`  query, key, value, gate, up;           by `out`   by `out`    replicated
                    layers.0, layers.2, ..., layers.*
rows of `x W^T`     output, down; layers.1, layers.3, ...  by `in`    replicated  by `in`
nothing             embedding, norms, head, biases         the weight is replicated
==================  =====================================  =========  ==========  ==========

A state contains plain tensors, the shards of this process, so optimizers and switches of `dynlora_fn` work on it
unchanged. A switch folds shards into shards and sends nothing. For the loss, `to_dtensors` converts the shards to
DTensors. Run a step under torch's `implicit_replication`, because positions and tokens are plain tensors.

Quantize bases after they are sharded: ``dynlora_fn.bases.quantize(shard(params, mesh), "int8")``. Each shard then has
separate scales, so a fold needs only this shard. Each process dequantizes its shard, one weight at a time.
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
from dynlora_fn.bases._base import as_base

BY_OUT = (".query.weight", ".key.weight", ".value.weight", ".gate.weight", ".up.weight")
BY_IN = (".attention.output.weight", ".down.weight")
LAYER = re.compile(r"layers\.(\d+|\*)\.weight")  # of a perceptron
_OUT, _IN = -2, -1


def _axis(name: str) -> int | None:
    """Return the axis that a weight is sharded along, or None if it is replicated."""
    if layer := LAYER.fullmatch(name):
        return _IN if layer[1] != "*" and int(layer[1]) % 2 else _OUT
    return _OUT if name.endswith(BY_OUT) else _IN if name.endswith(BY_IN) else None


def _axes(name: str) -> dict[str, int | None]:
    axis = _axis(name)
    return {"base": axis, "b": axis if axis == _OUT else None, "a": axis if axis == _IN else None}


def _shard(leaf: Tensor, axis: int | None, mesh: DeviceMesh) -> Tensor:
    return leaf if axis is None else leaf.chunk(mesh.size(), axis)[mesh.get_local_rank()].clone()


def _map_sides(change: Callable[[Any, int | None], Any], factors: Any, axes: Mapping[str, int | None]) -> Any:
    """Apply `change` to each side of factors and the axis that it is sharded along."""
    return factors._replace(b=change(factors.b, axes["b"]), a=change(factors.a, axes["a"]))


def shard(params: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return this process's shards of parameters with dense bases.

    Raises:
        ValueError: If a size is not a multiple of the number of processes, if a base is quantized or already sharded,
            or if only one factor is trained. The message names the weight.
    """
    shards: dict[str, Any] = {}
    for name, param in params.items():
        if not isinstance(param, dl.LowRank):
            shards[name] = param
            continue
        axes, size = _axes(name), mesh.size()
        if isinstance(param.factors, dl.switching.OneSidedFactors):
            raise ValueError(
                f"`params` must train both factors of {name!r}, got trained='b'; make them with trained='both'"
            )
        if not isinstance(param.base, Tensor):
            raise ValueError(
                f"`params` must have bases in full precision, got {type(param.base).__name__} for {name!r}; "
                "shard first, then quantize"
            )
        if axes["base"] is not None and param.shape[axes["base"]] % size:
            raise ValueError(f"`params` must divide into {size} shards, got {name!r} of shape {tuple(param.shape)}")
        factors = _map_sides(lambda leaf, axis: _shard(leaf, axis, mesh), param.factors, axes)
        shards[name] = param._replace(base=_shard(param.base, axes["base"], mesh), factors=factors)
    return shards


def _to_dtensor(leaf: Tensor, axis: int | None, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(leaf, mesh, [_placement(leaf, axis)], run_check=False)


def _placement(leaf: Tensor, axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(leaf.ndim + axis)


@register_sharding(torch.ops.dynlora_fn.dequantize.default)
def _dequantize_placements(codes: Any, kind: str, dtype: torch.dtype) -> list[Any]:
    """Shard the weight as all tensors of its codes are sharded."""
    placements = [Replicate(), *map(Shard, range(len(codes[0].shape)))]
    return [([placement], [placement] * len(codes) + [None, None]) for placement in placements]


def _base_to_dtensors(name: str, base: Any, axis: int | None, mesh: DeviceMesh) -> Any:
    """Convert a dense base, or the codes of a quantized one, to DTensors.

    The residual stays a plain tensor, because no product reads it.

    Raises:
        ValueError: If the base is deferred, or in nf4 or nvfp4.
    """
    if isinstance(base, Tensor):
        return _to_dtensor(base, axis, mesh)
    if not isinstance(base, dl.bases.Quantized) or isinstance(base.codes, dl.bases.NF4Codes | dl.bases.NVFP4Codes):
        kind = type(base.codes if isinstance(base, dl.bases.Quantized) else base).__name__
        raise ValueError(
            f"`shards` must have plain bases or codes with a scale per row or block of a row, got {kind} for {name!r}; "
            "use int8, float8 or bfloat16"
        )
    return base._replace(codes=tree_map(lambda leaf: _to_dtensor(leaf, axis, mesh), base.codes))


def to_dtensors(shards: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return DTensors that share memory with the shards.

    `shards` may also be one of the trees that `dynlora_fn.partition` returns.

    Raises:
        ValueError: If a base is deferred, or in nf4 or nvfp4, whose rows share a factor. The message names the weight.
    """

    def convert(name: str, leaf: Any) -> Any:
        axes = _axes(name)
        if isinstance(leaf, dl.Factors | dl.switching.ScaledFactors):
            return _map_sides(lambda side, axis: _to_dtensor(side, axis, mesh), leaf, axes)
        if isinstance(leaf, dl.Frozen):
            return leaf._replace(base=_base_to_dtensors(name, leaf.base, axes["base"], mesh))
        if isinstance(leaf, dl.LowRank):
            base = _base_to_dtensors(name, leaf.base, axes["base"], mesh)
            return leaf._replace(base=base, factors=convert(name, leaf.factors))
        if isinstance(leaf, dl.interop.FrozenTensor):
            return leaf._replace(tensor=_to_dtensor(leaf.tensor, None, mesh))
        return _to_dtensor(leaf, None, mesh)

    return {name: convert(name, leaf) for name, leaf in shards.items()}


def local_gradients(grads: Mapping[str, Any]) -> dict[str, Any]:
    """Convert gradients from DTensors to this process's shards.

    Gradients of replicated tensors are summed over processes.
    """

    def to_shard(leaf: DTensor, axis: int | None) -> Tensor:
        return leaf.redistribute(placements=[_placement(leaf, axis)]).to_local()

    return {
        name: _map_sides(to_shard, leaf, _axes(name))
        if isinstance(leaf, dl.Factors | dl.switching.ScaledFactors)
        else to_shard(leaf, None)
        for name, leaf in grads.items()
    }


def value_and_grad(loss_fn: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., dl.nn.ValueAndGrad]:
    """Return `dynlora_fn.value_and_grad` for a function of DTensors.

    The result returns the loss and this process's shards of the gradients.
    """

    def function(trainable: Mapping[str, Any], *args: Any) -> dl.nn.ValueAndGrad:
        # On a CPU, DTensor supports only this kernel of attention.
        with sdpa_kernel(SDPBackend.MATH) if mesh.device_type == "cpu" else nullcontext():
            loss, grads = dl.value_and_grad(loss_fn)(trainable, *args)
        return dl.nn.ValueAndGrad(loss.full_tensor(), local_gradients(grads))

    return function


def full_shapes(shards: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return parameters with full shapes that take no memory.

    They are for schedules and `candidates`, which read only shapes and seeds.
    """

    def expand(leaf: Tensor, axis: int | None) -> Tensor:
        sizes = list(leaf.shape)
        if axis is not None:
            sizes[axis] *= mesh.size()
        return leaf.new_zeros(()).expand(sizes)

    params: dict[str, Any] = {}
    for name, param in shards.items():
        if isinstance(param, dl.LowRank):
            axes = _axes(name)
            factors = _map_sides(expand, param.factors, axes)
            base = factors.b.new_zeros(()).expand(*factors.b.shape[:-1], factors.a.shape[-1])
            params[name] = param._replace(base=base, factors=factors)
        else:
            params[name] = param
    return params


def switch(shards: Mapping[str, Any], plan: Mapping[str, dl.Plan], mesh: DeviceMesh) -> dict[str, Any]:
    """Apply `dynlora_fn.switch` to shards, and return the new shards.

    Every process generates all incoming vectors and uses its shards of them, so nothing is sent.
    """
    incoming = {
        name: _map_sides(lambda leaf, axis: _shard(leaf, axis, mesh), vectors, _axes(name))
        for name, vectors in dl.candidates(full_shapes(shards, mesh), plan).items()
    }
    return dl.switch(shards, plan, incoming=incoming).params


def gather(shards: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return the full parameters, with dense bases.

    Collective: call it on every process.
    """
    params = to_dtensors(in_full_precision(shards), mesh)
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, params)


def in_full_precision(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with dense bases.

    A quantized base becomes the sum of its codes and its residual, in float32.
    """

    def dequantize(param: Any) -> Any:
        if not isinstance(param, dl.LowRank) or not isinstance(param.base, dl.bases.Quantized):
            return param
        return param._replace(base=as_base(param.base).exact(torch.float32))

    return {name: dequantize(param) for name, param in params.items()}

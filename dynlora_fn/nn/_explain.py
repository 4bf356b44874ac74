"""`explain`: the cost of a training step, weight by weight."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_integer
from dynlora_fn._core._check_trees import check_params
from dynlora_fn._core._torch import tree_leaves
from dynlora_fn._core._tree import tensor_of, trained_factors
from dynlora_fn._core._types import FrozenTensor, LowRank, OneSidedFactors, Param, Params, sides_of
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn._call import call_with
from dynlora_fn.nn._contraction_paths import ContractionPath, cheapest_path, flops
from dynlora_fn.nn._swap import slots_of
from dynlora_fn.nn._turns import taking_turns

_MOMENT_BYTES = 4  # for each entry of each of the two moments


class Cost(NamedTuple):
    """The FLOPs of forward and backward pass, and the bytes, of one parameter.

    For a stack, they are the sums over all members, except for `merged`.
    """

    name: str
    shape: tuple[int, ...]  # shape of the weight, (*stack, out, in)
    rank: int | None  # None for a full-rank parameter
    path: ContractionPath | None  # the path of its products; None for a full-rank parameter
    flops: int | None  # None for a full-rank parameter, whose FLOPs depend on the model
    full_flops: int | None  # FLOPs of full-rank training
    base: int  # bytes of what is frozen: base, seed, and `a` if only `b` is trained; or a frozen parameter
    trainable: int  # bytes of the trained tensors
    gradient: int  # bytes of their gradients
    optimizer: int  # bytes of two moments in float32, and of the counts
    full: int  # bytes of weight, gradient and moments in full-rank training
    merged: int  # bytes of one merged weight of one member, which a product forms and frees again


class DenseUse(NamedTuple):
    """An operation without a rule, for which a low-rank weight is made dense."""

    name: str
    operation: str


class Explanation(NamedTuple):
    """The result of `explain`. Print it to see a table."""

    tokens: int
    costs: list[Cost]
    dense: list[DenseUse]  # each weight and operation once; empty without a model

    def __str__(self) -> str:
        header = [
            "weight",
            "shape",
            "rank",
            "path",
            "GFLOP",
            "full",
            "base MB",
            "factors",
            "grads",
            "optimizer",
            "full",
        ]
        rows = [_row(cost) for cost in self.costs]
        low_rank = [cost for cost in self.costs if cost.rank is not None]
        totals = {
            field: sum(getattr(cost, field) or 0 for cost in self.costs)
            for field in ("flops", "full_flops", "base", "trainable", "gradient", "optimizer", "full")
        }
        total = Cost("all", (), None, None, merged=max((cost.merged for cost in low_rank), default=0), **totals)
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in [header, *rows, _row(total)]
        ]
        return "\n".join(
            [f"one step of {self.tokens:,} tokens", *lines, f"largest merged weight: {total.merged / 1e6:.3f} MB"]
            + [f"{use.name} is made dense for `{use.operation}`" for use in self.dense]
        )


def explain(
    params: Params,
    *,
    tokens: int,
    model: nn.Module | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Return the FLOPs and bytes of a training step, weight by weight.

    Bytes are counted from the tensors. FLOPs are opt_einsum's count for the cheapest path, if all tokens pass through a
    weight in one call. `linear` takes this path too, but may take another path for a sharded or deferred base.
    Full-rank training is counted for comparison. Activations are not counted; for the memory of a whole step see
    `peak_memory`.

    Args:
        params: The parameters by name, stacks or single weights. Only shapes and dtypes are read.
        tokens: The number of tokens that are multiplied by a weight in one call: batch size times sequence length.
        model: The model. It is run once, as `call` does, to find operations that need a dense weight. Its buffers and
            the random state of the CPU do not change. Default None does not run a model.
        args: The positional arguments of the model, as a tuple.
        kwargs: The keyword arguments of the model. Default None means no keyword arguments.

    Returns:
        One `Cost` for each parameter, and one `DenseUse` for each weight and operation without a rule. The result is a
        table when printed.

    Raises:
        TypeError: If `tokens` is not an integer, or a parameter is neither a `LowRank` nor a tensor.
        ValueError: If `tokens` is negative.

    Example:
        >>> from torch import nn
        >>> import dynlora_fn as dl
        >>> params = dl.init(nn.Linear(512, 512, bias=False), rank=64, seed=0, targets=["weight"])
        >>> (cost,) = dl.explain(params, tokens=2048).costs
        >>> cost.path, cost.flops / cost.full_flops
        ('merged', 0.8541666666666666)
    """
    check_params("params", params)
    tokens = check_integer("tokens", tokens, least=0)
    dense = [] if model is None else _dense_uses(model, params, args, kwargs or {})
    return Explanation(tokens, [_cost(name, param, tokens) for name, param in params.items()], dense)


def _dense_uses(model: nn.Module, params: Params, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[DenseUse]:
    uses: dict[DenseUse, None] = {}

    def record(name: str, operation: str) -> None:
        uses[DenseUse(name, operation)] = None

    full_rank = {name: tensor_of(param) for name, param in params.items() if not isinstance(param, LowRank)}
    buffers = {name: full_rank.get(name, buffer) for name, buffer in model.named_buffers()}
    params = {name: param for name, param in params.items() if name not in buffers}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), taking_turns(model), _copied_buffers(model, buffers):
        call_with(model, params, {}, args, kwargs, fallback=record)
    return list(uses)


@contextmanager
def _copied_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> Iterator[None]:
    """Put copies of `buffers` into a model, and restore its buffers at the end.

    The model may write to the copies, or assign other tensors.
    """
    slots = [slot for slot in slots_of(model) if slot.is_buffer]
    try:
        for slot in slots:
            if slot.name in buffers:
                slot.put(buffers[slot.name].clone())
        yield
    finally:
        for slot in slots:
            slot.put(slot.tensor)


def _cost(name: str, param: Param, tokens: int) -> Cost:
    if isinstance(param, FrozenTensor):
        size = _bytes(param)
        return Cost(name, tuple(param.shape), None, None, None, None, size, 0, 0, 0, size, 0)
    if isinstance(param, Tensor):
        size, optimizer = _bytes([param]), _MOMENT_BYTES * 2 * param.numel() + 4
        return Cost(name, tuple(param.shape), None, None, None, None, 0, size, size, optimizer, 2 * size + optimizer, 0)
    *stack, out_features, in_features = param.shape
    rank, members = param.factors.a.shape[-2], prod(stack)
    sizes: dict[str, Any] = {"tokens": tokens, "out_features": out_features, "in_features": in_features, "rank": rank}
    sides, is_one_sided = sides_of(trained_factors(param.factors)), isinstance(param.factors, OneSidedFactors)
    path, trainable = cheapest_path(**sizes, is_one_sided=is_one_sided), _bytes(sides)
    entries = sum(leaf.numel() for leaf in sides)
    weight = members * out_features * in_features
    weight_bytes = as_base(param.base).weight_dtype.itemsize  # of an entry in full-rank training
    element_bytes = max(weight_bytes, param.factors.b.element_size(), 4)
    return Cost(
        name=name,
        shape=tuple(param.shape),
        rank=rank,
        path=path,
        flops=members * flops(path, **sizes, is_one_sided=is_one_sided),
        full_flops=members * flops("full", **sizes),
        base=_bytes([param.base, param.seed]) + _bytes(param.factors) - trainable,
        trainable=trainable,
        gradient=trainable,
        # `count` and `frozen_for`, 4 bytes each, for each vector of a trained side.
        optimizer=_MOMENT_BYTES * 2 * entries + 4 * 2 * len(sides) * members * rank,
        full=weight * (2 * weight_bytes + 2 * _MOMENT_BYTES) + 4,
        merged=0 if path == "factored" else out_features * in_features * element_bytes,
    )


def _bytes(tree: object) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree))


def _row(cost: Cost) -> list[str]:
    giga = ["-" if value is None else f"{value / 1e9:.3f}" for value in (cost.flops, cost.full_flops)]
    mega = [f"{value / 1e6:.3f}" for value in (cost.base, cost.trainable, cost.gradient, cost.optimizer, cost.full)]
    shape = "x".join(map(str, cost.shape)) or "-"
    return [cost.name, shape, str(cost.rank or "-"), cost.path or "-", *giga, *mega]

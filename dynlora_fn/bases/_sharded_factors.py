"""Gather sharded factors and scatter their gradients.

`b` is sharded by rows, and `a` by columns.
"""

from dataclasses import astuple
from typing import Any, Never, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._collectives import gather, scatter, weighted
from dynlora_fn._core._types import Factors, ScaledFactors, ShardedFactors, Sharding, with_alpha
from dynlora_fn.bases._refusals import refuse, refuse_mapped

Constants: TypeAlias = tuple[Any, ...]  # the fields of a `Sharding`


def gather_factors(factors: ShardedFactors) -> Factors | ScaledFactors:
    """Gather the factors of all processes, bit for bit.

    The backward pass averages the gradients over processes and returns shards, as `scatter_gradients` does. Collective:
    call it on every process, in the forward and the backward pass.
    """
    refuse_mapped("vmap, sharded factors", factors.b)
    b, a = _gather(factors.b, factors.a, astuple(factors.sharding))
    return with_alpha(Factors(b, a), factors.sharding.alpha)


def scatter_gradients(gradients: Factors, sharding: Sharding) -> ShardedFactors:
    """Average gradients over all processes and return the shards of this process.

    `sharding.weight` is the weight of this process in the average. Collective: call it on every process.
    """
    b, a = _scatter(*gradients, astuple(sharding))
    return ShardedFactors(b, a, sharding)


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _gather(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return _Gather.apply(b, a, constants)  # type: ignore[no-any-return, no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _scatter(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return _Scatter.apply(b, a, constants)  # type: ignore[no-any-return, no-untyped-call]


class _Collective(torch.autograd.Function):
    """A collective that refuses forward mode and `torch.vmap`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Never:
        refuse("forward mode, sharded factors")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Never:
        refuse("vmap, sharded factors")


# Each function is the derivative of the other, so second derivatives are right too. Plain collectives would have no
# derivative here.


class _Gather(_Collective):
    @staticmethod
    def forward(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
        sharding = Sharding(*constants)
        return gather(b, sharding), gather(a.mT, sharding.as_columns).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ctx.constants = inputs

    @staticmethod
    def backward(ctx: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Scatter.apply(b, a, ctx.constants), None  # type: ignore[no-untyped-call]


class _Scatter(_Collective):
    @staticmethod
    def forward(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
        sharding = Sharding(*constants)
        b, a = weighted(b, sharding.weight), weighted(a.mT, sharding.weight)
        return scatter(b, sharding), scatter(a, sharding.as_columns).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ctx.constants = inputs

    @staticmethod
    def backward(ctx: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, None]:
        gathered_b, gathered_a = _Gather.apply(b, a, ctx.constants)  # type: ignore[no-untyped-call]
        weight = Sharding(*ctx.constants).weight
        return weighted(gathered_b, weight), weighted(gathered_a, weight), None

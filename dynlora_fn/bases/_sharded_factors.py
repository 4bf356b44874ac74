"""Factors that lie on several processes as their base does: `b` by its rows, `a` by its columns."""

from dataclasses import astuple
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dynlora_fn._core._collectives import gather, scatter
from dynlora_fn._core._types import Factors, Sharding

Constants: TypeAlias = tuple[Any, ...]  # the fields of a `Sharding`


def gather_factors(factors: Factors, sharding: Sharding) -> Factors:
    """Those of all processes, bit for bit. Gradients pass through by `own_gradients`."""
    return Factors(*_whole(*factors, astuple(sharding)))


def scatter_gradients(gradients: Factors, sharding: Sharding) -> Factors:
    """This process's shares of the mean of all processes' gradients."""
    return Factors(*_own(*gradients, astuple(sharding)))


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _whole(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return _Whole.apply(b, a, constants)  # type: ignore[no-any-return, no-untyped-call]


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _own(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return _Own.apply(b, a, constants)  # type: ignore[no-any-return, no-untyped-call]


# Each is the other's gradient, so that those of gradients are right as well; a collective by itself has none here.


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
        sharding = Sharding(*constants)
        return gather(b, sharding), gather(a.mT, sharding.as_columns).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ctx.constants = inputs

    @staticmethod
    def backward(ctx: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_Own.apply(b, a, ctx.constants), None  # type: ignore[no-untyped-call]


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(b: Tensor, a: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
        sharding = Sharding(*constants)
        b, a = b * sharding.weight, a.mT * sharding.weight
        return scatter(b, sharding), scatter(a, sharding.as_columns).mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *_, ctx.constants = inputs

    @staticmethod
    def backward(ctx: Any, b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, None]:
        gathered, weight = _Whole.apply(b, a, ctx.constants), Sharding(*ctx.constants).weight  # type: ignore[no-untyped-call]
        return *(side * weight for side in gathered), None

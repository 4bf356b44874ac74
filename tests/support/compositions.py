"""Compositions of transforms over products with one low-rank weight.

The same products with the dense weight are beside them. Every function here goes from three numbers to three numbers,
so that transforms can follow each other in any order.
"""

from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.nn import functional

from dynlora_fn import LowRank, call, linear, remat
from dynlora_fn.bases._base import as_base
from dynlora_fn.bases._pending import with_pending
from dynlora_fn.nn._view import View, transposed
from dynlora_fn.testing import Shape, Storage, low_rank, normal

Function = Callable[[Tensor], Tensor]
SHAPE = Shape(4, 32, 2)  # of a size that all blocks divide
DIRECTION = torch.tensor([0.5, -1.0, 0.75], dtype=torch.float64)


def loss(g: Function) -> Function:
    return lambda v: (g(v) * DIRECTION).sum()


# --- transforms


def by_autograd(g: Function) -> Function:
    def gradient(v: Tensor) -> Tensor:
        v = v if v.requires_grad else v.clone().requires_grad_()
        return torch.autograd.grad(loss(g)(v), v, create_graph=True)[0]

    return gradient


def by_dual(g: Function) -> Function:
    def tangent(v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(g(forward_ad.make_dual(v, DIRECTION))).tangent

    return tangent


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda g: grad(loss(g)),
    "vjp": lambda g: lambda v: vjp(g, v)[1](DIRECTION)[0],
    "jvp": lambda g: lambda v: jvp(g, (v,), (DIRECTION,))[1],
    "vmap": lambda g: lambda v: torch.vmap(g)(torch.stack([v, v / 2, -v])).mean(0),
    "jacrev": lambda g: lambda v: DIRECTION @ jacrev(g)(v),
    "jacfwd": lambda g: lambda v: DIRECTION @ jacfwd(g)(v),
    "hessian": lambda g: lambda v: hessian(loss(g))(v) @ DIRECTION,
    "linearize": lambda g: lambda v: linearize(g, v)[1](DIRECTION),
}
OUTERMOST = {"autograd": by_autograd, "dual": by_dual}  # what `torch.func` does not contain


def compositions(depth: int) -> Iterator[tuple[str, ...]]:
    """Yield all compositions of `depth` transforms by their names.

    The outermost is first.
    """
    yield from product((*OUTERMOST, *TRANSFORMS), *[TRANSFORMS] * (depth - 1))


def composed(names: tuple[str, ...], g: Function) -> Function:
    for name in reversed(names):
        g = (TRANSFORMS | OUTERMOST)[name](g)
    return g


# --- products


class Product(NamedTuple):
    """A product of an input with a weight, low-rank and dense."""

    input_shape: tuple[int, ...]
    low_rank: Callable[[Tensor, LowRank], Tensor]
    dense: Callable[[Tensor, Tensor], Tensor]  # with the weight (*stack, out, in)
    stack: tuple[int, ...] = ()


class Uses(nn.Module):
    """Passes its weight and an input to a function."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]):
        super().__init__()
        self.use, self.weight = use, nn.Parameter(torch.empty(shape, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.weight, x)


def by_path(path: str | None) -> Product:
    return Product((2, 32), lambda x, param: linear(x, param, path=path), functional.linear)


def transposed_by_path(path: str) -> Product:
    def times(x: Tensor, param: LowRank) -> Tensor:
        (part,) = transposed(View("w", (with_pending(param),))).parts
        return linear(x, part, path=path)

    return Product((2, 4), times, torch.matmul)


def stack_by_path(path: str) -> Product:
    def times(x: Tensor, param: LowRank) -> Tensor:
        return torch.vmap(lambda x, param: linear(x, param, path=path))(x, param)

    return Product((2, 2, 32), times, lambda x, weight: x @ weight.mT, (2,))


def rule(
    input_shape: tuple[int, ...],
    use: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, ...] = (4, 32),
    stack: tuple[int, ...] = (),
    recompute: bool = False,
) -> Product:
    """Return what a module does with its weight of a shape."""
    model = nn.Sequential(Uses(use, shape))
    model = remat(model, ["0"]) if recompute else model

    def times(x: Tensor, param: LowRank) -> Tensor:
        return call(model, {"0.weight": param}, x)

    return Product(input_shape, times, lambda x, weight: use(weight.reshape(shape), x), stack)


IDS = torch.tensor([[0, 3, 3], [1, 1, 0]])
PATHS: dict[str, Product] = {
    **{str(path): by_path(path) for path in ("factored", "merged", "dense")},
    **{f"transposed, {path}": transposed_by_path(path) for path in ("factored", "merged", "dense")},
    **{f"stack, {path}": stack_by_path(path) for path in ("factored", "merged")},
    "recomputed": rule((2, 32), lambda w, x: functional.linear(x, w), recompute=True),
}
RULES: dict[str, Product] = {
    "linear": rule((2, 32), lambda w, x: functional.linear(x, w, x[0, :4])),
    "@": rule((2, 4), lambda w, x: x @ w),
    "@ from the left": rule((32, 3), lambda w, x: w @ x),
    "mv": rule((32,), torch.mv),
    "addmm": rule((2, 4), lambda w, x: torch.addmm(x[0, :1].expand(32), x, w)),
    "addmm scaled": rule((2, 4), lambda w, x: torch.addmm(x[:, :1], x, w, beta=0.5, alpha=2)),
    "bmm": rule((2, 3, 4), lambda w, x: torch.bmm(x, w), (2, 4, 32), (2,)),
    "bmm from the left": rule((2, 32, 3), torch.bmm, (2, 4, 32), (2,)),
    "baddbmm": rule((2, 3, 4), lambda w, x: torch.baddbmm(x[..., :1], x, w), (2, 4, 32), (2,)),
    "mT": rule((2, 3, 32), lambda w, x: x @ w.mT, (2, 4, 32), (2,)),
    "einsum": rule((2, 32), lambda w, x: torch.einsum("bi,oi->bo", x, w)),
    "einsum, heads": rule((2, 3, 32), lambda w, x: torch.einsum("bsi,hdi->bhsd", x, w), (2, 4, 32), (2,)),
    "embedding": rule((3, 32), lambda w, x: functional.embedding(IDS, w) * x),
    "conv1d": rule((2, 16, 5), lambda w, x: functional.conv1d(x, w, stride=2, padding=1), (4, 16, 2)),
    "conv2d": rule((2, 8, 4, 3), lambda w, x: functional.conv2d(x, w, x[0, 0, :, 0]), (4, 8, 2, 2)),
    "conv3d": rule((1, 4, 3, 2, 3), lambda w, x: functional.conv3d(x, w), (4, 4, 2, 2, 2)),
    "rows": rule((3, 32), lambda w, x: w[IDS] * x),
    "a row": rule((30,), lambda w, x: w[-1, 1:31] * x),
    "slice": rule((2, 16), lambda w, x: functional.linear(x, w[1:4:2, 16:])),
    "one of a stack": rule((2, 32), lambda w, x: functional.linear(x, w[1]), (2, 4, 32), (2,)),
    "unbind": rule((2, 32), lambda w, x: sum(functional.linear(x, m) for m in w.unbind()), (2, 4, 32), (2,)),
    "chunk": rule((2, 32), lambda w, x: functional.linear(x, w.chunk(2)[1])),
    "heads by view": rule((2, 32), lambda w, x: torch.einsum("bi,hdi->bhd", x, w.view(2, 2, 32))),
    "heads by unflatten": rule((2, 3, 2), lambda w, x: torch.bmm(x, w.unflatten(0, (2, 2)))),
    "fused rows": rule((2, 32), lambda w, x: functional.linear(x, w), (8, 32), (2,)),
    "fused rows cut": rule((2, 32), lambda w, x: functional.linear(x, w.chunk(2)[1]), (8, 32), (2,)),
}
PRODUCTS = PATHS | RULES


# --- functions of three numbers


def waves(*shape: int) -> Tensor:
    """Return fixed numbers without a random operation, which `torch.vmap` refuses."""
    return (1.7 * torch.arange(prod(shape), dtype=torch.float64) + 0.4).sin().reshape(shape)


def functions(name: str, storage: Storage, by: str, waiting: int = 0, alpha: float = 1.0) -> tuple[Function, Function]:
    """Return a function of a low-rank weight, and one of the dense weight.

    Args:
        name: The product.
        storage: The storage of the base.
        by: What depends on the three numbers: "input", "factors", "base", "all of them", or "input and factors".
        waiting: The number of pending vectors.
        alpha: The alpha of the weight.
    """
    times = PRODUCTS[name]
    param = low_rank(SHAPE, times.stack, seed=1, storage=storage, waiting=waiting, alpha=alpha)
    dense_base = as_base(param.base).dequantize(torch.float64)
    x = normal(2, *times.input_shape)

    def moved(tensor: Tensor, v: Tensor, what: str) -> Tensor:
        if what not in by and by != "all of them":
            return tensor
        return (tensor + torch.tensordot(v, waves(3, *tensor.shape) / 4, dims=1)).to(tensor.dtype)

    def output(y: Tensor) -> Tensor:
        return (y.reshape(-1) @ waves(y.numel(), 3) / y.numel() ** 0.5).sin()

    def arguments(v: Tensor) -> tuple[Tensor, LowRank]:
        factors = param.factors._replace(b=moved(param.factors.b, v, "factors"), a=moved(param.factors.a, v, "factors"))
        return moved(x, v, "input").sin(), param._replace(factors=factors)

    def low_rank_function(v: Tensor) -> Tensor:
        x, new = arguments(v)
        base = moved(param.base, v, "base") if isinstance(param.base, Tensor) else param.base
        return output(times.low_rank(x, new._replace(base=base)))

    def dense_function(v: Tensor) -> Tensor:
        x, new = arguments(v)
        base = moved(param.base, v, "base").double() if isinstance(param.base, Tensor) else dense_base
        return output(times.dense(x, base + new.factors.b @ new.factors.a / param.divisor))

    return low_rank_function, dense_function


POINT = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def error_of(names: tuple[str, ...], pair: tuple[Function, Function]) -> float | None:
    """Return the largest relative error of a composition.

    Return None if torch refuses it for the dense weight too.
    """
    low_rank_function, dense_function = pair
    try:
        wanted = composed(names, dense_function)(POINT)
    except (RuntimeError, NotImplementedError):
        return None
    got = composed(names, low_rank_function)(POINT)
    assert got.shape == wanted.shape
    return ((got - wanted).abs().max() / wanted.abs().max()).item()

"""`is_attached` says whether a derivative by a tensor is tracked, at any level of any transform."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import forward_levels

X, T = torch.arange(1.0, 4), torch.ones(3)


def answers(transform: Callable[[Callable[..., Tensor]], Any]) -> list[bool]:
    """Return what `is_attached` says about the last argument of the function that is transformed."""
    found = []

    def function(*args: Tensor) -> Tensor:
        found.append(is_attached({"x": [args[-1]]}))
        return sum(arg.sin().sum() for arg in args)

    transform(function)
    return found


def with_gradient(f: Callable[[Tensor], Tensor]) -> None:
    f(X.clone().requires_grad_())


def with_tangent(f: Callable[[Tensor], Tensor]) -> None:
    with forward_ad.dual_level():
        f(forward_ad.make_dual(X, T))


ATTACHED: dict[str, Callable[..., Any]] = {
    "autograd": with_gradient,
    "dual": with_tangent,
    "grad": lambda f: grad(f)(X),
    "vjp": lambda f: vjp(f, X),
    "jvp": lambda f: jvp(f, (X,), (T,)),
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "linearize": lambda f: torch.func.linearize(f, X),
    "below vmap": lambda f: grad(lambda x: torch.vmap(f)(x).sum())(X),
    "tangent below vmap": lambda f: jvp(torch.vmap(f), (X,), (T,)),
    "below grad of another": lambda f: grad(lambda x: grad(f)(X, x).sum())(X),
    "below jvp of another": lambda f: grad(lambda x: jvp(lambda y: f(y, x), (X,), (T,))[1])(X),
    "tangent below grad of another": lambda f: jvp(lambda x: grad(f)(X, x).sum(), (X,), (T,)),
    "tangent below jvp of another": lambda f: jvp(lambda x: jvp(lambda y: f(y, x), (X,), (T,))[1], (X,), (T,)),
    "gradient below grad of another": lambda f: grad(f)(X, X.clone().requires_grad_()),
    "computed": lambda f: grad(lambda x: f(x.sin() * 2))(X),
}
DETACHED: dict[str, Callable[..., Any]] = {
    "plain": lambda f: f(X),
    "grad of another": lambda f: grad(f)(X, T),
    "jvp of another": lambda f: jvp(lambda x: f(x, T), (X,), (T,)),
    "jacfwd of another": lambda f: jacfwd(f)(X, T),
    "vmap": lambda f: torch.vmap(f)(X),
    "vmap below grad of another": lambda f: torch.vmap(grad(f))(X, T),
    "detached": lambda f: grad(lambda x: f(x, x.detach()))(X),
    "an integer": lambda f: grad(f)(X, torch.arange(3)),
    "without gradients": lambda f: torch.no_grad()(f)(X.clone().requires_grad_()),
    "grad without gradients": lambda f: grad(torch.no_grad()(f))(X),
}


@pytest.mark.parametrize("name", ATTACHED)
def test_a_tensor_that_is_differentiated_is_attached(name):
    # `linearize` calls the function once without tangents.
    assert answers(ATTACHED[name])[-1]


@pytest.mark.parametrize("name", DETACHED)
def test_other_tensors_are_not(name):
    found = answers(DETACHED[name])
    assert found
    assert not any(found)


def test_the_answer_is_complete_in_a_compiled_function_that_is_not_traced():
    found = []

    @torch.compiler.allow_in_graph
    def product(x: Tensor, y: Tensor) -> Tensor:
        found.append((is_attached(x), is_attached(y)))
        return x * y

    def nested(x: Tensor, y: Tensor) -> Tensor:
        return grad(lambda x: grad(lambda y: product(x, y).sum())(y).sin().sum())(x)

    compiled = torch.compile(nested, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, T), X.cos())
    assert set(found) == {(True, True)}


def test_levels_of_forward_mode_are_counted():
    found = []

    def f(x: Tensor) -> Tensor:
        found.append(forward_levels())
        return x.sin()

    f(X)
    jvp(f, (X,), (T,))
    jvp(lambda x: jvp(f, (x,), (T,))[1], (X,), (T,))
    jvp(grad(lambda y: jvp(f, (y,), (T,))[1].sum()), (X,), (T,))
    with_tangent(f)
    assert found == [0, 1, 2, 2, 1]

"""What several processes compute together is refused where a derivative by it would be lost."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.func import grad, jacrev, jvp

import dynlora_fn as dl
from dynlora_fn.optim import clip_by_global_norm, muon
from dynlora_fn.parallel import all_reduce_mean, shard, shard_factors
from dynlora_fn.testing import Shape, low_rank, normal, plan_of

X = normal(0, 3, 8, dtype=torch.float32)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Run each test in a group of one process."""
    dist.init_process_group(dl.parallel.register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def mean_square(x: torch.Tensor) -> torch.Tensor:
    return all_reduce_mean({"loss": x.square().sum()}, dist.group.WORLD)["loss"]


AVERAGES: dict[str, Callable[[], Any]] = {
    "grad": lambda: grad(mean_square)(X),
    "jvp": lambda: jvp(mean_square, (X,), (X,)),
    "grad of grad": lambda: grad(lambda x: grad(lambda y: mean_square(x) * y.sum())(x).sum())(X),
    "dual": lambda: dual(mean_square),
    "compiled": lambda: torch.compile(lambda x: jvp(mean_square, (x,), (x,)), backend="eager")(X),
}


def dual(f: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(X, X))


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_that_is_differentiated_is_refused(name):
    with pytest.raises(NotImplementedError, match=r"`tree` has a tensor at \['loss'\] inside of a transform"):
        AVERAGES[name]()


def test_an_average_beside_a_gradient_is_allowed():
    gradient, mean = grad(lambda x: (x.square().sum(), mean_square(x.detach())), has_aux=True)(X)
    torch.testing.assert_close(gradient, 2 * X)
    torch.testing.assert_close(all_reduce_mean(gradient, dist.group.WORLD), 2 * X)
    torch.testing.assert_close(mean, X.square().sum())


def test_derivatives_by_sharded_factors_are_refused_where_they_would_be_lost():
    param = low_rank(Shape(8, 8, 2), base_dtype=torch.float32, factor_dtype=torch.float32)
    sharded = shard_factors(shard({"w": param}, dist.group.WORLD))["w"]
    b = sharded.factors.b

    def output(x: torch.Tensor, b: torch.Tensor, path: str) -> torch.Tensor:
        return dl.linear(x, sharded._replace(factors=sharded.factors._replace(b=b)), path=path)

    for path in ("factored", "merged"):
        with pytest.raises(NotImplementedError, match="sharded factors, which forward-mode differentiation"):
            jvp(lambda b, path=path: output(X, b, path), (b,), (b,))
        with pytest.raises(NotImplementedError, match="sharded factors, which forward-mode differentiation"):
            jvp(lambda x, p=path: grad(lambda b: output(x, b, p).square().sum())(b), (X,), (X,))
        with pytest.raises(NotImplementedError, match=r"sharded factors, which `torch\.vmap` does not support"):
            jacrev(lambda b, path=path: output(X, b, path))(b)
    twice = jvp(lambda x: jvp(lambda x: output(x.sin(), b, "factored"), (x,), (X,))[1], (X,), (X,))[1]
    torch.testing.assert_close(twice, dl.linear(-X.sin() * X * X, param))


def test_derivatives_through_a_switch_of_sharded_factors_are_refused():
    params = {"w": low_rank(Shape(8, 8, 2))}
    sharded, plan = shard_factors(shard(params, dist.group.WORLD))["w"], plan_of(2, b=1, a=1)

    def base(a: torch.Tensor) -> torch.Tensor:
        switched = dl.switch(sharded._replace(factors=sharded.factors._replace(a=a)), plan)
        return switched.param.base.rows.sum()

    for derivative in (grad(base), lambda a: jvp(base, (a,), (a,))):
        with pytest.raises(NotImplementedError, match="factors of 'param' are sharded and require a gradient or have"):
            derivative(sharded.factors.a)


def test_forward_mode_through_sums_of_sharded_factors_is_refused():
    factors = shard_factors(shard({"w": low_rank(Shape(6, 8, 2))}, dist.group.WORLD))["w"].factors
    tree, optimizer = {"w": factors}, muon()
    opt_state = optimizer.init(tree)
    for function in (
        lambda tree: clip_by_global_norm(tree, 1.0).norm,
        lambda tree: optimizer.update(tree, opt_state, {"w": factors}, lr=0.1).updates["w"].b,
    ):
        with pytest.raises(NotImplementedError, match=r"sent to other processes is differentiated in forward mode"):
            jvp(function, (tree,), (tree,))


def test_gradients_of_reduced_tensors_have_torchs_formula():
    x = normal(0, 3).requires_grad_()
    gradient = torch.autograd.grad(all_reduce_mean({"x": x.sin()}, dist.group.WORLD)["x"].sum(), x)[0]
    torch.testing.assert_close(gradient, x.detach().cos())


def test_a_gradient_of_a_sum_of_sharded_factors_is_refused_under_torch_func():
    sharded = shard_factors(shard({"w": low_rank(Shape(8, 8, 2))}, dist.group.WORLD))["w"].factors
    with pytest.raises(NotImplementedError, match="sent to other processes is differentiated in forward mode or by"):
        grad(lambda b: clip_by_global_norm({"w": sharded._replace(b=b)}, 1.0).norm)(sharded.b)

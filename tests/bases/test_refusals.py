"""What is not supported is refused from one table, which the documentation prints."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn._core._types import Sharding
from dynlora_fn.bases import defer, quantize, to_torchao
from dynlora_fn.bases._refusals import REFUSALS
from dynlora_fn.parallel import shard, shard_factors, unshard
from dynlora_fn.switching import init_pool
from dynlora_fn.testing import Shape, low_rank, normal, plan_of
from tests.support.paths import ROOT
from tests.support.torchao_tensors import dense


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    """Run each test in a group of one process."""
    dist.init_process_group(dl.parallel.register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def single(out: int = 64, inner: int = 64, stack: tuple[int, ...] = ()) -> dl.LowRank:
    return low_rank(Shape(out, inner, 4), stack, base_dtype=torch.float32, factor_dtype=torch.float32)


def whole(base: str | None = None, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    params = {"w": single(stack=stack)}
    return params if base is None else quantize(params, base)


def sharded(base: str | None = None, stack: tuple[int, ...] = ()) -> dict[str, Any]:
    return shard(whole(base, stack), dist.group.WORLD)


def by_row() -> dl.LowRank:
    """Return nvfp4 codes that were folded into while they were sharded."""
    return unshard(dl.merge(sharded("nvfp4")))["w"]


def merged_product(params: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    return partial(dl.linear, param=params["w"], path="merged")


def differentiated(params: dict[str, Any]) -> dl.LowRank:
    """Return the weight with a base whose floating tensors all require a gradient."""
    base = tree_map(lambda leaf: leaf.clone().requires_grad_() if leaf.is_floating_point() else leaf, params["w"].base)
    return params["w"]._replace(base=base)


def factors_of(factors: Any) -> dl.LowRank:
    return shard_factors(sharded())["w"]._replace(factors=factors)


X = normal(0, 2, 3, 64, dtype=torch.float32)
REFUSED: dict[str, Callable[[], Any]] = {
    "nf4, shape": lambda: quantize({"w": single(7, 16)}, "nf4"),
    "float4, shape": lambda: quantize({"w": single(16, 24)}, "nvfp4"),
    "quantize, deferred": lambda: quantize(defer(whole(), vectors=4), "int8"),
    "quantize, sharded": lambda: quantize(sharded(), "int8"),
    "defer, deferred": lambda: defer(defer(whole(), vectors=4), vectors=4),
    "defer, sharded factors": lambda: defer(shard_factors(sharded()), vectors=4),
    "fold, deferred": lambda: dl.switch(defer(whole(), vectors=1), {"w": plan_of(4, b=1, a=1)}),
    "shard, sharded": lambda: shard(sharded("int8"), dist.group.WORLD),
    "shard, nf4": lambda: whole("nf4")["w"].base.by_rows("w", Sharding("none", 2, 0, 64)),  # as for two processes
    "shard_factors, base": lambda: shard_factors(whole()),
    "shard_factors, one side": lambda: shard_factors({"w": low_rank(Shape(64, 64, 4), trained="b")}),
    "pool, one side": lambda: init_pool({"w": low_rank(Shape(64, 64, 4), trained="b")}),
    "pool, sharded factors": lambda: init_pool(shard_factors(sharded())),
    "dense gradients, sharded factors": lambda: dl.optim.compensate(
        shard_factors(sharded()), {"w": torch.ones(64, 64)}, lr=0.1
    ),
    "vmap, sharded base": lambda: torch.vmap(dl.linear)(X, sharded("int8", (2,))["w"]),
    "vmap, sharded factors": lambda: torch.vmap(merged_product(shard_factors(sharded())))(X),
    "forward mode, sharded factors": lambda: torch.func.jvp(merged_product(shard_factors(sharded())), (X,), (X,)),
    "gradient, fold": lambda: dl.merge({"w": differentiated(whole("int8"))}),
    "gradient, quantize": lambda: quantize({"w": differentiated(whole())}, "int8"),
    "gradient, sharded factors": lambda: torch.func.grad(
        lambda factors: dl.switch({"w": factors_of(factors)}, {"w": plan_of(4, b=1, a=1)}).params["w"].base.base.sum()
    )(shard_factors(sharded())["w"].factors),
    "gradient, codes": lambda: dl.linear(X[0], differentiated(whole("int8"))),
    "gradient, sharded base": lambda: dl.linear(X[0], differentiated(sharded())),
    "torchao, stack": lambda: to_torchao(whole("int8", (2,))["w"]),
    "torchao, nvfp4 by row": lambda: to_torchao(by_row()),
}


@pytest.mark.parametrize("key", REFUSALS)
def test_each_is_refused_with_its_message(key):
    refusal = REFUSALS[key]
    beginning = refusal.message.split("{")[0]
    with pytest.raises(refusal.error) as raised:
        REFUSED[key]()
    message = str(raised.value)
    assert beginning in message
    assert "{" not in message
    assert "; " in message or ", so " in message, "say what to do"
    assert "{name" not in refusal.message or "'w'" in message


def test_the_documentation_prints_the_table():
    page = (ROOT / "dynlora_fn" / "bases" / "README.md").read_text()
    rows = [f"| {refusal.what} | {refusal.by} | `{refusal.error.__name__}` |" for refusal in REFUSALS.values()]
    table = page.split("| what | by | error |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert table.splitlines() == rows


def test_other_variants_are_refused_too():
    """The same combinations in other orders. Each failed deep inside torch or returned other values."""
    for params in (defer(sharded(), vectors=4), shard(defer(whole(), vectors=4), dist.group.WORLD)):
        with pytest.raises(ValueError, match="the factors of 'w' in `params` cannot be sharded"):
            shard_factors(params)
        with pytest.raises(ValueError, match="the base of 'w' in `params` is sharded already"):
            shard(params, dist.group.WORLD)
    with pytest.raises(ValueError, match="the factors of 'w' in `params` cannot be sharded"):
        shard_factors(shard_factors(sharded()))
    for mapped in (dl.materialize, lambda param: dl.linear(X[0], param, path="dense")):
        with pytest.raises(
            NotImplementedError, match=r"`params` has sharded bases, which `torch\.vmap` over the weights"
        ):
            torch.vmap(mapped)(sharded(stack=(2,))["w"])
    with pytest.raises(
        NotImplementedError, match=r"`params` has sharded factors, which `torch\.vmap` does not support"
    ):
        torch.vmap(dl.materialize)(shard_factors(sharded(stack=(2,)))["w"])


def test_mapping_over_the_input_of_a_sharded_weight_is_allowed():
    param = sharded("int8")["w"]
    got = torch.vmap(lambda x: dl.linear(x, param))(X)
    torch.testing.assert_close(got, dl.linear(X, whole("int8")["w"]))


@pytest.mark.parametrize("base", ["int8", "nf4", "nvfp4", "mxfp4", "float8"])
def test_bases_of_any_kind_go_to_torchao(base):
    """A base is gathered and folded into first. Without a fold into shards, nvfp4 has one factor again."""
    for params in (sharded(base), defer(whole(base), vectors=4), defer(sharded(base), vectors=4)):
        got, wanted = to_torchao(params["w"].base), to_torchao(whole(base)["w"].base)
        assert type(got) is type(wanted)
        assert torch.equal(dense(got), dense(wanted))


def test_unshard_keeps_weights_that_are_not_sharded():
    """nvfp4 codes with one factor for the weight failed here, deep inside torch."""
    for base in (None, "int8", "nf4", "nvfp4", "mxfp4"):
        params = whole(base)
        assert unshard(params)["w"].base is params["w"].base


@pytest.mark.parametrize("residual", ["none", "int4", "float16", False, torch.bfloat16, ()])
def test_an_unknown_residual_is_refused_everywhere(residual):
    weights = {"w": torch.ones(64, 64)}
    tensor = to_torchao(whole("int8")["w"].base)
    for function in (
        lambda: dl.init(weights, rank=4, seed=0, targets=["w"], base="int8", residual=residual),
        lambda: dl.init(weights, rank=4, seed=0, targets=["w"], residual=residual),
        lambda: quantize(whole(), "int8", residual=residual),
        lambda: quantize({}, "int8", residual=residual),
        lambda: dl.bases.from_torchao(tensor, residual=residual),
    ):
        with pytest.raises(ValueError, match=r"unknown `residual` .*; use 'int8', 'bfloat16' or None"):
            function()

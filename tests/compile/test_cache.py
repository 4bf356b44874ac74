"""A second start finds the graph of a step in torch's caches, and only if the step computes the same."""

import re
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.utils._pytree import tree_leaves

import dynlora_fn as dl
from dynlora_fn.compile._cache import _NEVER_CACHED, cache_options, library_key
from dynlora_fn.optim._formulas import key_of

LIBRARY = Path(dl.__file__).parent
# Their results depend on their arguments and on the library's sources only, so graphs with them may be cached.
PURE = {
    "bases/_ops._decoded",
    "bases/_sharded_factors._gather",
    "bases/_sharded_factors._scatter",
    "compile/_step._copy",
    "nn/_differentiate._only_leaves",
    "nn/_fallback._sum_in_graph",
    "nn/_linear._contract_in_graph",
    "nn/_linear_functions._times_base",
    "nn/_linear_functions.times_merged",
    "optim/_clip._squares",
    "optim/_elementwise._apply_in_graph",
    "optim/_elementwise._in_turn",
    "optim/_roots.divide",
    "optim/_roots.square_root",
    "optim/_state_rules._replace_sides",
    "optim/_state_rules._switched_slots",
    "switching/_switch._switch_in_graph",
    "switching/_weight._vectors_in_graph",
}


def switching_step(optimizer):
    """Return a step with a switch, and a function that makes its arguments."""
    params = dl.init({"w": torch.zeros(4, 3)}, rank=2, seed=0, targets=["w"])
    plan = dl.schedules.every(1, 1)(1, params)
    grads = {"w": dl.Factors(torch.full((4, 2), 0.5), torch.full((2, 3), 2.0))}

    def step(state, plan, grads, lr):
        params, opt_state = state
        params, _ = dl.switch(params, plan)
        trainable, frozen = dl.partition(params)
        opt_state = dl.project_optimizer_state(opt_state, plan)
        updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
        return (dl.combine(dl.apply_updates(trainable, updates), frozen), opt_state), None

    opt_state = optimizer.init(dl.partition(params).trainable)
    return step, ((params, opt_state), plan, grads, torch.tensor(0.1))


def autocast_step(dtype):
    """Return a step with a product under autocast, and its arguments."""

    def step(state, x):
        with torch.autocast("cpu", dtype):
            return state + x @ x, None

    return step, (torch.ones(3, 3), torch.full((3, 3), 0.3))


def hits_of(step, args):
    """Return how often AOTAutograd found the graph of a new start in its cache. Check the step's values."""
    wanted = step(*args)[0]
    torch.compiler.reset()
    counters.clear()
    torch.testing.assert_close(tree_leaves(dl.compile_step(step, donate=False)(*args).state), tree_leaves(wanted))
    assert not counters["aot_autograd"]["autograd_cache_bypass"]
    return counters["aot_autograd"]["autograd_cache_hit"]


@pytest.mark.inductor
@pytest.mark.skipif(not cache_options(), reason="graphs with functions of the library are cached from torch 2.13 on")
def test_a_second_start_compiles_nothing_if_the_optimizer_is_the_same():
    with fresh_cache():
        assert hits_of(*switching_step(dl.optim.adamw())) == 0
        assert hits_of(*switching_step(dl.optim.adamw())) == 1
        assert hits_of(*switching_step(dl.optim.adamw(betas=(0.5, 0.999)))) == 0  # its formula captures another number


@pytest.mark.inductor
@pytest.mark.skipif(not cache_options(), reason="graphs with functions of the library are cached from torch 2.13 on")
def test_a_second_start_compiles_nothing_if_autocast_is_the_same():
    with fresh_cache():
        assert hits_of(*autocast_step(torch.bfloat16)) == 0
        assert hits_of(*autocast_step(torch.bfloat16)) == 1
        assert hits_of(*autocast_step(torch.float16)) == 0


def test_every_function_in_a_graph_is_known_to_be_pure():
    """A new one belongs into `PURE`, or into `_NEVER_CACHED` if it reads anything but its arguments."""
    found = set()
    for path in LIBRARY.rglob("*.py"):
        names = re.findall(r"^@torch\.compiler\.allow_in_graph.*\ndef (\w+)", path.read_text(), re.MULTILINE)
        found |= {f"{path.relative_to(LIBRARY).with_suffix('')}.{name}" for name in names}
        assert len(names) == len(re.findall(r"@\S*allow_in_graph", path.read_text())), path
    never = {name.removeprefix("dynlora_fn.").replace(".", "/", 1) for name in _NEVER_CACHED}
    assert found == PURE | never


def test_a_function_that_reads_tables_of_the_process_is_never_cached():
    for cacheable in cache_options().values():
        assert "dynlora_fn.nn._remat._recompute" not in cacheable
        assert "dynlora_fn.switching._switch._switch_in_graph" in cacheable
        assert "other.function" not in cacheable


def test_nothing_is_cached_inside_a_transform():
    assert library_key()
    assert torch.func.grad(lambda x: x * (library_key() is None))(torch.ones(())) == 1


def test_the_key_changes_with_the_default_dtype():
    before = library_key()
    torch.set_default_dtype(torch.float64)
    try:
        assert library_key() != before
    finally:
        torch.set_default_dtype(torch.float32)
    assert library_key() == before


def test_the_key_of_a_formula_has_all_values_that_it_captures():
    def make(captured):
        def inner():
            return captured

        return lambda: (captured, inner)

    values = (1, 1.0, True, None, "a", (1, 2), (1, (2, 0.1)), 0.30000000000000004, 0.3)
    assert len({key_of(make(value)) for value in values}) == len(values)
    assert key_of(make((1, 0.5))) == key_of(make((1, 0.5)))
    with pytest.raises(TypeError, match="captures a Tensor; pass it in `settings`"):
        key_of(make(torch.zeros(())))

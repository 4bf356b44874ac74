"""Check transforms under `torch.compile` and `torch.vmap`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_number
from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import LowRank, Plan, SidePlan
from dynlora_fn.testing._compare import assert_same, pairs
from dynlora_fn.testing._promises import Arguments, arguments_of, hold, takes_a_plan
from dynlora_fn.testing._strategies import low_rank_params, plans
from dynlora_fn.testing._values import side_plan

Transform = Callable[..., Any]


def check_compiles(
    transform: Transform,
    *,
    arguments: Arguments = None,
    examples: int = 3,
    backend: str = "aot_eager",
    tolerance: float = 0.0,
) -> None:
    """Check that a transform compiles to one graph and gives the eager result.

    The graph serves other values and plans of equal shapes without a recompile.

    Args:
        transform: A function of a weight, or of a weight and a plan.
        arguments: A strategy for its arguments, or a tuple of them. The checker also makes weights and plans with other
            values from them. Default None draws arguments of all kinds.
        examples: The number of examples to draw. Each is compiled, so a failing example is not shrunk.
        backend: The backend of `torch.compile`. "aot_eager" needs no compiler and rounds as eager mode does.
        tolerance: The largest error, in multiples of eps of a tensor's largest entry. 0 requires the same bits.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives an example.
        TypeError: If an argument of the checker has a wrong type.
        ValueError: If `tolerance` is negative or not finite, `examples` is less than 1, or `arguments` is empty.

    Example:
        >>> import dynlora_fn as dl
        >>> check_compiles(dl.merge, examples=1)
    """
    tolerance = check_number("tolerance", tolerance, least=0)

    def check(*args: Any) -> None:
        def run(*args: Any) -> Any:
            return transform(*args)

        run.__code__ = run.__code__.replace()  # a new code object: the compiler caches graphs by it
        compiled = torch.compile(run, fullgraph=True, dynamic=False, backend=backend)
        first, *others = (tuple(_with_values(arg, seed) for arg in args) for seed in range(3))
        _assert_near(compiled(*first), transform(*first), tolerance)
        with torch.compiler.set_stance("fail_on_recompile"):
            for other in others:
                _assert_near(compiled(*other), transform(*other), tolerance)

    promise = "one graph, no recompile, the eager result"
    hold(promise, check, arguments_of(transform, arguments), examples, is_slow=True)


def check_vmap(
    transform: Transform, *, arguments: Arguments = None, examples: int | None = None, tolerance: float = 0.0
) -> None:
    """Check that a transform of a stack gives the stack of its transformed members.

    The transform is called both on the whole stack and through `torch.vmap`.

    Args:
        transform: A function of a weight, or of a weight and a plan.
        arguments: A strategy for its arguments, or a tuple of them. The first axis of every tensor with axes must be
            the stack's. Default None draws arguments of all kinds.
        examples: The number of examples to draw. Default None takes it from the hypothesis profile.
        tolerance: The largest error, as in `check_compiles`.

    Raises:
        BrokenPromiseError: If the promise is broken. The message gives the smallest example.

    Example:
        >>> import dynlora_fn as dl
        >>> check_vmap(dl.merge)
    """
    check_callable("transform", transform)
    tolerance = check_number("tolerance", tolerance, least=0)

    def check(*args: Any) -> None:
        size = _stack_size(args)
        members = [tree_map(lambda leaf: leaf[index] if _has_axes(leaf) else leaf, args) for index in range(size)]  # noqa: B023
        looped = tree_map(lambda *leaves: torch.stack(leaves), *(transform(*member) for member in members))
        _assert_near(transform(*args), looped, tolerance)
        in_dims = tree_map(lambda leaf: 0 if _has_axes(leaf) else None, args)
        _assert_near(torch.vmap(transform, in_dims=in_dims)(*args), looped, tolerance)

    if arguments is None:
        weights = low_rank_params(stacks=st.sampled_from([(1,), (3,), (3, 2)]))
        arguments = st.tuples(weights)
        if takes_a_plan(transform):
            arguments = weights.flatmap(
                lambda param: st.tuples(st.just(param), plans(param).map(_plan_for_each_member(param)))
            )
    hold("a stack gives the stack of its members' results", check, arguments, examples)


def _has_axes(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _stack_size(args: tuple[Any, ...]) -> int:
    sizes = {leaf.shape[0] for leaf in tree_leaves(args) if _has_axes(leaf)}
    if len(sizes) != 1:
        raise ValueError(f"`arguments` has tensors whose first axes have the sizes {sorted(sizes)}; pass a stack")
    return int(*sizes)


def _plan_for_each_member(param: LowRank) -> Callable[[Plan], Plan]:
    """Return a function that expands a plan for the stack along the stack's axes."""
    stack = param.seed.shape

    def expanded(plan: Plan) -> Plan:
        b, a = (SidePlan(*(leaf.broadcast_to(*stack, -1) for leaf in side)) for side in (plan.b, plan.a))
        return Plan(b, a, plan.frozen_for)

    return expanded


def _with_values(tree: Any, seed: int) -> Any:
    """Return copies of weights and plans with other values of the same shapes."""
    if isinstance(tree, Mapping):
        return {name: _with_values(leaf, seed) for name, leaf in tree.items()}
    if isinstance(tree, Plan):
        return Plan(_other_side(tree.b, seed), _other_side(tree.a, seed), (tree.frozen_for + seed) % 7)
    if not isinstance(tree, LowRank):
        return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)
    generator = torch.Generator().manual_seed(seed)
    factor = 0.5 + torch.rand((), generator=generator, dtype=torch.float64)
    factors = tree_map(lambda leaf: (leaf * factor).to(leaf.dtype), tree.factors)
    return tree._replace(factors=factors, seed=torch.randint_like(tree.seed, 2**62, generator=generator))


def _other_side(side: SidePlan, seed: int) -> SidePlan:
    """Return a random side plan with as many entries, about half of them active.

    The slots stay in the range of the old slots, or below the number of entries.
    """
    *stack, count = side.slots.shape
    rank = int(side.slots.max()) + 1 if side.slots.numel() else 0
    return side_plan(max(rank, count), count, tuple(stack), seed, share_active=0.5)


def _assert_near(got: Any, wanted: Any, tolerance: float) -> None:
    if not tolerance:
        assert_same(got, wanted)
        return
    for path, left, right in pairs(got, wanted):
        if isinstance(right, Tensor) and right.is_floating_point() and right.numel():
            wide = right.double()  # float8 has no maximum
            bound = tolerance * torch.finfo(right.dtype).eps * wide.abs().masked_fill(wide.isinf(), 0).max()
            error = torch.where(left.double() == wide, 0, (left.double() - wide).abs()).max()
            assert error <= bound, f"{path} is off by {error:.2e}, more than {bound:.2e}"
        else:
            assert_same(left, right)

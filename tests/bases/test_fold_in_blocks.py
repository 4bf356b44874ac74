"""A fold into a plain base has the same bits in blocks of newly allocated memory, and in one pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from dynlora_fn.bases import _fold
from dynlora_fn.bases._fold import fold
from dynlora_fn.testing import assert_same, dtypes, normal, seeds, untouched
from tests.support.modes import PlainMode

stacks = st.sampled_from([(), (3,), (2, 2), (0,)])
counts = st.sampled_from([0, 1, 2, 7, 32, 33])


sizes = st.integers(1, 9)


@given(stacks, sizes, sizes, counts, seeds, st.tuples(dtypes, dtypes, dtypes), st.integers(1, 99))
def test_blocks_have_the_bits_of_one_pass(stack, rows, columns, count, seed, some_dtypes, block):
    """A mode that sees every operation, as a tracer does, takes one pass."""
    base_dtype, dtype, new_dtype = some_dtypes
    base = normal(seed, *stack, rows, columns, dtype=base_dtype)
    left, right = normal(seed, *stack, rows, count, dtype=dtype), normal(seed, *stack, count, columns, dtype=dtype)
    with PlainMode():
        wanted = fold(base, left, right, divisor=3, dtype=new_dtype)
    with pytest.MonkeyPatch.context() as patch, untouched((base, left, right)):
        patch.setattr(_fold, "_BLOCK", block)
        assert_same(fold(base, left, right, divisor=3, dtype=new_dtype), wanted)
        assert_same(fold(base, left, right, divisor=3, out=torch.empty_like(wanted)), wanted)


@pytest.mark.parametrize("count", [2, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_may_write_into_its_base(count, dtype):
    base, left, right = normal(0, 3, 8, 6, dtype=dtype), normal(1, 3, 8, count), normal(2, 3, count, 6)
    wanted = fold(base, left, right, divisor=2)
    assert fold(base, left, right, divisor=2, out=base) is base
    assert_same(base, wanted)


class Sizes(TorchFunctionMode):
    """Notes the sizes of all results that are not in the memory of a tensor."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.storage, self.sizes = tensor.untyped_storage().data_ptr(), [0]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.storage:
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("stack", [(), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fold_into_its_base_needs_the_memory_of_one_block(stack, dtype):
    base, left, right = normal(0, *stack, 8, 6, dtype=dtype), normal(1, *stack, 8, 2), normal(2, *stack, 2, 6)
    with pytest.MonkeyPatch.context() as patch, Sizes(base) as mode:
        patch.setattr(_fold, "_BLOCK", 12)
        fold(base, left, right, divisor=2, out=base)
    assert max(mode.sizes) < base.numel()


@pytest.mark.parametrize("count", [2, 33])
def test_a_transposed_base_is_folded_into(count):
    base, left, right = normal(0, 2, 6, 8).mT, normal(1, 2, 8, count), normal(2, 2, count, 6)
    assert_same(fold(base, left, right, divisor=2), fold(base.contiguous(), left, right, divisor=2))


@pytest.mark.parametrize("count", [2, 33])
def test_derivatives_pass_through_a_fold(count):
    base, left, right = normal(0, 4, 3), normal(1, 4, count), normal(2, count, 3)
    leaves = [tensor.clone().requires_grad_() for tensor in (base, left, right)]
    grads = torch.autograd.grad(fold(*leaves, divisor=2).square().sum(), leaves)
    wanted = torch.func.grad(lambda *args: fold(*args, divisor=2).square().sum(), (0, 1, 2))(base, left, right)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other)
    assert_same(
        torch.vmap(lambda b, a: fold(base, b, a, divisor=2))(left[None], right[None])[0],
        fold(base, left, right, divisor=2),
    )

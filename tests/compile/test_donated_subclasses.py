"""States with tensor subclasses, such as torchao's, are donated down to their inner tensors."""

from functools import partial

import pytest
import torch
from torchao.quantization import Float8Tensor, Int8Tensor
from torchao.quantization.granularity import PerRow
from torchao.quantization.quantize_.common import KernelPreference

from dynlora_fn import compile_step
from dynlora_fn.testing import assert_same, normal

X = normal(1, 8, 16, dtype=torch.float32)


# With the default preference torchao looks for a package, which Dynamo of torch 2.11 cannot trace.
FLOAT8 = partial(Float8Tensor.from_hp, kernel_preference=KernelPreference.TORCH)


@pytest.fixture(params=[Int8Tensor.from_hp, FLOAT8], ids=["Int8Tensor", "Float8Tensor"])
def quantize(request):
    return lambda weight: request.param(weight, granularity=PerRow())


def step_of(quantize):
    def step(state, x):
        weight, count = state
        return (quantize(weight.dequantize() + x), count + 1), weight.dequantize().sum()

    return step


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_a_step_writes_into_the_tensors_inside(quantize, backend):
    step, weight = step_of(quantize), quantize(X)
    expected, aux = step((weight, torch.tensor(0)), X)
    inside = [weight.qdata, weight.scale]
    state, got = compile_step(step, backend=backend)((weight, torch.tensor(0)), X)
    assert state[0] is weight
    assert_same([weight.qdata, weight.scale], [expected[0].qdata, expected[0].scale])
    assert all(old is new for old, new in zip(inside, [weight.qdata, weight.scale], strict=True))
    torch.testing.assert_close(got, aux)


def test_arguments_stay_without_donation(quantize):
    weight = quantize(X)
    before = [weight.qdata.clone(), weight.scale.clone()]
    compile_step(step_of(quantize), donate=False, backend="aot_eager")((weight, torch.tensor(0)), X)
    assert_same([weight.qdata, weight.scale], before)


def test_use_of_a_consumed_one_is_caught(quantize):
    step, weight = step_of(quantize), quantize(X)
    expected, _ = step((weight, torch.tensor(0)), X)
    state, _ = compile_step(step, debug=True, backend="aot_eager")((weight, torch.tensor(0)), X)
    assert_same(state[0].dequantize(), expected[0].dequantize())
    with pytest.raises(RuntimeError, match=r"was written over by a step, and `dequantize` uses it"):
        weight.dequantize()


def test_an_expanded_tensor_inside_is_refused(quantize):
    weight = quantize(X)
    weight.scale = weight.scale[:1].expand_as(weight.scale)
    with pytest.raises(ValueError, match=r"`state` tensor at \[0\] is expanded"):
        compile_step(lambda state: (state, None), backend="aot_eager")((weight,))


def test_memory_that_is_held_twice_is_refused(quantize):
    weight = quantize(X)
    with pytest.raises(ValueError, match="share memory"):
        compile_step(lambda state: (state, None), backend="aot_eager")((weight, weight.qdata))

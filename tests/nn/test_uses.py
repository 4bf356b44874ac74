"""A weight that is used in any other way equals the dense weight, and its gradients reach the factors."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynlora_fn import LowRank, call, combine, partition, value_and_grad
from dynlora_fn.bases import quantize
from dynlora_fn.testing import Shape, low_rank
from tests.support.use_table import COVERED, DENSE, USES
from tests.support.uses import NUMBERS, TOLERANCE, Uses, dense

pytestmark = pytest.mark.filterwarnings("ignore:low-rank weight")


def setting(name: str) -> tuple[Uses, LowRank]:
    shape, (*stack, rows, columns), use = USES[name]
    return Uses(use, shape), low_rank(Shape(rows, columns, min(2, rows, columns)), tuple(stack), seed=3)


def weighed(output: Tensor) -> Tensor:
    return (output * NUMBERS[: output.numel()].reshape(output.shape)).sum()


def dense_output(model: Uses, param: LowRank) -> Tensor:
    return functional_call(model, {"weight": dense(param, model.weight.shape)})


@pytest.mark.parametrize("via", ["func", "autograd"])
@pytest.mark.parametrize("name", USES)
def test_values_and_gradients_are_those_of_the_dense_weight(name, via):
    model, param = setting(name)
    trainable, frozen = partition({"weight": param})

    def loss_fn(tree, fallback="raise" if name in COVERED else "dense"):
        output = call(model, combine(tree, frozen), fallback=fallback)
        return weighed(output), output

    def dense_loss_fn(tree):
        output = dense_output(model, param._replace(factors=tree["weight"]))
        return weighed(output), output

    (_, got), grads = value_and_grad(loss_fn, via=via, has_aux=True)(trainable)
    (_, wanted), wanted_grads = value_and_grad(dense_loss_fn, via="autograd", has_aux=True)(trainable)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if "float()" in name or "cast" in name else TOLERANCE
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-9, atol=tolerance["atol"])


# Only the gradient of a custom function needs the dense weight.
@pytest.mark.parametrize("name", sorted(DENSE.keys() - {"custom function"}))
def test_what_gets_the_dense_weight_is_refused_on_request(name):
    model, param = setting(name)
    with pytest.raises(NotImplementedError, match="low-rank weight 'weight' is used in `"):
        call(model, {"weight": param}, fallback="raise")


# torch has no forward mode for these, or the module draws no batch.
NO_TANGENT = {"embedding_bag", "embedding_bag sum", "embedding_bag offsets", "embedding_bag max", "custom function"}
NO_TANGENT |= {"straight through", "quantized fake", "cdist"}


@pytest.mark.parametrize("name", sorted(USES.keys() - NO_TANGENT))
def test_tangents_are_those_of_the_dense_weight(name):
    model, param = setting(name)
    factors = param.factors

    def of(function):
        return torch.func.jvp(lambda tree: function(param._replace(factors=tree)), (factors,), (factors,))

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of torch 2.14 has no forward mode
        got, wanted = of(lambda weight: call(model, {"weight": weight})), of(lambda weight: dense_output(model, weight))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "names", [["mask", "contiguous", "mul tensor", "squeeze"], ["straight through", "map", "weight norm"]]
)
@pytest.mark.parametrize("base", ["plain", "int8"])
def test_one_graph_has_the_same_gradients(names, base):
    names = [name for name in names if name in USES]
    settings = {name: setting(name) for name in names}
    params = {name: param if base == "plain" else quantize(param, base) for name, (_, param) in settings.items()}
    trainable, frozen = partition(params)

    def loss_fn(tree):
        whole = combine(tree, frozen)
        return sum(weighed(call(settings[name][0], {"weight": whole[name]})) for name in names)

    function = value_and_grad(loss_fn)
    got = torch.compile(function, backend="aot_eager", fullgraph=True)(trainable)
    torch.testing.assert_close(got, function(trainable), rtol=1e-9, atol=1e-9)

"""torchao's tensors go in as they are and come out bit for bit."""

import pytest
import torch
from strategies import assert_same, normal
from test_formats import dense
from torch import Tensor, nn

import dynlora_fn as dl
from dynlora_fn import from_torchao, init, to_torchao, unstack

torchao = pytest.importorskip("torchao.quantization")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


def quantized(kind: str) -> nn.Sequential:
    """As torchao quantizes a model."""
    model = network()
    if kind == "nf4":
        for layer in model[::2]:
            layer.weight = nn.Parameter(torchao.to_nf4(layer.weight.detach(), 64, 32), requires_grad=False)
    else:
        config = {"int8": torchao.Int8WeightOnlyConfig, "float8": torchao.Float8WeightOnlyConfig}[kind]
        torchao.quantize_(model, config())
    return model


def inner(tensor: Tensor) -> tuple[dict[str, Tensor], object]:
    names, context = tensor.detach().__tensor_flatten__()
    return {name: getattr(tensor, name).flatten().clone() for name in names}, context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_there_and_back_keeps_every_bit(kind, dtype):
    weight = normal(0, 64, 64, dtype=dtype)
    if kind == "nf4":
        tensor = torchao.to_nf4(weight, 64, 32)
    else:
        made = torchao.Int8Tensor if kind == "int8" else torchao.Float8Tensor
        tensor = made.from_hp(weight, granularity=torchao.PerRow())
    back = to_torchao(from_torchao(tensor))
    assert type(back) is type(tensor)
    assert back.dtype == dtype
    assert_same(inner(back), inner(tensor))
    assert_same(dense(back), dense(tensor))


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_a_model_that_torchao_quantized_goes_in_as_it_is(kind):
    model, targets = quantized(kind), ["0.weight", "2.weight"]
    params = init(model, rank=4, seed=0, targets=targets, start="lora")
    assert {name for name, param in params.items() if isinstance(param, dl.LowRank)} == set(targets)
    state = to_torchao(params)
    for name in targets:
        assert_same(inner(state[name]), inner(dict(model.named_parameters())[name]))
    assert_same(state["4.weight"], dense(model[4].weight))  # no target: dense, to be trained
    switched = unstack(init(model, rank=4, seed=0, targets=targets))
    x = normal(1, 5, 64, dtype=torch.float32)
    got, wanted = dl.call(network(), switched, x), dl.call(network(), dl.materialize(unstack(params)), x)
    # Quantized anew with the product taken out: another quantization error, of up to a fifth of nf4's largest numbers.
    assert (got - wanted).norm() < {"int8": 0.02, "float8": 0.1, "nf4": 0.3}[kind] * wanted.norm()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchaos_configurations_name_formats(config):
    made = getattr(torchao, config)()
    params = init(network(), rank=4, seed=0, targets=["*.weight"], base=made)
    assert_same(params, init(network(), rank=4, seed=0, targets=["*.weight"], base=config[:-16].lower()))
    with pytest.raises(ValueError, match="`base` must be one of"):
        init(
            network(),
            rank=4,
            seed=0,
            targets=["*.weight"],
            base=getattr(torchao, config)(granularity=torchao.PerTensor()),
        )


@pytest.mark.parametrize(
    "tensor",
    [
        lambda weight: weight,
        lambda weight: torchao.Int8Tensor.from_hp(weight, granularity=torchao.PerTensor()),
        lambda weight: torchao.Int8Tensor.from_hp(weight, granularity=torchao.PerRow(), reduce_range=True),
        lambda weight: torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerTensor()),
    ],
)
def test_what_would_lose_something_is_refused(tensor):
    with pytest.raises(ValueError, match="weight 'w' must be a matrix in torchao's Int8Tensor or Float8Tensor"):
        from_torchao(tensor(normal(0, 64, 64, dtype=torch.float32)), name="w")


def test_a_stack_is_no_tensor_of_torchaos():
    params = init(network(), rank=4, seed=0, targets=["0.weight", "2.weight"], base="int8", stack=False)
    whole = dl.bases.restack([params["0.weight"].base, params["2.weight"].base], (2,))
    with pytest.raises(
        ValueError, match=r"`params` must be a single weight to be torchao's, got a stack .*\(2, 64, 64\)"
    ):
        to_torchao(whole)

"""torchao's tensors go in as they are and come out bit for bit."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import dynlora_fn as dl
from dynlora_fn import init, unstack
from dynlora_fn._core._types import FrozenTensor
from dynlora_fn.bases import from_torchao, quantize, to_torchao
from dynlora_fn.bases._formats import FORMATS, PROTOTYPES
from dynlora_fn.bases._stacks import stack_bases
from dynlora_fn.testing import Shape, assert_same, low_rank, normal
from tests.support.paths import ROOT
from tests.support.torchao_tensors import dense, prototype

torchao = pytest.importorskip("torchao.quantization")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


def quantized(kind: str) -> nn.Sequential:
    """Quantize a model with torchao."""
    model = network()
    if kind == "nf4":
        for layer in model[::2]:
            layer.weight = nn.Parameter(torchao.to_nf4(layer.weight.detach(), 64, 32), requires_grad=False)
    elif kind == "nvfp4":
        torchao.quantize_(model, prototype_config())
    else:
        config = {"int8": torchao.Int8WeightOnlyConfig, "float8": torchao.Float8WeightOnlyConfig}[kind]
        torchao.quantize_(model, config())
    return model


def prototype_config(**options: bool) -> object:
    return pytest.importorskip("torchao.prototype.mx_formats").NVFP4WeightOnlyConfig(**options)


def inner(tensor: Tensor) -> tuple[dict[str, Tensor], str]:
    names, context = tensor.detach().__tensor_flatten__()
    # As bytes: nothing compares float8_e8m0fnu.
    return {name: getattr(tensor, name).flatten().clone().view(torch.uint8) for name in names}, str(context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [name for name in FORMATS if name != "bfloat16"])
def test_there_and_back_keeps_every_bit(kind, dtype):
    weight = normal(0, 64, 64, dtype=dtype)
    if kind in PROTOTYPES:
        tensor = prototype(weight, kind)
    elif kind == "nf4":
        tensor = torchao.to_nf4(weight, 64, 32)
    else:
        tensor_type = torchao.Int8Tensor if kind == "int8" else torchao.Float8Tensor
        tensor = tensor_type.from_hp(weight, granularity=torchao.PerRow())
    back = to_torchao(from_torchao(tensor))
    assert type(back) is type(tensor)
    assert back.dtype == dtype
    assert_same(inner(back), inner(tensor))
    assert_same(dense(back), dense(tensor))


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "nvfp4"])
def test_a_model_that_torchao_quantized_goes_in_as_it_is(kind):
    model, targets = quantized(kind), ["0.weight", "2.weight"]
    params = init(model, rank=4, seed=0, targets=targets, start="lora")
    assert {name for name, param in params.items() if isinstance(param, dl.LowRank)} == set(targets)
    state = to_torchao(params)
    for name in targets:
        assert_same(inner(state[name]), inner(dict(model.named_parameters())[name]))
    assert_same(state["4.weight"], dense(model[4].weight))  # not a target, so it stays dense and trainable
    switched = unstack(init(model, rank=4, seed=0, targets=targets))
    x = normal(1, 5, 64, dtype=torch.float32)
    got, wanted = dl.call(network(), switched, x), dl.call(network(), dl.materialize(unstack(params)), x)
    # Quantized again without the product: the error changes by up to a fifth of nf4's largest values.
    assert (got - wanted).norm() < {"int8": 0.02, "float8": 0.1, "nf4": 0.3, "nvfp4": 0.3}[kind] * wanted.norm()


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchaos_configurations_name_formats(config):
    torchao_config = getattr(torchao, config)()
    params = init(network(), rank=4, seed=0, targets=["*.weight"], base=torchao_config)
    assert_same(params, init(network(), rank=4, seed=0, targets=["*.weight"], base=config[:-16].lower()))
    with pytest.raises(ValueError, match=r"unknown `base` .*; use one of"):
        init(
            network(),
            rank=4,
            seed=0,
            targets=["*.weight"],
            base=getattr(torchao, config)(granularity=torchao.PerTensor()),
        )


def test_a_prototypes_configuration_names_its_format():
    got = init(network(), rank=4, seed=0, targets=["*.weight"], base=prototype_config())
    assert_same(got, init(network(), rank=4, seed=0, targets=["*.weight"], base="nvfp4"))
    single = prototype_config(use_dynamic_per_tensor_scale=False)
    with pytest.raises(ValueError, match=r"unknown `base` .*; use one of .* \(prototypes in torchao\)"):
        init(network(), rank=4, seed=0, targets=["*.weight"], base=single)


@pytest.mark.parametrize("shape", [(16, 16), (130, 80), (256, 64)])
def test_scales_in_tiles_stay_in_tiles(shape):
    """The layout is NVFP4WeightOnlyConfig's, for full and partial tiles of 128 rows and 4 blocks."""
    weight = normal(0, *shape, dtype=torch.float32)
    layer = nn.Linear(*reversed(shape), bias=False)
    layer.weight = nn.Parameter(weight)
    if shape[0] % 16 == 0:
        torchao.quantize_(layer, prototype_config())
        tensor = layer.weight.detach()
    else:
        nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        factor = nvfp4.per_tensor_amax_to_scale(weight.abs().max())
        tensor = nvfp4.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=factor, is_swizzled_scales=True)
    base = from_torchao(tensor)
    assert tensor.is_swizzled_scales
    assert_same(inner(to_torchao(base)), inner(tensor))
    assert_same(base.dequantize(torch.float32), tensor.dequantize(torch.float32))
    plain = FORMATS["nvfp4"].empty("w", weight).encode(weight)
    assert_same(base.codes.encode(weight), base.codes)
    assert_same(plain.decode(torch.float32), base.dequantize(torch.float32))


def test_prototypes_are_imported_where_they_are_asked_for_alone():
    """Where torchao has moved a prototype, the function that needs it raises an error that says so."""
    script = """
import sys, torch
import dynlora_fn as dl
param = dl.init({"w": torch.ones(32, 32)}, rank=2, seed=0, targets=["w"], base="int8")["w"]
dl.bases.to_torchao(param)
held = dl.bases.quantize(param, "mxfp4"), dl.bases.quantize(param, "nvfp4")
[dl.merge(one) for one in held]
assert not [name for name in sys.modules if name.startswith("torchao.prototype.mx_formats")]
sys.modules["torchao.prototype.mx_formats.mx_tensor"] = None
for one in held:
    try:
        dl.bases.to_torchao(one)
    except ImportError as error:
        assert "are not in torchao.prototype.mx_formats, where torchao 0.18 has them (" in str(error)
    else:
        raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_prototypes_that_would_lose_something_are_refused():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = normal(0, 64, 64, dtype=torch.float32)
    factor = nvfp4.per_tensor_amax_to_scale(weight.abs().max())
    to_nvfp4 = nvfp4.NVFP4Tensor.to_nvfp4
    packed = torch.float4_e2m1fn_x2
    for tensor in (
        to_nvfp4(weight),
        to_nvfp4(weight, per_tensor_scale=factor).t(),
        to_nvfp4(weight, per_tensor_scale=factor, act_per_tensor_scale=factor),
        to_nvfp4(weight, per_tensor_scale=factor, act_quant_kwargs=nvfp4.QuantizeTensorToNVFP4Kwargs()),
        mx.MXTensor.to_mx(weight, torch.float8_e4m3fn, 32),
        mx.MXTensor.to_mx(weight, packed, 32, is_swizzled_scales=True),
        mx.MXTensor.to_mx(weight, packed, 32, act_quant_kwargs=mx.QuantizeTensorToMXKwargs()),
    ):
        with pytest.raises(
            ValueError, match=r"weight 'w' is a .* cannot be a base; .* prototypes NVFP4Tensor or MXTensor"
        ):
            from_torchao(tensor, name="w")
    broken = to_nvfp4(weight, per_tensor_scale=factor)
    broken.scale[3, 1] = torch.nan
    with pytest.raises(ValueError, match="weight 'w' is not finite"):
        from_torchao(broken, name="w")


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
    with pytest.raises(
        ValueError, match=r"weight 'w' is a .* cannot be a base; use a matrix in torchao's Int8Tensor or Float8Tensor"
    ):
        from_torchao(tensor(normal(0, 64, 64, dtype=torch.float32)), name="w")


def test_a_stack_is_no_tensor_of_torchaos():
    params = init(network(), rank=4, seed=0, targets=["0.weight", "2.weight"], base="int8", stack=False)
    stacked = stack_bases([params["0.weight"].base, params["2.weight"].base], (2,))
    with pytest.raises(ValueError, match=r"`params` is a stack of shape \(2, 64, 64\), which torchao does not support"):
        to_torchao(stacked)


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_a_plain_model_loads_the_tensors_by_assign(kind: str):
    model, x = network(), normal(7, 3, 64).float()
    params = init(model, rank=4, seed=0, targets=["*.weight"], base=kind, start="lora")
    weights, other = to_torchao(params), network()
    other.load_state_dict(weights, assign=True)
    assert [type(other[index].weight) for index in (0, 2, 4)] == [
        type(weights[f"{index}.weight"]) for index in (0, 2, 4)
    ]
    torch.testing.assert_close(other(x), dl.call(model, params, x))
    with pytest.raises(RuntimeError, match=r'While copying the parameter named "0\.weight"'):
        network().load_state_dict(weights)


def test_a_tensor_that_is_not_trained_is_returned():
    tensor = torch.arange(3)
    assert to_torchao(FrozenTensor(tensor)) is tensor
    with pytest.raises(TypeError, match=r"`params` is Int8Codes.*; pass a LowRank or a dict"):
        to_torchao(quantize(low_rank(Shape(8, 8, 2)), "int8").base.codes)

"""Arguments of `init`, `resize`, `load_adapter` and files: what is taken and what is refused by name."""

import re
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dynlora_fn import call, init, resize, state_dict, unstack
from dynlora_fn.interop import FrozenTensor, open_weights, save_adapter, save_weights
from dynlora_fn.testing import assert_same


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 6)


def made(**changed: Any) -> Any:
    return init(layer(), **{"rank": 2, "seed": 0, "targets": ["weight"], **changed})


@pytest.mark.parametrize("changed", [{"rank": np.int64(2)}, {"rank": {"*": np.int32(2)}}, {"seed": np.int16(0)}])
def test_integers_of_numpy_make_the_same_parameters(changed: dict):
    assert_same(made(**changed), made())
    assert_same(resize(made(), rank=np.int64(3)), resize(made(), rank=3))


@pytest.mark.parametrize(("parts", "plain"), [(np.int64(2), 2), ((np.int32(2), np.int64(-1)), (2, -1))])
def test_numbers_of_parts_may_be_those_of_numpy(parts: Any, plain: Any):
    assert_same(made(fused={"weight": parts}), made(fused={"weight": plain}))


@pytest.mark.parametrize("targets", [{"weight"}, frozenset({nn.Linear}), {"weight": 0}.keys()])
def test_targets_may_be_a_set(targets: Any):
    assert_same(made(targets=targets), made())


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("seed", [0.0, False, None, "0", float("nan"), torch.tensor(0), np.float64(0)]),
        ("rank", [2.0, "2", True, None, {"*": 2.0}, {"weight": "2"}, [2], 0, -1]),
        ("start", ["zeros", "LoRA", None, False, ["lora"]]),
        ("trained", ["a", "B", None, False, ["b"]]),
        ("dtype", ["float32", torch.int64, torch.float8_e4m3fn, None]),
        ("base_dtype", ["bfloat16", torch.int8, 16]),
        ("stack", [1, "yes", None]),
        ("residual", ["none", "int4", "bf16", False, torch.bfloat16]),
        ("residual_device", ["graphics card", 0.5]),
        ("targets", [None, 3, [3], [int], {"weight": 1}]),
        ("fused", [2, {"weight": 2.0}, {"weight": (2,)}, {"weight": True}, {"weight": (2, "rows")}]),
        ("weights", [[1], {"weight": 1.0, "bias": torch.ones(6)}, {0: torch.ones(6, 8)}]),
    ],
)
def test_settings_that_cannot_be_right_are_refused(argument: str, values: list):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"`{argument}`"):
            made(**{argument: value})


def test_weights_are_of_the_kind_and_the_names_of_the_model():
    good = {"weight": torch.ones(6, 8), "bias": torch.ones(6)}
    for kind in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(
            TypeError, match=rf"`weights` has dtype {kind} for 'bias', but the model has torch\.float32"
        ):
            made(weights={**good, "bias": torch.ones(6).to(kind)})
    with pytest.raises(ValueError, match="`weights` has 'scale', which the model does not have; remove them"):
        made(weights={**good, "scale": torch.ones(6)})


def test_weights_of_a_mapping_that_reads_them_later_are_tensors():
    weights = MappingProxyType({"weight": 1.0, "bias": torch.ones(6)})
    with pytest.raises(TypeError, match=r"`weights` has 1\.0 for 'weight'; use a tensor"):
        made(weights=weights)


def test_weights_may_have_the_buffers_of_the_model():
    model = nn.Sequential(layer(), nn.BatchNorm1d(6))
    params = init(model, rank=2, seed=0, targets=["0.weight"], weights=model.state_dict())
    assert_same(params, init(model, rank=2, seed=0, targets=["0.weight"]))


def noisy(scale: float = 1.0) -> nn.Module:
    """Return a model in evaluation whose statistics are not those of a new one."""
    model = nn.Sequential(layer(), nn.BatchNorm1d(6), nn.LayerNorm(6))
    model(torch.randn(5, 8) * scale)
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_buffers_of_weights_that_differ_are_read(device: str):
    source, x = noisy(3.0), torch.ones(2, 8)
    with torch.device(device):
        fresh = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.LayerNorm(6)).eval()
    weights = source.state_dict()
    params = init(fresh, rank=2, seed=0, targets=["0.weight"], start="lora", weights=weights)
    buffers = {name for name, param in params.items() if isinstance(param, FrozenTensor)}
    assert buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    torch.testing.assert_close(call(fresh, params, x), source(x))
    assert_same(state_dict(fresh, params), dict(weights))
    assert params["1.running_mean"].tensor.data_ptr() != weights["1.running_mean"].data_ptr()
    with pytest.raises(ValueError, match=r"`weights` has shape \(5,\) for '1\.running_var', but the model has \(6,\)"):
        init(fresh, rank=2, seed=0, targets=["0.weight"], weights={**weights, "1.running_var": torch.ones(5)})


def test_weights_are_read_in_the_dtype_of_the_model():
    weights = {name: tensor.bfloat16() for name, tensor in noisy().state_dict().items() if tensor.is_floating_point()}
    for copy in (True, False):
        params = init(noisy(), rank=2, seed=0, targets=["0.weight"], start="lora", weights=weights, copy=copy)
        dtypes = {leaf.dtype for leaf in tree_leaves(params) if leaf.is_floating_point()}
        assert dtypes == {torch.float32}
        assert call(noisy(), params, torch.ones(2, 8)).dtype == torch.float32


def test_a_star_within_a_name_is_a_letter():
    model = nn.ParameterDict({"w*": torch.ones(6, 4)})
    params = init(model, rank=2, seed=0, targets=lambda name, tensor: True, stack=False)
    assert_same(unstack(params), params)
    assert state_dict(model, params)["w*"].shape == (6, 4)


@pytest.mark.parametrize("name", ["*", "layers.*.w", "*.*"])
def test_a_name_with_more_stars_than_axes_is_refused(name: str):
    with pytest.raises(ValueError, match=f"`params` has {re.escape(repr(name))} of shape .* leading axes for . stars"):
        unstack({name: made()["weight"]})


@pytest.mark.parametrize("path", [None, 3, b"folder", ["folder"]])
def test_paths_are_texts_or_paths(path: Any):
    with pytest.raises(TypeError, match="`path` is "):
        open_weights(path)
    with pytest.raises(TypeError, match="`file` is "):
        save_weights({"w": torch.ones(2)}, path)
    with pytest.raises(TypeError, match="`folder` is "):
        save_adapter(layer(), made(), path)


@pytest.mark.parametrize("model", [None, "model", {"weight": torch.ones(6, 8)}, nn.Linear])
def test_a_model_is_a_module(model: Any):
    for use in (lambda: call(model, made(), torch.ones(1, 8)), lambda: state_dict(model, made())):
        with pytest.raises(TypeError, match=r"`model` is .*; pass an nn\.Module"):
            use()

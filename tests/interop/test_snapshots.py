"""What is taken from a state keeps its values when a compiled step overwrites the state."""

import pytest
import torch
from torch import nn

import dynlora_fn as dl
from dynlora_fn.testing import assert_same


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))


def step(params):
    trainable, frozen = dl.partition(dl.switch(params, dl.schedules.every(1)(0, params)).params)
    trainable = {name: leaf - 1 if isinstance(leaf, torch.Tensor) else leaf for name, leaf in trainable.items()}
    return dl.combine(trainable, frozen), None


@pytest.mark.parametrize("options", [{}, {"trained": "b"}, {"targets": []}, {"stack": False}])
def test_a_state_dict_keeps_its_values(options):
    plain = model()
    params = dl.init(plain, rank=2, seed=0, **{"targets": [nn.Linear], **options})
    kept = dl.state_dict(plain, params)
    wanted = {name: tensor.clone() for name, tensor in kept.items()}
    new, _ = dl.compile_step(step, backend="aot_eager")(params)
    assert_same(kept, wanted)
    assert not torch.equal(dl.state_dict(plain, new)["0.bias"], wanted["0.bias"])


def test_parameters_without_data_beside_others_are_refused():
    params = dl.init(model(), rank=2, seed=0, targets=[nn.Linear], stack=False)
    with pytest.raises(ValueError, match=r"`params` has '1\.bias' on meta, but other parameters have data"):
        dl.state_dict(model(), {**params, "1.bias": params["1.bias"].to("meta")})
    on_meta = dl.init(model().to("meta"), rank=2, seed=0, targets=[nn.Linear], stack=False)
    assert all(tensor.is_meta for tensor in dl.state_dict(model(), on_meta).values())


def test_tied_weights_are_one_copy():
    plain = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    plain[1].weight = plain[0].weight
    params = dl.init(plain, rank=2, seed=0, targets=[])
    weights = dl.state_dict(plain, params)
    assert weights["0.weight"] is weights["1.weight"]
    assert weights["0.weight"].data_ptr() != params["0.weight"].data_ptr()

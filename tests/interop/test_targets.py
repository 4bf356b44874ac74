"""Which parameters become low-rank: by name, glob, type of module or predicate, each with its rank."""

from typing import Any

import pytest
import torch
from torch import nn

from dynlora_fn import LowRank, init, state_dict
from dynlora_fn.testing import assert_same


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"map": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for _ in range(2)]
    return nn.ModuleDict({"embedding": nn.Embedding(9, 6), "layers": nn.ModuleList(layers), "conv": nn.Conv1d(4, 6, 3)})


def chosen(**changed: Any) -> dict[str, int]:
    """Return the rank of every low-rank parameter by name."""
    params = init(model(), **{"rank": 2, "seed": 0, **changed})
    return {name: param.factors.a.shape[-2] for name, param in params.items() if isinstance(param, LowRank)}


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["layers.*.weight"], None),
        (["layers.*.map.weight"], {"layers.*.map.weight"}),
        ("embedding.weight", {"embedding.weight"}),
        (nn.Linear, {"layers.*.map.weight"}),
        ([nn.Linear, nn.Conv1d], {"layers.*.map.weight", "conv.weight"}),
        ([nn.Embedding, "layers.1.map.weight"], {"embedding.weight", "layers.1.map.weight"}),
        (lambda name, tensor: tensor.ndim > 1, {"embedding.weight", "layers.*.map.weight", "conv.weight"}),
        (lambda name, tensor: name.startswith("embedding"), {"embedding.weight"}),
        ([], set()),
    ],
)
def test_targets(targets, names):
    if names is None:  # the weights of norms among them
        with pytest.raises(
            ValueError, match=r"`targets` matches 'layers.0.norm.weight' of shape \(6,\); match only matrices"
        ):
            chosen(targets=targets)
    else:
        assert chosen(targets=targets).keys() == names


def test_a_rank_for_each():
    ranks = {"embedding.*": 3, "layers.0.*": 1, "*": 4}
    got = chosen(targets=[nn.Embedding, nn.Linear, nn.Conv1d], rank=ranks)
    assert got == {"embedding.weight": 3, "layers.0.map.weight": 1, "layers.1.map.weight": 4, "conv.weight": 4}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": [nn.LSTM]}, "`targets` has the type LSTM, but `model` has no such module.* Conv1d, Embedding"),
        ({"targets": [nn.Linear, nn.LayerNorm]}, "`targets` has the type LayerNorm, but no .* 'layers.0.norm' for one"),
        ({"targets": [nn.Linear, nn.ModuleList]}, "`targets` has the type ModuleList, but no such module"),
        ({"targets": [nn.Linear, "head.*"]}, r"`targets` contains 'head.\*', which matches no name"),
        (
            {"targets": lambda name, tensor: tensor.ndim > 9},
            r"true for no .* embedding.weight, .*\[\]",
        ),
        (
            {"rank": lambda name, shape: 7},
            r"rank` is 7 for .*rank=\{'embedding.weight': 6, '\*': 7\}",
        ),
        ({"targets": ["nothing.*"]}, r"`targets` contains 'nothing.\*', which matches no name"),
        ({"rank": {"other": 2, "*": 1}}, "`rank` contains 'other', which matches no name"),
        ({"rank": {"embedding.*": 2}}, "`rank` has no rank for target 'layers.0.map.weight'"),
        ({"rank": {"emb*": 7, "*": 1}}, r"`rank` is 7 for 'embedding.weight'.*min\(out, in\) = 6"),
        ({"fused": {"*": 4}}, r"`fused` is 4 along axis -2 for 'embedding.weight' .* divides"),
        ({"fused": {"none": 3}}, "`fused` contains 'none', which matches no name"),
        ({"targets": nn.Conv1d, "fused": {"*": 3}}, "`fused` is .*'conv.weight'"),
        (
            {"targets": nn.Linear, "fused": {"*": 3}, "rank": 3},
            r"`rank` is 3 for 'layers.0.map.weight' .* = 2, as",
        ),
    ],
)
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        chosen(**{"targets": [nn.Embedding, nn.Linear], **changed})


def test_a_function_clips_ranks():
    shapes = {}

    def rank(name, shape):
        shapes[name] = shape
        return min(5, *shape)

    fused = {"layers.*": (3, -1)}
    got = chosen(targets=[nn.Embedding, nn.Linear, nn.Conv1d], rank=rank, fused=fused)
    assert got == {"embedding.weight": 5, "layers.*.map.weight": 2, "conv.weight": 5}
    assert shapes["embedding.weight"] == (9, 6)
    assert shapes["layers.1.map.weight"] == (6, 2)
    assert shapes["conv.weight"] == (6, 12)


def parametrized(register) -> nn.Module:
    """Return a model whose second linear layer computes its weight."""
    layers = model()
    register(layers["layers"][1]["map"])
    return layers


@pytest.mark.parametrize(
    "register",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    ],
)
@pytest.mark.parametrize("targets", [nn.Linear, [nn.Embedding, nn.Linear]])
def test_a_parametrized_layer_is_named(register, targets):
    layers = parametrized(register)
    message = r"type Linear, but 'layers\.1\.map\.weight' is computed from its parametrization \(original.*remove_param"
    with pytest.raises(ValueError, match=message):
        init(layers, rank=2, seed=0, targets=targets)
    by_name = init(layers, rank=2, seed=0, targets=["layers.0.map.weight"])
    assert [name for name, param in by_name.items() if isinstance(param, LowRank)] == ["layers.0.map.weight"]


def test_a_parametrized_bias_is_no_matrix():
    layers = parametrized(lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh()))
    params = init(layers, rank=2, seed=0, targets=nn.Linear)
    assert isinstance(params["layers.*.map.weight"], LowRank)


@pytest.mark.parametrize(
    "targets", [[nn.Linear], ["head.weight"], ["h*"], lambda name, tensor: name == "head.weight", [nn.Embedding]]
)
def test_a_tied_weight_is_a_target_under_any_name(targets):
    tied = nn.ModuleDict({"embedding": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    params = init(tied, rank={"head.*": 3}, seed=0, targets=targets)
    assert params.keys() == {"embedding.weight"}
    assert params["embedding.weight"].factors.a.shape[-2] == 3


def test_types_need_a_module():
    with pytest.raises(ValueError, match="`targets` has the type Linear, but `model` is a dict of tensors; use names"):
        init(dict(model().named_parameters()), rank=2, seed=0, targets=nn.Linear)


def test_parts_have_seeds_of_their_own():
    fused = {"layers.*": 3}
    params = init(model(), rank=2, seed=0, targets=["layers.*.map.weight"], fused=fused)
    param = params["layers.*.map.weight"]
    assert param.factors.b.shape == (2, 3, 2, 2)
    assert param.seed.unique().numel() == 6


def test_weights_from_elsewhere():
    source = model()
    with torch.device("meta"):
        empty = model()
    settings = {"rank": 2, "seed": 0, "targets": [nn.Linear, nn.Conv1d]}
    got = init(empty, weights=source.state_dict(), **settings)
    assert_same(got, init(source, **settings))
    assert_same(dict(state_dict(empty, got)), dict(state_dict(source, got)))


def test_weights_that_do_not_fit_are_refused():
    settings = {"rank": 2, "seed": 0, "targets": nn.Linear}
    weights = model().state_dict()
    with pytest.raises(ValueError, match=r"`weights` has shape \(5,\) for 'conv.bias', but the model has \(6,\)"):
        init(model(), weights={**weights, "conv.bias": torch.zeros(5)}, **settings)
    del weights["embedding.weight"]
    with pytest.raises(ValueError, match=r"`weights` has no 'embedding.weight' of shape \(9, 6\)"):
        init(model(), weights=weights, **settings)


def test_tied_weights_are_found_by_either_name():
    tied = nn.ModuleDict({"first": nn.Linear(3, 3, bias=False), "second": nn.Linear(3, 3, bias=False)})
    tied["second"].weight = tied["first"].weight
    weight = torch.randn(3, 3)
    params = init(tied, rank=1, seed=0, targets=["first.weight"], weights={"second.weight": weight})
    torch.testing.assert_close(state_dict(tied, params)["second.weight"], weight)
    settings = {"rank": 1, "seed": 0, "targets": ["first.weight"]}
    init(tied, weights={"first.weight": weight, "second.weight": weight.clone()}, **settings)
    with pytest.raises(ValueError, match=r"`weights` has different values for 'first.weight' and 'second.weight'"):
        init(tied, weights={"first.weight": weight, "second.weight": weight + 1}, **settings)

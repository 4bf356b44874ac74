"""Low-rank weights are made from a model's weights and equal them."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map

from dynlora_fn import (
    LowRank,
    apply_updates,
    call,
    combine,
    init,
    materialize,
    partition,
    state_dict,
    unstack,
    value_and_grad,
)
from dynlora_fn.interop import FrozenTensor
from dynlora_fn.testing import Shape, any_shapes, assert_same, assert_within, dtypes, eps, normal, seeds, untouched
from tests.support import reference
from tests.support.network import EPS, TARGETS, network

starts = st.sampled_from(["switchlora", "lora"])


@given(any_shapes, seeds, starts, st.tuples(dtypes, dtypes, dtypes), st.booleans())
@example(Shape(4, 5, 3), 0, "switchlora", (torch.float32, torch.float32, torch.bfloat16), False)  # b / 3 rounds
@example(Shape(4, 5, 2), 0, "switchlora", (torch.float32, torch.float64, torch.float64), False)  # a wider base
def test_init_keeps_the_weights(shape: Shape, seed, start, some_dtypes, stack):
    weight_dtype, base_dtype, dtype = some_dtypes
    model = {f"{n}.w": normal(seed + n, *shape[:2], dtype=weight_dtype) for n in range(2)}
    options = {"start": start, "base_dtype": base_dtype, "dtype": dtype, "stack": stack}
    params = init(model, rank=shape.rank, seed=seed, targets=["*"], **options)
    for name, param in unstack(params).items():
        assert (param.base.dtype, param.factors.b.dtype, param.factors.a.dtype) == (base_dtype, dtype, dtype)
        # Rank products and sums, each rounded by half an eps of the working dtype, then one rounding to the base's.
        bound = (
            (shape.rank + 3)
            * eps(reference.working_dtype(param))
            * (reference.magnitude(param) + model[name].double().abs())
        )
        bound += eps(base_dtype) * param.base.double().abs()
        assert_within(reference.weight(param), model[name], bound)


@given(any_shapes, seeds)
def test_init_starts_plain_lora_from_the_weight_itself(shape: Shape, seed):
    weight = normal(seed, *shape[:2])
    param = init({"w": weight}, rank=shape.rank, seed=seed, targets=["w"], start="lora")["w"]
    assert_same(param.base, weight)
    assert not param.factors.b.any()
    assert param.factors.a.any()


@given(any_shapes, seeds)
def test_init_draws_the_first_vectors_of_the_basis(shape: Shape, seed):
    """Side b is half a turn behind: its vector 0 is in slot rank // 2."""
    param = init({"w": normal(seed, *shape[:2])}, rank=shape.rank, seed=seed, targets=["w"], dtype=torch.float64)["w"]
    for index in range(shape.rank):
        slot = (index + shape.rank // 2) % shape.rank
        for side, vector in (("a", param.factors.a[index]), ("b", param.factors.b[:, slot])):
            unit = torch.tensor(reference.uniform(param.seed.item(), side, index, len(vector)), dtype=torch.float64)
            # The bound is a dozen operations.
            torch.testing.assert_close(vector, unit * reference.bound(side, *shape), rtol=32 * EPS, atol=0)


@given(any_shapes, seeds)
def test_plain_loras_vectors_are_within_one_over_the_root_of_in(shape: Shape, seed):
    """Side a is U(-1 / sqrt(in), 1 / sqrt(in)), as in `torch.nn.Linear`, and side b is zero."""
    weight = normal(seed, *shape[:2])
    options = {"rank": shape.rank, "seed": seed, "targets": ["w"], "start": "lora", "dtype": torch.float64}
    param = init({"w": weight}, **options)["w"]
    for index, row in enumerate(param.factors.a):
        unit = torch.tensor(reference.uniform(param.seed.item(), "a", index, len(row)), dtype=torch.float64)
        torch.testing.assert_close(row, unit / shape.in_features**0.5, rtol=8 * EPS, atol=0)


def test_init_copies_and_asks_for_no_gradient():
    model = network()
    with untouched(list(model.parameters())):
        params = init(model, rank=2, seed=0, targets=TARGETS)
        owners = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        for leaf in tree_leaves(params):
            assert leaf.untyped_storage().data_ptr() not in owners
            assert not leaf.requires_grad
            leaf.add_(1)  # does not reach the model


def test_without_a_copy_what_does_not_change_shares_the_models_memory():
    """Stacks, converted weights and the bases of drawn factors are new memory, and nothing is written to the model."""
    model = {f"layers.{at}": normal(at, 4, 6) for at in range(2)} | {"w": normal(2, 4, 6), "bias": normal(3, 4)}
    of_model = {tensor.untyped_storage().data_ptr() for tensor in model.values()}

    def shared(**options):
        with untouched(model):
            params = init(model, rank=2, seed=0, copy=False, **options)
        wanted = init(model, rank=2, seed=0, **options)
        assert_same(params, wanted)
        return {
            name
            for name, param in params.items()
            if any(leaf.untyped_storage().data_ptr() in of_model for leaf in tree_leaves(param))
        }

    assert shared(targets=["w"]) == {"bias"}
    assert shared(targets=["w"], start="lora") == {"w", "bias"}
    assert shared(targets=["w"], start="lora", base_dtype=torch.float32) == {"bias"}
    assert shared(targets=["w", "layers.*"], start="lora", stack=False) == {*model}
    assert shared(targets=["w"], start="lora", base="int8", residual=None) == {"bias"}


@pytest.mark.parametrize("options", [{}, {"start": "lora"}, {"dtype": torch.bfloat16}, {"base": "int8"}])
def test_weights_that_are_made_together_equal_those_made_alone(options):
    """Small weights of one shape are drawn and folded together, in memory that they do not share."""
    model = {f"{name}.{at}": normal(at, 4, 6) for name in "ab" for at in range(3)} | {"c": normal(7, 4, 6)}
    together = init(model, rank=2, seed=0, targets=["a.*", "c"], stack=False, **options)
    assert list(together) == list(model)
    for name, weight in model.items():
        targets = [name] if isinstance(together[name], LowRank) else []
        assert_same(together[name], init({name: weight}, rank=2, seed=0, targets=targets, **options)[name])
    storages = [leaf.untyped_storage() for leaf in tree_leaves(together)]
    assert len({storage.data_ptr() for storage in storages if storage.nbytes()}) == len(
        [storage for storage in storages if storage.nbytes()]
    )


def test_init_is_deterministic_and_another_seed_gives_other_factors():
    first, same, other = (init(network(), rank=2, seed=seed, targets=TARGETS) for seed in (1, 1, 2))
    assert_same(first, same)
    assert not torch.equal(first["0.weight"].factors.a, other["0.weight"].factors.a)
    assert not torch.equal(first["0.weight"].factors.a, first["3.weight"].factors.a)  # each weight has another basis


def test_seeds_depend_on_the_name_alone():
    model = {f"layers.{n}.w": normal(n, 4, 4) for n in range(3)}
    stacked = unstack(init(model, rank=2, seed=5, targets=["*"]))
    apart = init(model, rank=2, seed=5, targets=["*"], stack=False)
    alone = init(model, rank=2, seed=5, targets=["layers.1.w"])
    assert_same(stacked, apart)
    assert_same(alone["layers.1.w"], apart["layers.1.w"])


def test_init_stacks_what_repeats():
    params = init({f"layers.{n}.w": normal(n, 4, 6) for n in range(3)}, rank=2, seed=0, targets=["layers.*.w"])
    assert list(params) == ["layers.*.w"]
    b, a = params["layers.*.w"].factors
    assert (params["layers.*.w"].base.shape, b.shape, a.shape) == ((3, 4, 6), (3, 4, 2), (3, 2, 6))
    assert params["layers.*.w"].seed.shape == (3,)
    assert params["layers.*.w"].seed.unique().numel() == 3


def test_layers_of_different_types_are_not_stacked_unless_they_start_at_zero():
    layers = [nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)]
    params = init(nn.Sequential(*layers), rank=2, seed=0, targets=nn.Linear)
    assert params.keys() == {"0.weight", "1.weight", "1.bias", "{2..3}.weight", "{2..3}.bias", "4.weight", "4.bias"}


def test_tied_tensors_come_once():
    weight, other = normal(0, 4, 4), normal(0, 4, 4)
    tied = init({"in": weight, "out": weight, "twin": other, "view": weight.T}, rank=1, seed=0, targets=["in"])
    assert tied.keys() == {"in", "twin", "view"}  # equal values with other strides are not tied
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    params = init(model, rank=1, seed=0, targets=["0.weight"], stack=False)
    assert params.keys() == {"0.weight", "0.bias", "1.bias"}
    x = normal(1, 2, 3, dtype=torch.float32)
    # Sums of 3 products of magnitude about 1, twice over, in float32.
    torch.testing.assert_close(call(model, params, x), model(x), rtol=0, atol=32 * eps(torch.float32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 5}, r"`rank` is 5 for 'w' of shape \(4, 6\); use at least 1 and at most min\(out, in\) = 4"),
        ({"rank": 0}, r"`rank` is 0 .* use at least 1"),
        ({"targets": ["v*"]}, r"`targets` contains 'v\*', which matches no name; use names or globs of: 'w', 'bias'"),
        (
            {"targets": ["w", "bias"]},
            r"`targets` matches 'bias' of shape \(4,\); match only matrices \(out, in\) or stacks of them",
        ),
        ({"start": "zero"}, r"`start` must be 'switchlora' or 'lora', got 'zero'"),
    ],
)
def test_init_refuses(changed, message):
    arguments = {"rank": 2, "seed": 0, "targets": ["w"]} | changed
    with pytest.raises(ValueError, match=message):
        init({"w": normal(0, 4, 6), "bias": normal(0, 4)}, **arguments)


@pytest.mark.parametrize("tensor", [torch.arange(12).reshape(3, 4), torch.ones(3, 4, dtype=torch.bool)])
def test_integers_are_frozen_and_no_targets(tensor):
    model = {"w": normal(0, 4, 6), "table": tensor}
    params = init(model, rank=2, seed=0, targets=["w"])
    assert_same(params["table"], FrozenTensor(tensor))
    assert partition(params).trainable.keys() == {"w"}
    with pytest.raises(ValueError, match=rf"`targets` matches 'table' of dtype {tensor.dtype}; match only floating"):
        init(model, rank=2, seed=0, targets=["w", "table"])


class Filtered(nn.Module):
    """A layer with a complex filter, as Fourier layers have, and a table of codes, as quantized layers have."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.complex(normal(0, 4), normal(1, 4)))
        self.codes = nn.Parameter(torch.arange(4, dtype=torch.uint8), requires_grad=False)
        self.map = nn.Linear(4, 4).double()

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(self.map(x)) * self.filter * self.codes).real


def test_integer_and_complex_parameters_pass_through():
    model, x = Filtered(), normal(3, 2, 4)
    params = init(model, rank=2, seed=0, targets=nn.Linear, dtype=torch.float64)
    torch.testing.assert_close(call(model, params, x), model(x), rtol=0, atol=1e3 * EPS)  # sums of a dozen numbers
    trainable, frozen = partition(params)
    assert trainable.keys() == {"filter", "map.weight", "map.bias"}
    grads = value_and_grad(lambda tree: call(model, combine(tree, frozen), x).square().sum())(trainable).grads
    model(x).square().sum().backward()
    torch.testing.assert_close(grads["filter"], model.filter.grad, rtol=1e4 * EPS, atol=0)
    assert_same(state_dict(model, params)["codes"], model.codes.detach())


def test_a_parameter_without_a_gradient_stays_frozen():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    for layer in (*model[1].parameters(), model[2].bias, model[3].bias):
        layer.requires_grad_(requires_grad=False)
    params = init(model, rank=2, seed=0, targets=["[13].weight"])
    assert {name for name, param in params.items() if isinstance(param, FrozenTensor)} == {"{1..3}.bias"}
    trainable, frozen = partition(params)
    assert trainable.keys() == {"0.weight", "2.weight", "0.bias", "1.weight", "3.weight"}
    assert all(not leaf.requires_grad for leaf in tree_leaves(params))
    x = normal(0, 2, 4, dtype=torch.float32)
    torch.testing.assert_close(
        call(model, combine(trainable, frozen), x), model(x), rtol=0, atol=64 * eps(torch.float32)
    )
    assert_same(dict(state_dict(model, params))["2.bias"], model[2].bias.detach())


def test_parameters_of_a_dict_are_frozen_too_and_plain_tensors_are_not():
    weights = {"w": normal(0, 4, 6), "b": nn.Parameter(normal(1, 4), requires_grad=False), "c": normal(2, 4)}
    params = init(weights, rank=2, seed=0, targets=["w"])
    assert partition(params).trainable.keys() == {"w", "c"}


class Codes(nn.Parameter):
    """A parameter of another library, with an attribute that a copy loses."""


def test_a_frozen_parameter_of_another_library_is_passed_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        layer.weight = Codes(layer.weight.detach().to(torch.uint8), requires_grad=False)
    params = init(model, rank=2, seed=0, targets=[])
    assert all(params[f"{at}.weight"].tensor is model[at].weight for at in range(2))


def test_a_parameter_without_a_shape_is_refused():
    with pytest.raises(ValueError, match=r"`model` has no shape for '0\.weight' yet; run its first forward pass"):
        init(nn.Sequential(nn.LazyLinear(4)), rank=2, seed=0, targets=["0.weight"])


@pytest.mark.parametrize("start", ["switchlora", "lora"])
@pytest.mark.parametrize("padding_idx", [2, -1])
def test_the_row_of_the_padding_does_not_move(start, padding_idx):
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=padding_idx), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model[0].weight.normal_()  # a row of the padding that is not zero
    tokens = torch.tensor([[0, 2, 4, 1], [2, 4, 3, 0]])
    params = init(model, rank=2, seed=0, targets=[nn.Embedding], start=start, dtype=torch.float64)
    before = materialize(params)["0.weight"][padding_idx]
    torch.testing.assert_close(before, model[0].weight[padding_idx].detach(), rtol=0, atol=8 * EPS)
    trainable, frozen = partition(params)
    for _ in range(3):
        grads = value_and_grad(lambda tree: call(model, combine(tree, frozen), tokens).square().sum())(trainable).grads
        trainable = apply_updates(trainable, tree_map(lambda grad: -0.1 * grad, grads))
    after = materialize(combine(trainable, frozen))["0.weight"]
    assert_same(after[padding_idx], before)
    assert not torch.equal(after[0], materialize(params)["0.weight"][0])


def test_a_gradient_that_does_not_pass_through_init_is_refused():
    leaf = nn.Parameter(normal(0, 8, 8))

    def start(weight, **weights):
        params = init({"w": weight}, rank=2, seed=0, targets=["w"], **weights)
        return params["w"].base.sum()

    assert not start(leaf).requires_grad
    with torch.no_grad():
        assert start(2 * leaf).isfinite()
    refusal = r"`(model|weights)` has 'w' with a tangent or with the gradient of other tensors, .*; detach it"
    for function in (
        lambda: start(2 * leaf),
        lambda: start(leaf, weights={"w": 2 * leaf}),
        lambda: torch.func.grad(start)(leaf.detach()),
        lambda: torch.func.jvp(start, (leaf.detach(),), (leaf.detach(),)),
    ):
        with pytest.raises(ValueError, match=refusal):
            function()


def test_two_parameters_in_one_memory_are_refused_and_a_tied_one_is_taken():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight.data = model[0].weight.data
    with pytest.raises(ValueError, match=r"`model` has two parameters in the same memory, '0\.weight' and '1\.weight'"):
        init(model, rank=1, seed=0, targets=[])
    model[1].weight = model[0].weight
    assert init(model, rank=1, seed=0, targets=[]).keys() == {"0.weight"}


def test_tensors_of_one_memory_with_other_values_are_not_tied():
    numbers = normal(0, 3, dtype=torch.complex64)
    conjugated = {
        "plain": numbers,
        "conjugated": numbers.conj(),
        "imaginary": numbers.imag,
        "negated": numbers.conj().imag,
    }
    params = init(conjugated, rank=1, seed=0, targets=[])
    assert_same({name: tensor.resolve_conj().resolve_neg() for name, tensor in params.items()},
                {name: tensor.clone().resolve_conj().resolve_neg() for name, tensor in conjugated.items()})  # fmt: skip


def test_a_sparse_parameter_is_refused():
    with pytest.raises(ValueError, match=r"`model` has 'w' of layout torch\.sparse_coo; use a dense tensor"):
        init({"w": torch.eye(3).to_sparse()}, rank=1, seed=0, targets=[])


def test_a_parameter_that_stores_several_tensors_is_refused_unless_it_is_frozen():
    double = TwoTensor(torch.ones(2, 3), torch.zeros(2, 3))
    with pytest.raises(
        TypeError, match="`model` has a TwoTensor as 'w', which `init` does not know; use a dense tensor"
    ):
        init({"w": double}, rank=1, seed=0, targets=[])
    frozen = nn.Parameter(double, requires_grad=False)
    assert init({"w": frozen}, rank=1, seed=0, targets=[])["w"].tensor is frozen


def test_a_target_of_eight_bits_is_refused_and_another_parameter_passes():
    model = {"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"`targets` matches 'w' of dtype torch\.float8_e4m3fn, in which no sums"):
        init(model, rank=1, seed=0, targets=["w"])
    assert_same(init(model, rank=1, seed=0, targets=[]), model)


def test_fake_parameters_of_one_shape_are_not_tied():
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        params = init(model, rank=1, seed=0, targets=["*.weight"], stack=False)
    assert params.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("options", [{}, {"start": "lora", "copy": False}, {"trained": "b"}])
def test_vmap_makes_parameters_of_each_model(options):
    models = {"w": normal(0, 2, 3, 4), "v": normal(1, 2, 3, 4)}
    mapped = torch.vmap(lambda model: materialize(init(model, rank=2, seed=0, targets=["w"], **options)))(models)
    torch.testing.assert_close(mapped, models, rtol=0, atol=32 * eps(torch.float64))

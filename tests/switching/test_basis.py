"""Basis vectors: the published generator, the same bits for every way of requesting them, and SwitchLoRA's bounds."""

import json
import math
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynlora_fn import Factors
from dynlora_fn.switching import BasisSlice, _basis, basis_bounds, basis_vectors
from dynlora_fn.switching._basis import Request, next_seeds, philox
from dynlora_fn.switching._basis import uniform as uniforms
from dynlora_fn.testing import Shape, any_shapes, assert_same, seeds, shapes
from tests.support import reference
from tests.support.modes import PlainMode
from tests.support.traces import FILES

SIDES = ("b", "a")
EPS = np.finfo(float).eps
indices = st.integers(0, 2**62)
basis_seeds = st.integers(0, 2**63 - 1)
sides = st.sampled_from(SIDES)
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (Random123, kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def uniform(seed, side, index, length):
    return uniforms([Request(seed, side, index, length)])[0]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    tensors = philox(tuple(map(torch.tensor, words(counter))), tuple(map(torch.tensor, words(key))))
    assert [word.item() for word in tensors] == words(answer)
    assert reference.philox(words(counter), words(key)) == words(answer)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**63 - 1])
def test_the_words_are_those_of_torch(seed):
    """torch makes a float of the lower 24 bits of a word, and a basis one of the upper 24 bits."""
    random = pytest.importorskip("torch.func._random", reason="this torch has no generator without a state")
    try:
        numbers = random.uniform(random.key(seed), (40,))
    except NotImplementedError:
        pytest.skip("this torch generates numbers without a state on CUDA only")
    zero = torch.zeros(10, dtype=torch.int64)
    block, key = torch.arange(10), (torch.tensor(seed & reference.MASK), torch.tensor(seed >> 32))
    found = torch.stack(philox((block, zero, zero, zero), key), dim=-1).flatten()
    assert_same((numbers.double() * 2**24).long(), found & 0xFFFFFF)


@given(basis_seeds, sides, indices, st.integers(1, 9))
def test_vectors_equal_the_reference(seed, side, index, length):
    vector = uniform(torch.tensor(seed), side, torch.tensor([index]), length)[0]
    assert vector.tolist() == reference.uniform(seed, side, index, length)  # exact: multiples of 2**-23


@given(st.lists(st.tuples(basis_seeds, st.integers(1, 2**20)), min_size=1, max_size=3))
def test_the_seeds_after_a_change_of_rank_equal_the_reference(changes):
    got = next_seeds([torch.tensor([seed]) for seed, _ in changes], [rank for _, rank in changes])
    assert [seed.tolist() for seed in got] == [[reference.next_seed(*change)] for change in changes]


@given(basis_seeds, sides, st.lists(indices, min_size=1, max_size=4), st.integers(1, 9))
def test_a_batch_holds_the_vectors_one_at_a_time(seed, side, index, length):
    batch = uniform(torch.tensor(seed), side, torch.tensor(index), length)
    alone = [uniform(torch.tensor(seed), side, torch.tensor([entry]), length)[0] for entry in index]
    assert_same(batch, torch.stack(alone))


@given(st.lists(st.tuples(basis_seeds, sides, indices, st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4))
def test_requests_made_together_give_what_they_give_alone(requests):
    """Requests differ in seeds, sides, numbers of vectors (also zero) and lengths."""
    requests = [
        Request(torch.tensor(seed), side, index + torch.arange(count), length)
        for seed, side, index, count, length in requests
    ]
    assert_same(uniforms(requests), [uniforms([request])[0] for request in requests])


@given(st.lists(basis_seeds, min_size=6, max_size=6), sides, seeds, st.sampled_from([(), (3,), (2, 3)]))
def test_a_stack_holds_the_vectors_of_its_members(members, side, seed, own_stack):
    stack_seeds = torch.tensor(members).reshape(2, 3)
    index = torch.randint(2**40, (*own_stack, 4), generator=torch.Generator().manual_seed(seed))
    together = uniform(stack_seeds, side, index, 5)
    for at in np.ndindex(2, 3):
        assert_same(together[at], uniform(stack_seeds[at], side, index.expand(2, 3, 4)[at], 5))


@given(basis_seeds, sides, indices, st.integers(1, 9), st.integers(0, 9))
def test_a_shorter_vector_is_a_prefix_of_a_longer_one(seed, side, index, length, more):
    short, long = (uniform(torch.tensor(seed), side, torch.tensor([index]), n) for n in (length, length + more))
    assert_same(short, long[:, :length])


@given(basis_seeds, indices, st.integers(0, 62))
def test_another_seed_side_or_index_gives_another_vector(seed, index, bit):
    # 8 numbers of 24 bits each: two of them agree by chance once in 2**192.
    def vector(seed, side, index):
        return tuple(uniform(torch.tensor(seed), side, torch.tensor([index]), 8)[0].tolist())

    others = [(seed ^ (1 << bit), "b", index), (seed, "a", index), (seed, "b", index ^ (1 << bit))]
    assert len({vector(seed, "b", index), *(vector(*other) for other in others)}) == 4


def test_any_number_of_threads_gives_the_same_bits():
    seed, index = torch.tensor([3, 4]), torch.arange(64)  # 2 * 64 * 1000 numbers: more than one thread's grain
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(uniform(seed, "a", index, 1000))
    finally:
        torch.set_num_threads(threads)
    assert_same(*results)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_compiled_gives_the_same_bits(backend):
    # Large words in two dimensions: Inductor once overflowed there.
    seed, index = torch.tensor([2**63 - 1, 2**40 + 5]), torch.tensor([0, 7, 2**32 - 1, 2**62 + 12345])

    def both(seed, index):
        return uniforms([Request(seed, "b", index, 37), Request(seed[0], "a", index + 1, 10)])

    assert_same(torch.compile(both, backend=backend, fullgraph=True)(seed, index), both(seed, index))


def test_values_are_uniform_in_the_half_open_interval():
    values = uniform(torch.tensor(1), "b", torch.arange(1000), 1000).double()
    assert values.min() >= -1
    assert values.max() < 1
    # Of one value: variance 1/3, and variance of its square 1/5 - 1/9. Five standard deviations of the means.
    n = values.numel()
    assert values.mean().abs() < 5 * math.sqrt(1 / 3 / n)
    assert (values.square().mean() - 1 / 3).abs() < 5 * math.sqrt((1 / 5 - 1 / 9) / n)
    # Both ends are reached: a million values miss the outermost 2**-15 of one side by chance once in e**15 times.
    assert values.min() < -1 + 2**-15
    assert values.max() > 1 - 2**-15
    # All 24 bits are in use: a value is an even multiple of 2**-23 as often as an odd one.
    odd = (values * 2**23).long() % 2
    assert (odd.double().mean() - 0.5).abs() < 5 * 0.5 / math.sqrt(n)


def test_neighboring_vectors_are_uncorrelated():
    vectors = uniform(torch.tensor(1), "b", torch.arange(100), 1000).double()
    products = vectors[1:] * vectors[:-1]  # each of variance 1/9
    assert products.mean().abs() < 5 / 3 / math.sqrt(products.numel())


@given(shapes(largest=64))
def test_bounds_equal_the_formula(shape: Shape):
    bounds = basis_bounds(*shape)
    for side in SIDES:
        # Powers and products of a dozen operations, each correct to a few units in the last place.
        assert getattr(bounds, side) == pytest.approx(reference.bound(side, *shape), rel=32 * EPS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bounds_equal_the_recorded_ones(path):
    arrays = np.load(path)
    meta = json.loads(str(arrays["meta"]))
    for layer in meta["layers"]:
        out_features, in_features = arrays[f"init.{layer}.W"].shape
        bounds = basis_bounds(out_features, in_features, meta["r"])
        np.testing.assert_allclose([bounds.a, bounds.b], arrays[f"init.{layer}.bound"], rtol=32 * EPS)


def factors(seed: int, shape: Shape, start: str = "switchlora", dtype: torch.dtype = torch.float64) -> Factors:
    """Return vectors 0 to 2 of side b and 1 to 4 of side a."""
    indices = torch.arange(3), torch.arange(1, 5)
    return basis_vectors([BasisSlice(torch.tensor(seed), *indices, shape[:2], shape.rank, start, dtype)])[0]


@given(any_shapes, seeds)
def test_vectors_fill_their_bounds_and_are_rounded_once(shape: Shape, seed):
    wide = factors(seed, shape)
    for side, vectors, vector_indices in (("b", wide.b.mT, range(3)), ("a", wide.a, range(1, 5))):
        units = [reference.uniform(seed, side, index, vectors.shape[-1]) for index in vector_indices]
        wanted = torch.tensor(units, dtype=torch.float64) * reference.bound(side, *shape)
        torch.testing.assert_close(vectors, wanted, rtol=32 * EPS, atol=0)  # as the bounds
    single = factors(seed, shape, dtype=torch.float32)
    assert_same(factors(seed, shape, dtype=torch.bfloat16), Factors(*(leaf.bfloat16() for leaf in single)))


@given(any_shapes, seeds)
def test_plain_lora_starts_from_zero_and_from_the_range_of_linear_layers(shape: Shape, seed):
    b, a = factors(seed, shape, start="lora")
    assert not b.any()
    wanted = uniform(torch.tensor(seed), "a", torch.arange(1, 5), shape.in_features).double() / shape.in_features**0.5
    torch.testing.assert_close(a, wanted, rtol=4 * EPS, atol=0)  # a root, a quotient and a product


@pytest.mark.parametrize("argument", ["out_features", "in_features", "rank"])
def test_bounds_of_nothing_are_refused(argument):
    with pytest.raises(ValueError, match=f"`{argument}` is 0; use an integer of at least 1"):
        basis_bounds(**{"out_features": 4, "in_features": 4, "rank": 2, argument: 0})


@pytest.mark.parametrize("shape", [6, (6,), torch.tensor([6, 4])])
def test_a_slice_of_another_shape_than_two_sizes_is_refused(shape):
    indices = torch.arange(3)
    with pytest.raises(TypeError, match=r"`slices` has .* as `shape`; use \(out, in\)"):
        basis_vectors([BasisSlice(torch.tensor(0), indices, indices, shape, 2, "lora", torch.float32)])


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="`start` must be 'switchlora', 'lora' or 'orthonormal', got 'zeros'"):
        factors(0, Shape(2, 2, 1), start="zeros")


@pytest.mark.parametrize(("function", "mode"), [("philox", PlainMode()), ("_philox_of_grid", nullcontext())])
def test_no_more_words_are_drawn_than_are_needed(function, mode, monkeypatch: pytest.MonkeyPatch):
    """A block has four numbers: ten need three blocks, five need two."""
    drawn = []
    generator = getattr(_basis, function)

    def counted(counter, key):
        drawn.append(torch.broadcast_tensors(*counter, *key)[0].numel())
        return generator(counter, key)

    monkeypatch.setattr(_basis, function, counted)
    indices = torch.arange(6).reshape(2, 3)
    seed = torch.tensor([1, 2])
    with mode:
        a, b = uniforms([Request(seed, "a", indices, 10), Request(seed, "b", indices[0], 5)])
    assert (tuple(a.shape), tuple(b.shape)) == ((2, 3, 10), (2, 3, 5))
    assert sum(drawn) == 6 * 3 + 6 * 2
    assert len(drawn) == (1 if function == "philox" else 2)  # a tile has vectors of one length


@given(
    st.lists(st.tuples(basis_seeds, sides, indices, st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_tiles_have_the_bits_of_one_draw(requests, tile):
    """A mode that sees every operation, as a tracer does, takes the numbers in one draw."""
    requests = [
        Request(torch.tensor([seed, seed ^ 1]), side, index + torch.arange(count), length)
        for seed, side, index, count, length in requests
    ]
    with PlainMode():
        together = uniforms(requests)
    with mock.patch.object(_basis, "_TILE", tile):
        assert_same(uniforms(requests), together)


def test_any_number_of_slices_may_come_from_an_iterator():
    each = BasisSlice(torch.tensor(0), torch.arange(3), torch.arange(3), (6, 4), 2, "lora", torch.float32)
    assert basis_vectors([]) == []
    assert_same(basis_vectors(iter([each, each])), basis_vectors([each, each]))

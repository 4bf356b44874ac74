"""Codes are torchao's, bit for bit, and decode to the weight within the bound of each format."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from dynlora_fn import Factors, LowRank
from dynlora_fn._core._torch import FakeTensorMode
from dynlora_fn.bases import from_torchao, quantize
from dynlora_fn.bases._format import Format
from dynlora_fn.bases._formats import FORMATS, PROTOTYPES, as_format, stored
from dynlora_fn.bases._int8 import Int8Codes
from dynlora_fn.bases._mxfp4 import MXFP4Codes
from dynlora_fn.bases._nf4 import VALUES, NF4Codes, _limits
from dynlora_fn.bases._nvfp4 import NVFP4Codes
from dynlora_fn.bases._plain import Plain
from dynlora_fn.testing import assert_same, assert_within, eps, normal, seeds
from tests.support.torchao_tensors import dense, prototype

torchao = pytest.importorskip("torchao.quantization")
NAMES = tuple(FORMATS)
CODED = tuple(name for name in NAMES if name != "bfloat16")
matrices = st.tuples(st.integers(1, 5), st.integers(1, 5), seeds, st.sampled_from([1e-4, 1.0, 1e4]))


def matrix(out: int, half: int, seed: int, scale: float) -> Tensor:
    """Return a matrix that all blocks divide, with a row and a block of zeros and some outliers."""
    weight = scale * normal(seed, 4 * out, 32 * half, dtype=torch.float32)
    if seed % 2:
        weight[seed % (4 * out)] = 0
    if seed % 3 == 0:
        weight[0, 0] *= 1e3
    return weight


def torchaos(weight: Tensor, kind: str, codes: Format) -> Tensor:
    """Return torchao's tensor of a weight."""
    if kind == "int8":
        return torchao.Int8Tensor.from_hp(weight, granularity=torchao.PerRow())
    if kind == "float8":
        return torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow())
    if kind in PROTOTYPES:
        return prototype(weight, kind)
    assert isinstance(codes, NF4Codes)
    return torchao.to_nf4(weight, 64, codes.scales.numel() // codes.factor.numel())


def coded(weight: Tensor, kind: str) -> Format:
    return FORMATS[kind].empty("w", weight).encode(weight)


@given(matrices, st.sampled_from(CODED))
def test_codes_are_torchaos(case, kind):
    out, half, seed, scale = case
    weight = matrix(out, half, seed - seed % 2, scale)  # without zeros: torchao makes those of some formats NaN
    codes = coded(weight, kind)
    wanted = torchaos(weight, kind, codes)
    assert_same(from_torchao(wanted, residual=None).codes, stored(codes))
    assert_same(codes.decode(torch.float32), dense(wanted))


@pytest.mark.parametrize("kind", PROTOTYPES)
def test_numbers_in_the_middle_and_blocks_next_to_nothing_are_torchaos(kind):
    """Values are rounded to even and keep the sign of zero. One block is below the least of nvfp4's scales."""
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 7.0])
    weight = torch.stack([middle, -middle]).repeat(2, 2)
    weight[2], weight[3, 0] = weight[2] * 1e-3, 6 * 448  # so that nvfp4's factor is one
    codes, wanted = coded(weight, kind), torchaos(weight, kind, coded(weight, kind))
    assert_same(from_torchao(wanted, residual=None).codes, stored(codes))
    assert_same(codes.decode(torch.float32), dense(wanted))


def bound(weight: Tensor, codes: Format) -> Tensor:
    """Return the largest error of each entry: half of the format's step, as `quantize` promises."""
    largest = weight.abs().amax(-1, keepdim=True)
    work = 4 * eps(torch.float32) * weight.abs()  # scale, its inverse and the quotient are rounded as well
    if isinstance(codes, Int8Codes):
        return work + (largest / 127.5).clamp(min=eps(torch.float32)) / 2
    if isinstance(codes, Plain):
        return weight.abs() * eps(torch.bfloat16) / 2 + 2**-134
    if isinstance(codes, NF4Codes):
        blocks = weight.reshape(codes.scales.numel(), -1).abs().amax(-1)
        off = (blocks - blocks.mean()).reshape(codes.factor.numel(), -1).abs().amax(-1, keepdim=True)
        limit = 0.152 * blocks.reshape(codes.factor.numel(), -1) + off / 128
        return work + limit.reshape(-1, 1).expand(-1, 64).reshape(weight.shape) + 1e-30
    if isinstance(codes, NVFP4Codes):
        return work + torch.maximum(by_block(weight, 16) / 5, weight.abs().max() * 2**-19) + 2**-140
    if isinstance(codes, MXFP4Codes):
        return work + by_block(weight, 32) / 5 + 2**-124
    # float8 e4m3: three bits behind the point, and a fixed step below 2**-6 times the scale.
    return work + torch.maximum(weight.abs() * 2**-4, largest / 448 * 2**-10) + 2**-140


def by_block(weight: Tensor, size: int) -> Tensor:
    """Return for each entry the largest magnitude in its block."""
    blocks = weight.reshape(-1, size)
    return blocks.abs().amax(-1, keepdim=True).expand_as(blocks).reshape(weight.shape)


@given(matrices, st.sampled_from(NAMES))
@example((1, 2, 0, 1e-41), "int8")  # denormal
@example((1, 2, 0, 1e-41), "float8")
@example((1, 2, 0, 1e-41), "nf4")
@example((1, 2, 0, 1e-41), "nvfp4")
@example((1, 2, 0, 1e-41), "mxfp4")
@example((1, 2, 0, 1e-41), "bfloat16")
@example((1, 2, 3, 1e-37), "nvfp4")  # the inverse of its factor is infinite
@example((1, 2, 3, 1e-35), "nvfp4")
@example((1, 2, 2, 1e37), "nvfp4")
@example((1, 2, 2, 1e37), "mxfp4")
@example((1, 2, 2, 1e37), "int8")
@example((1, 2, 2, 1e37), "float8")
@example((1, 2, 2, 1e34), "nf4")
def test_codes_are_within_the_bound_of_their_format(case, kind):
    weight = matrix(*case)
    codes = coded(weight, kind)
    got = codes.decode(torch.float64)
    off = (got - weight.double()).abs()
    assert (off <= bound(weight.double(), codes)).all(), (off / bound(weight.double(), codes)).max()
    zeros = (weight == 0).all(-1)
    assert not got[zeros].any() or kind == "nf4"


@pytest.mark.parametrize("kind", NAMES)
def test_zeros_are_zeros(kind):
    assert not coded(torch.zeros(4, 64), kind).decode(torch.float32).any()
    weight = torch.zeros(8, 64)
    weight[3] = torch.linspace(-1, 1, 64)
    got = coded(weight, kind).decode(torch.float32)
    assert not got[torch.arange(8) != 3].any()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("share", [1, 0.99, 1 / 300])
def test_the_largest_numbers_are_kept_or_refused(kind, share):
    """A format that would round the weight to infinity raises an error with the weight's name."""
    weight = torch.full((4, 64), share * torch.finfo(torch.float32).max)
    weight[:, ::2] *= -1
    param = LowRank(weight, Factors(torch.zeros(4, 1), torch.zeros(1, 64)), torch.tensor(0))
    if share == 1 / 300 or torch.isfinite(coded(weight, kind).decode(torch.float32)).all():
        base = quantize({"w": param}, kind)["w"].base
        stored = base.exact(torch.float64)
        assert_within(stored, weight, 2.0**-8 * bound(weight.double(), as_format(base.codes)))
    else:
        with pytest.raises(
            ValueError, match=r"weight 'w' is not finite, .*; a base in low precision stores finite values only"
        ):
            quantize({"w": param}, kind)


@pytest.mark.parametrize("kind", ["int8", "float8", "mxfp4", "bfloat16"])
def test_what_was_codes_before_is_the_same_when_encoded_again(kind):
    """torchao's int8 overstates the most negative values, so a base without a residual would grow with each fold."""
    codes = coded(normal(0, 64, 64, dtype=torch.float32), kind)
    if kind == "int8":
        codes = codes.encode(codes.decode(torch.float32), again=True)  # from 127.5 steps to 127
    dense = codes.decode(torch.float32)
    torch.testing.assert_close(
        codes.encode(dense, again=True).decode(torch.float32), dense, rtol=2 * eps(torch.float32), atol=0
    )


@given(matrices)
def test_a_small_residual_has_a_scale_of_its_own(case):
    rest = 1e-9 * matrix(*case)
    codes = Int8Codes(rest.to(torch.int8), rest[..., :1]).encode_error(rest)
    off = (codes.decode(torch.float64) - rest.double()).abs()
    rest = rest.double().abs()
    assert (off <= rest.amax(-1, keepdim=True) / 254 + 4 * eps(torch.float32) * rest).all()


@pytest.mark.parametrize("kind", ["nf4", "mxfp4", "nvfp4"])
def test_a_first_use_on_another_device_or_in_a_trace_leaves_nothing_behind(kind: str):
    weight = matrix(2, 2, 0, 1.0)
    wanted = coded(weight, kind)
    with torch.device("meta"):
        assert_same(coded(weight, kind), wanted)
    with FakeTensorMode(allow_non_fake_inputs=True):
        quantize(
            {"w": LowRank(torch.ones(32, 64), Factors(torch.ones(32, 2), torch.ones(2, 64)), torch.tensor(0))}, kind
        )
    assert_same(coded(weight, kind), wanted)


def test_limits_are_between_neighbors_in_float32():
    """In all of float32 between two values of nf4, the one nearer in rounded distances is taken."""
    for below, above, limit in zip(VALUES[:-1], VALUES[1:], _limits(), strict=True):
        low, high, at = (torch.tensor(value, dtype=torch.float32) for value in (below, above, limit))
        further = torch.nextafter(at, torch.tensor(torch.inf))
        assert (at - low).abs() <= (at - high).abs()
        assert (further - low).abs() > (further - high).abs()

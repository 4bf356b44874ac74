"""Trees of tensors compared, to the bit or to a bound."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten_with_path


def assert_same(got: Any, wanted: Any) -> None:
    """Two trees agree in structure, shapes, dtypes, devices and in every bit."""
    for path, left, right in pairs(got, wanted):
        if isinstance(right, Tensor):
            assert isinstance(left, Tensor), f"{path}: {type(left).__name__} is no tensor"
            assert kind(left) == kind(right), f"{path}: {kind(left)} is not {kind(right)}"
            assert torch.equal(bits(left), bits(right)), f"{path}: {left} is not {right}"
        else:
            assert left == right, f"{path}: {left} is not {right}"


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Every entry of `got` is as near to `wanted` as the rounding errors that `bound` adds up, compared in float64."""
    error = (got.double() - wanted.double()).abs()
    assert error.shape == wanted.shape
    assert (error <= bound).all(), f"off by up to {error.max():.2e}, {(error / bound).max():.3g} times the bound"


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number."""
    return torch.finfo(dtype).eps


def pairs(got: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two trees of one structure, with their paths."""
    got_leaves, got_structure = tree_flatten_with_path(got)
    wanted_leaves, structure = tree_flatten_with_path(wanted)
    assert got_structure == structure, f"the structure {got_structure} is not {structure}"
    for (path, left), (_, right) in zip(got_leaves, wanted_leaves, strict=True):
        yield keystr(path), left, right


def kind(leaf: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """All but the values."""
    return tuple(leaf.shape), leaf.dtype, leaf.device


def bits(leaf: Tensor) -> Tensor:
    return leaf.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


@contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """The tensors of the trees hold the same values afterwards, and nobody wrote into them in between."""
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(trees)[0] if isinstance(leaf, Tensor)]
    before = [(leaf._version, leaf.requires_grad, leaf.detach().clone()) for _, leaf in leaves]
    yield
    for (path, leaf), (version, requires_grad, value) in zip(leaves, before, strict=True):
        assert leaf._version == version, f"{path} has been written into"
        assert leaf.requires_grad == requires_grad, f"{path} now says {leaf.requires_grad} for requires_grad"
        assert_same(leaf, value)

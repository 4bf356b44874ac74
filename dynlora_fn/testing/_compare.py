"""Compare trees of tensors, bit for bit or to a bound."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import keystr, tree_flatten_with_path


def assert_same(got: Any, wanted: Any) -> None:
    """Assert that two trees have the same structure, shapes, dtypes, devices and bits.

    Args:
        got: The tree to check.
        wanted: The expected tree.

    Raises:
        AssertionError: If they differ. The message names the path.

    Example:
        >>> import torch
        >>> assert_same({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
    """
    for path, left, right in pairs(got, wanted):
        if isinstance(right, Tensor):
            assert isinstance(left, Tensor), f"{path} is {type(left).__name__}, not a tensor"
            assert kind(left) == kind(right), f"{path}: {kind(left)} is not {kind(right)}"
            assert torch.equal(bits(left), bits(right)), f"{path}: {left} is not {right}"
        else:
            assert left == right, f"{path}: {left} is not {right}"


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Assert that every entry of `got` is within `bound` of `wanted`, compared in float64.

    Args:
        got: The tensor to check.
        wanted: The expected tensor.
        bound: The largest error of each entry, usually a sum of rounding errors (see `eps`).

    Raises:
        AssertionError: If an entry is further away. The message gives the largest error.

    Example:
        >>> import torch
        >>> assert_within(torch.tensor([1.0]), torch.tensor([1.5]), 0.5)
    """
    error = (got.double() - wanted.double()).abs()
    assert error.shape == wanted.shape
    assert (error <= bound).all(), f"off by up to {error.max():.2e}, {(error / bound).max():.3g} times the bound"


def eps(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next number of a dtype.

    Example:
        >>> import torch
        >>> eps(torch.bfloat16)
        0.0078125
    """
    return torch.finfo(dtype).eps


def pairs(got: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and the leaves of two trees, which must have the same structure."""
    got_leaves, got_structure = tree_flatten_with_path(got)
    wanted_leaves, structure = tree_flatten_with_path(wanted)
    assert got_structure == structure, f"the structure {got_structure} is not {structure}"
    for (path, left), (_, right) in zip(got_leaves, wanted_leaves, strict=True):
        yield keystr(path), left, right


def kind(leaf: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Return shape, dtype and device."""
    return tuple(leaf.shape), leaf.dtype, leaf.device


def bits(leaf: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return leaf.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


@contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """Assert that a block neither changes the tensors of some trees nor writes into them.

    Args:
        *trees: The trees.

    Raises:
        AssertionError: If a tensor was written into, even with its old values. The message names its path.

    Example:
        >>> import torch
        >>> tree = {"w": torch.zeros(2)}
        >>> with untouched(tree):
        ...     tree["w"] + 1
        tensor([1., 1.])
    """
    leaves = [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(trees)[0] if isinstance(leaf, Tensor)]
    before = [(leaf._version, leaf.requires_grad, leaf.detach().clone()) for _, leaf in leaves]
    yield
    for (path, leaf), (version, requires_grad, value) in zip(leaves, before, strict=True):
        assert leaf._version == version, f"{path} has been written into"
        assert leaf.requires_grad == requires_grad, f"{path} now has requires_grad={leaf.requires_grad}"
        assert_same(leaf, value)

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
        AssertionError: If they differ. The message gives the path, how many entries differ, and the largest difference.

    Example:
        >>> import torch
        >>> assert_same({"w": torch.zeros(2)}, {"w": torch.zeros(2)})
        >>> assert_same({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, -0.0])})  # other bits
        Traceback (most recent call last):
        AssertionError: ['w']: 1 of 2 entries differ, by up to 0: 0.0 instead of -0.0 at (1,)
    """
    for path, left, right in pairs(got, wanted):
        if isinstance(right, Tensor):
            assert isinstance(left, Tensor), f"{path} is {type(left).__name__}, not a tensor"
            assert kind(left) == kind(right), f"{path}: {kind(left)} is not {kind(right)}"
            assert torch.equal(bits(left), bits(right)), f"{path}: {differences(left, right)}"
        else:
            assert not isinstance(left, Tensor), f"{path} is a tensor, not {type(right).__name__}"
            is_nan = left != left and right != right  # noqa: PLR0124, NaN differs from itself
            assert is_nan or left == right, f"{path}: {left} is not {right}"


class ExceededBoundError(AssertionError):
    """An error is larger than its bound. `breach` is the error over the bound."""

    def __init__(self, message: str, breach: float):
        super().__init__(message)
        self.breach = breach


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor | float) -> None:
    """Assert that every entry of `got` is within `bound` of `wanted`.

    The comparison is in float64, or in complex128. Equal infinities have no error. An infinite error is never within
    the bound, even if the bound is infinite because it was computed from `got`.

    Args:
        got: The tensor to check.
        wanted: The expected tensor.
        bound: The largest error of each entry, usually a sum of rounding errors (see `eps`).

    Raises:
        AssertionError: If the shapes differ, or an entry is further away, or NaN. The message gives the largest error
            and the largest breach: error over bound.

    Example:
        >>> import torch
        >>> assert_within(torch.tensor([1.0]), torch.tensor([1.5]), 0.5)
    """
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)} is not {tuple(wanted.shape)}"
    wide = torch.complex128 if got.is_complex() or wanted.is_complex() else torch.float64
    got, wanted = got.to(wide), wanted.to(wide)
    error = torch.where(got == wanted, 0, (got - wanted).abs())
    is_beyond = ~(error <= bound) | error.isinf()  # also where the error is NaN
    if is_beyond.any():
        breaches = torch.where(is_beyond, error / bound, 0).nan_to_num(torch.inf)
        place, breach = _index(int(breaches.argmax()), breaches.shape), float(breaches.max())
        raise ExceededBoundError(f"off by up to {error.max():.2e}, {breach:.3g} times the bound at {place}", breach)


def difference(got: Any, wanted: Any) -> str | None:
    """Describe how two trees differ, as `assert_same` does, or return None."""
    try:
        assert_same(got, wanted)
    except AssertionError as error:
        return str(error).removeprefix(": ")
    return None


def eps(dtype: torch.dtype) -> float:
    """Return the distance from 1 to the next larger number of a dtype.

    Args:
        dtype: The floating dtype.

    Returns:
        The distance, as a Python number.

    Example:
        >>> import torch
        >>> eps(torch.bfloat16)
        0.0078125
    """
    return torch.finfo(dtype).eps


def pairs(got: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the path and both leaves for each place of two trees of one structure."""
    got_leaves, got_structure = tree_flatten_with_path(got)
    wanted_leaves, structure = tree_flatten_with_path(wanted)
    assert got_structure == structure, f"the structure {got_structure} is not {structure}"
    for (path, left), (_, right) in zip(got_leaves, wanted_leaves, strict=True):
        yield keystr(path), left, right


def kind(leaf: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """Return the shape, the dtype and the device of a tensor."""
    return tuple(leaf.shape), leaf.dtype, leaf.device


def bits(leaf: Tensor) -> Tensor:
    """Return the bytes of a tensor."""
    return leaf.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def differences(got: Tensor, wanted: Tensor) -> str:
    """Describe how two tensors of one shape and dtype differ.

    The text says how many entries differ, and the largest difference with its place.
    """
    differs = (bits(got) != bits(wanted)).reshape(wanted.numel(), -1).any(-1)
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    flat = [leaf.detach().reshape(-1) for leaf in (got, wanted)]
    gaps = (flat[0].to(wide) - flat[1].to(wide)).abs().nan_to_num(torch.inf)
    largest = int(torch.where(differs, gaps, -1).argmax())
    values = " instead of ".join(str(leaf[largest].item()) for leaf in flat)
    place = _index(largest, wanted.shape)
    return (
        f"{int(differs.sum())} of {differs.numel()} entries differ, by up to {gaps[largest]:.3g}: {values} at {place}"
    )


def _index(position: int, shape: torch.Size) -> tuple[int, ...]:
    """Return the index of an entry from its position in the flattened tensor."""
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(position), shape))


@contextmanager
def untouched(*trees: Any) -> Iterator[None]:
    """Assert that a ``with`` block does not change trees or write into their tensors.

    Args:
        *trees: The trees.

    Raises:
        AssertionError: If a tensor was written into, even with its old values, now requires a gradient, or has another
            `.grad`. Also if a leaf was added, removed, moved or replaced, as by an assignment in a dict. The message
            names its path.

    Example:
        >>> import torch
        >>> tree = {"w": torch.zeros(2)}
        >>> with untouched(tree):
        ...     tree["w"] + 1
        tensor([1., 1.])
    """
    leaves = _by_path(trees)
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    before = [(_version(leaf), leaf.requires_grad, leaf.detach().clone()) for leaf in tensors.values()]
    grads = [_grad(leaf) for leaf in tensors.values()]
    yield
    after = _by_path(trees)
    for path in leaves.keys() | after.keys():
        assert path in after, f"{path} has been removed"
        assert path in leaves, f"{path} has been added"
        assert after[path] is leaves[path], f"{path} has been replaced"
    moved = [path for path, other in zip(leaves, after, strict=True) if path != other]
    assert not moved, f"{moved[0]} has been moved, so the order of the leaves is another one"
    for (path, leaf), (grad, count) in zip(tensors.items(), grads, strict=True):
        now, now_count = _grad(leaf)
        is_same = now is grad and now_count == count
        assert is_same, f"the `.grad` of {path} has changed"
    for (path, leaf), (version, requires_grad, value) in zip(tensors.items(), before, strict=True):
        assert _version(leaf) == version, f"{path} has been written into"
        assert leaf.requires_grad == requires_grad, f"{path} now has requires_grad={leaf.requires_grad}"
        change = difference(leaf, value)
        assert not change, f"{path} has changed: {change}"


def _by_path(trees: Any) -> dict[str, Any]:
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(trees)[0]}


def _grad(leaf: Tensor) -> tuple[Tensor | None, int]:
    """Return the `.grad` of a tensor, and how often it was written into."""
    grad = leaf.grad if leaf.is_leaf else None  # torch warns for other tensors
    return grad, 0 if grad is None else _version(grad)


def _version(leaf: Tensor) -> int:
    """Return how often a tensor was written into.

    A tensor of inference mode does not count it.
    """
    return -1 if leaf.is_inference() else leaf._version

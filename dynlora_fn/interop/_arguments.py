"""Check the arguments of `init` and `resize`, before anything is read or computed."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, get_args

from torch import Tensor, nn

from dynlora_fn._core._check import (
    check_by_name,
    check_choice,
    check_dtype,
    check_flag,
    check_integer,
    described,
    first_names,
)
from dynlora_fn.interop._safetensors import Weights
from dynlora_fn.switching._weight import Start


def check_settings(start: Any, base_dtype: Any, dtype: Any, **flags: Any) -> None:
    """Raise if a setting of `init` has a wrong type or value."""
    check_choice("start", start, get_args(Start))
    check_dtype("base_dtype", base_dtype, or_none=True)
    check_dtype("dtype", dtype)
    for name, flag in flags.items():
        check_flag(name, flag)


def check_model(model: Any) -> None:
    """Raise if a model is neither a module nor a dict of tensors by name."""
    if isinstance(model, nn.Module):
        return
    if not isinstance(model, Mapping):
        raise TypeError(f"`model` is {described(model)}; pass an nn.Module, or its parameters by name")
    check_tensors("model", model)


def check_weights(weights: Any, model: nn.Module | Mapping[str, Tensor]) -> None:
    """Raise if weights are not a dict of tensors, or have a name that the model lacks.

    Names of buffers, and all names of a tied parameter, are accepted.
    """
    if weights is None:
        return
    check_tensors("weights", weights)
    known = set(model) if isinstance(model, Mapping) else _names_of(model)
    if unknown := [name for name in weights if name not in known]:
        where = f" in {str(weights.file(unknown[0]))!r}" if isinstance(weights, Weights) else ""
        raise ValueError(f"`weights` has {first_names(unknown)}{where}, which the model does not have; remove them")


def _names_of(model: nn.Module) -> set[str]:
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return {name for name, _ in (*parameters, *buffers)}


def check_kind(name: str, weight: Any, like: Tensor) -> None:
    """Raise TypeError if a weight is not a tensor of the kind of `like`.

    The kinds are real, complex and integer.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"`weights` has {described(weight)} for {name!r}; use a tensor")
    kinds = [(tensor.is_floating_point(), tensor.is_complex()) for tensor in (weight, like)]
    if kinds[0] != kinds[1]:
        raise TypeError(
            f"`weights` has dtype {weight.dtype} for {name!r}, but the model has {like.dtype}; convert it first"
        )


def check_targets(targets: Any) -> None:
    """Raise TypeError if targets are neither names, globs or types nor a predicate."""
    if isinstance(targets, str | type):
        targets = [targets]
    if not isinstance(targets, Sequence | AbstractSet):
        if not callable(targets):
            raise TypeError(f"`targets` is {described(targets)}; pass a list of names, globs or types, or a predicate")
        return
    for target in targets:
        if not (isinstance(target, str) or (isinstance(target, type) and issubclass(target, nn.Module))):
            raise TypeError(f"`targets` contains {described(target)}; use names, globs or types of modules")


def check_fused(fused: Any) -> None:
    """Raise if `fused` is not a dict of numbers of parts.

    A value is a number of parts of at least 1, or a pair of the number and an axis.
    """
    if fused is None:
        return
    check_by_name("fused", fused, of="numbers of parts")
    for pattern, parts in fused.items():
        pair = parts if isinstance(parts, tuple | list) else (parts, -2)
        if len(pair) != 2:
            raise ValueError(f"`fused` is {described(parts)} for {pattern!r}; use a number of parts, or (parts, axis)")
        check_integer("fused", pair[0], least=1, of=pattern)
        check_integer("fused", pair[1], of=pattern)


def check_tensors(argument: str, tensors: Any) -> None:
    """Raise if a value is not a dict of tensors by name.

    For a mapping that reads files only the names are checked.
    """
    check_by_name(argument, tensors, of="tensors")
    if not isinstance(tensors, dict):
        return
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{argument}` has {described(tensor)} for {name!r}; use a tensor")

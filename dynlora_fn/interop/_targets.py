"""Select the parameters that become low-rank, their ranks and their matrices."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from math import prod
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from dynlora_fn._core._check import check_integer, check_number
from dynlora_fn._core._patterns import Patterns, match
from dynlora_fn._core._torch import ConvNd
from dynlora_fn._core._types import divisor_of
from dynlora_fn.interop._parameters import Parameters

Targets: TypeAlias = (
    str
    | type[nn.Module]
    | Sequence[str | type[nn.Module]]
    | AbstractSet[str | type[nn.Module]]
    | Callable[[str, Tensor], bool]
)
Rank: TypeAlias = int | Mapping[str, int] | Callable[[str, tuple[int, int]], int]
Alphas: TypeAlias = float | Mapping[str, float] | Callable[[str, tuple[int, int]], float]


class Target(NamedTuple):
    """How one parameter becomes low-rank."""

    rank: int
    parts: int = 1  # number of fused parts
    axis: int = -2  # the axis along which the fused parts are adjacent
    is_spatial: bool = False  # whether it is the weight of a convolution
    padding: int | None = None  # the row of an embedding that gets no gradient
    alpha: float = 1.0

    @property
    def divisor(self) -> float:
        """``rank / alpha``, which divides the product of the factors."""
        return divisor_of(self.rank, self.alpha)


def select(
    model: nn.Module | None,
    parameters: Parameters,
    targets: Targets,
    rank: Rank,
    alpha: Alphas,
    fused: Mapping[str, int | tuple[int, int]],
) -> dict[str, Target]:
    """Return the targets by name.

    Args:
        model: The module that has the parameters. None means that only tensors are known.
        parameters: The parameters by name. Only shapes and dtypes are read. A pattern may match any name of a tied
            parameter.
        targets: The argument `targets` of `init`.
        rank: The argument `rank` of `init`.
        alpha: The argument `alpha` of `init`.
        fused: The argument `fused` of `init`.

    Raises:
        ValueError: If an entry of `targets` selects nothing, a pattern matches nothing, a target is not a matrix, or
            its rank or alpha is missing or does not fit.
    """
    selected = {}
    names = _target_names(model, parameters, targets)
    all_names = [alias for name in names for alias in parameters.aliases[name]]
    match(all_names, list(fused), "fused")
    rank_of, alpha_of = _value_of("rank", rank, all_names), _value_of("alpha", alpha, all_names)
    fused_patterns = Patterns(fused)
    modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    for name in names:
        aliases, shape = parameters.aliases[name], tuple(parameters.tensors[name].shape)
        parts = next((fused[pattern] for pattern in fused_patterns.matching(aliases)), 1)
        count, axis = map(int, parts) if isinstance(parts, tuple | list) else (int(parts), -2)  # maybe of NumPy
        target = Target(0, count, axis, _is_spatial(modules, name), _padding(modules, aliases))
        _check_dtype(name, parameters.tensors[name])
        matrix = _matrix(name, shape, target)
        target_rank, target_alpha = rank_of(aliases, matrix), alpha_of(aliases, matrix)
        selected[name] = target._replace(
            rank=check_integer("rank", target_rank.value, of=target_rank.of), alpha=_check_alpha(name, target_alpha)
        )
        _check_rank(name, shape, selected[name].rank, min(matrix))
    return selected


def _target_names(model: nn.Module | None, parameters: Parameters, targets: Targets) -> list[str]:
    if isinstance(targets, str | type):
        targets = [targets]
    if not isinstance(targets, Sequence | AbstractSet):
        return _names_by_predicate(parameters, targets)
    first_names = {alias: name for name, aliases in parameters.aliases.items() for alias in aliases}
    patterns = [pattern for pattern in targets if isinstance(pattern, str)]
    names = {first_names[alias] for alias in match(first_names, patterns, "targets")}
    for target in targets:
        if not isinstance(target, str):
            names |= {first_names[alias] for alias in _names_by_type(model, first_names, target)}
    return [name for name in parameters.tensors if name in names]


def _names_by_predicate(parameters: Parameters, predicate: Callable[[str, Tensor], bool]) -> list[str]:
    names = [
        name
        for name, tensor in parameters.tensors.items()
        if any(predicate(alias, tensor) for alias in parameters.aliases[name])
    ]
    if not names:
        first = ", ".join([*parameters.tensors][:4])
        raise ValueError(
            f"`targets` is a predicate that is true for no parameter, such as {first}; "
            "pass targets=[] to train all of them full-rank"
        )
    return names


def _names_by_type(model: nn.Module | None, names: Iterable[str], kind: type[nn.Module]) -> set[str]:
    """Return the names of the matrices in modules of a type, without submodules.

    Stacks of matrices count too.
    """
    if model is None:
        raise ValueError(
            f"`targets` has the type {kind.__name__}, but `model` is a dict of tensors; use names, globs or a predicate"
        )
    modules = [(prefix, module) for prefix, module in model.named_modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(
            f"`targets` has the type {kind.__name__}, but `model` has no such module; use a type that occurs in it: "
            f"{', '.join(sorted({type(module).__name__ for module in model.modules()}))}"
        )
    for prefix, module in modules:
        _refuse_parametrized(prefix, module, kind)
    matrices = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }
    if not matrices & set(names):
        raise ValueError(
            f"`targets` has the type {kind.__name__}, but no such module of `model` has a matrix itself, "
            f"{modules[0][0]!r} for one; use a type whose modules have weights (out, in)"
        )
    return matrices


def _refuse_parametrized(prefix: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise if a matrix of a module is computed from parameters of a submodule."""
    if not is_parametrized(module):
        return
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    for name, parametrization in parametrizations.items():
        if getattr(module, name).ndim > 1:
            path = f"{prefix}.{name}" if prefix else name
            originals = ", ".join(original for original, _ in parametrization.named_parameters(recurse=False))
            raise ValueError(
                f"`targets` has the type {kind.__name__}, but {path!r} is computed from its parametrization "
                f"({originals}), so it is not a parameter; call `torch.nn.utils.parametrize.remove_parametrizations`,"
                " or select the other weights by name"
            )


class _Setting(NamedTuple):
    """The rank or the alpha of a target, as a caller passed it."""

    value: Any
    of: str | None  # the pattern or the name that it belongs to


_FindSetting: TypeAlias = Callable[[Sequence[str], tuple[int, int]], _Setting]


def _value_of(argument: str, setting: Any, names: Sequence[str]) -> _FindSetting:
    """Return a function that finds the rank or the alpha of a target.

    Its arguments are the names of the target and the shape (out, in) of its matrices.

    Raises:
        ValueError: If a pattern matches none of the names.
    """
    patterns = Patterns(setting if isinstance(setting, Mapping) else ())
    if isinstance(setting, Mapping):
        match(names, list(setting), argument)

    def value_of(aliases: Sequence[str], matrix: tuple[int, int]) -> _Setting:
        if isinstance(setting, Mapping):
            for pattern in patterns.matching(aliases):
                return _Setting(setting[pattern], pattern)
            raise ValueError(
                f"`{argument}` has no {argument} for target {aliases[0]!r} in {dict(setting)}; add a pattern that"
                " matches it, or '*'"
            )
        return _Setting(setting(aliases[0], matrix), aliases[0]) if callable(setting) else _Setting(setting, None)

    return value_of


def _is_spatial(modules: Mapping[str, nn.Module], name: str) -> bool:
    return isinstance(modules.get(name.rpartition(".")[0]), ConvNd)


def _padding(modules: Mapping[str, nn.Module], aliases: Iterable[str]) -> int | None:
    """Return the `padding_idx` of the embedding whose weight has one of these names."""
    for prefix, _, leaf_name in (alias.rpartition(".") for alias in aliases):
        module = modules.get(prefix) if leaf_name == "weight" else None
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            return module.padding_idx % module.num_embeddings
    return None


def _check_dtype(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(
            f"`targets` matches {name!r} of dtype {tensor.dtype}; match only floating-point matrices, and exclude it"
        )
    if tensor.dtype.itemsize < 2:
        raise ValueError(
            f"`targets` matches {name!r} of dtype {tensor.dtype}, in which no sums are computed; convert it to at least"
            " 16 bits, multiplied by its scale if it has one"
        )


def _matrix(name: str, shape: tuple[int, ...], target: Target) -> tuple[int, int]:
    """Return the shape (out, in) of the matrices of a target."""
    if len(shape) < 2:
        raise ValueError(
            f"`targets` matches {name!r} of shape {shape}; match only matrices (out, in) or stacks of them"
        )
    if target.axis not in (-1, -2) or shape[target.axis] % target.parts or (target.is_spatial and target.parts > 1):
        raise ValueError(
            f"`fused` is {target.parts} along axis {target.axis} for {name!r} of shape {shape}; use a number of parts "
            "that divides axis -2, or (parts, axis) with axis -1 or -2, and no convolution"
        )
    if target.is_spatial:
        return shape[0], prod(shape[1:])
    rows, columns = shape[-2:]
    return (rows // target.parts, columns) if target.axis == -2 else (rows, columns // target.parts)


def _check_alpha(name: str, alpha: _Setting) -> float:
    if check_number("alpha", alpha.value, of=alpha.of) == 0:
        raise ValueError(f"`alpha` is 0 for {name!r}, with which its factors would change nothing; use another number")
    return float(alpha.value)


def _check_rank(name: str, shape: tuple[int, ...], rank: int, limit: int) -> None:
    if rank < 1:
        raise ValueError(
            f"`rank` is {rank} for {name!r} of shape {shape}; use at least 1 and at most min(out, in) = {limit}"
        )
    if rank > limit:
        raise ValueError(
            f"`rank` is {rank} for {name!r} of shape {shape}; use at least 1 and at most min(out, in) = {limit}, as in "
            f"rank={{{name!r}: {limit}, '*': {rank}}} or rank=lambda name, shape: min({rank}, *shape)"
        )


def as_matrices(weight: Tensor, target: Target) -> Tensor:
    """Return a weight as (out, in), with a leading axis for fused parts.

    The result is a view if possible.
    """
    if target.is_spatial:
        return weight.flatten(1)
    if target.parts == 1:
        return weight
    axis, shape = target.axis % weight.ndim, weight.shape
    parts = weight.reshape(*shape[:axis], target.parts, -1, *shape[axis + 1 :])
    return parts.movedim(axis, -3)

"""The factors of an adapter, computed one weight at a time when they are written."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from dynlora_fn._core._dtypes import widest
from dynlora_fn._core._types import LowRank
from dynlora_fn.bases._pending import rank_with_pending
from dynlora_fn.interop._lazy import LazyTensor
from dynlora_fn.interop._peft_dense import tensor_of_original
from dynlora_fn.interop._peft_differences import LayerCheck
from dynlora_fn.interop._peft_layers import PREFIX, Pair, as_layer, kind_of_layer
from dynlora_fn.interop._peft_parameters import in_file, is_adapted_by_name, stem_of
from dynlora_fn.interop._truncated_svd import truncated_svd
from dynlora_fn.nn._view import ROWS, View, dense, gathered, view_of

_ROUNDING = 4  # roundings by which a weight may differ after `init` has split it into base and product


class AdapterFactors:
    """The factors of all weights of an adapter.

    The factors of one weight are in memory at a time.
    """

    def __init__(self, model: nn.Module, original: Mapping[str, Tensor] | None, rank: int | None):
        """Take the arguments of `save_adapter`."""
        self.ranks: dict[str, int] = {}  # by every name of each weight
        self.alphas: dict[str, float] = {}  # by every name of each weight
        self.parameters: set[str] = set()  # the names that PEFT adapts as parameters
        self.errors: dict[str, float] = {}  # complete once all entries have been read
        self._model, self._original, self._rank = model, original, rank
        self._params: dict[str, LowRank] = {}
        self._aliases: dict[str, Sequence[str]] = {}
        self._last: dict[str, Pair] = {}  # of one weight, whose two entries follow each other in the file
        self._check = LayerCheck(model, owner="`params`", instead="freeze it, or write the model with `save_merged`")

    def check_layer(self, name: str, param: LowRank, aliases: Sequence[str]) -> None:
        """Raise ValueError if PEFT has no adapter that is exactly a change of the weight.

        The layer is checked under each of its names.
        """
        view = view_of(name, param, self._model.get_parameter(name).shape)
        for alias in aliases:
            if is_adapted_by_name(self._model, view._replace(name=alias)):
                self._check.parameter(alias)
            else:
                self._check.layer(alias)
            if "." not in alias:
                raise ValueError(
                    f"`params` has a low-rank {alias!r} of the model itself, which PEFT does not adapt; "
                    "put the model into an nn.Sequential, or write it with `save_merged`"
                )

    def add(self, name: str, param: LowRank, aliases: Sequence[str]) -> None:
        """Add a weight under all its names.

        Raises:
            ValueError: If `original` lacks the weight, or has another shape for it.
        """
        view = view_of(name, param, self._model.get_parameter(name).shape)
        rank = sum(map(rank_with_pending, view.parts))
        # The parts of a fused weight have equal alphas and ranks. PEFT's factors have the sum of their ranks.
        alpha = view.parts[0].alpha * len(view.parts)
        self.errors[name], self._params[name], self._aliases[name] = 0.0, param, aliases
        for alias in aliases:
            if is_adapted_by_name(self._model, view._replace(name=alias)):
                self.parameters.add(alias)
        if self._original is not None:
            _check_original(view, tensor_of_original(self._original, aliases))
            wanted = self._rank or sum(part.factors.b.shape[-1] for part in view.parts)
            alpha = rank = min(wanted, *self._matrices(name)[-2:])
        self.ranks |= dict.fromkeys(aliases, rank)
        self.alphas |= dict.fromkeys(aliases, alpha)

    def entries(self) -> dict[str, LazyTensor]:
        """Return the tensors of the file by key, once all weights are added."""
        entries = {}
        for name, aliases in self._aliases.items():
            shape, (*stack, rows, columns) = tuple(self._model.get_parameter(name).shape), self._matrices(name)
            up = torch.empty(*stack, rows, self.ranks[name], device="meta")
            down = torch.empty(*stack, self.ranks[name], columns, device="meta")
            for alias in aliases:
                for key, tensor in self._of_layer(alias, Pair(up, down), shape).items():
                    read = partial(self._read, name, self._params[name], alias, key)
                    entries[key] = LazyTensor(tuple(tensor.shape), self._dtype(name), read)
        return entries

    def _dtype(self, name: str) -> torch.dtype:
        """Return the dtype of factors in the file."""
        return torch.float32 if self._original is not None else widest(self._params[name].factors.b.dtype)

    def _matrices(self, name: str) -> tuple[int, ...]:
        """Return (rows, columns) of a weight's matrix, or (stack, rows, columns)."""
        shape = tuple(self._model.get_parameter(name).shape)
        return shape if name in self.parameters else (shape[0], prod(shape[1:]))

    def check_changed(self) -> None:
        """Raise ValueError if no weight differs from the original.

        A small change may disappear when the weight is rounded to the original's dtype. It counts as a difference if
        the base equals the original, as in LoRA.
        """
        for name, param in self._params.items():
            shape, before = self._model.get_parameter(name).shape, self._before(name)
            weight = dense(view_of(name, param, shape))
            if not torch.equal(weight.to(before), before):
                return
            is_equal = torch.equal(weight, before.to(weight))
            if not is_equal and torch.equal(dense(view_of(name, without_product(param), shape)).to(before), before):
                return
        raise ValueError(
            "`original` has the weights of `params`, so that the adapter would be of nothing; pass the weights before"
            " training, copied before trained ones were loaded into the model:"
            " {name: tensor.clone() for name, tensor in model.state_dict().items()}"
        )

    def _before(self, name: str) -> Tensor:
        before = tensor_of_original(self._original or {}, self._aliases[name])
        assert before is not None, name  # checked by `add`
        return before

    def _read(self, name: str, param: LowRank, alias: str, key: str) -> Tensor:
        view = view_of(name, param, self._model.get_parameter(name).shape)
        if name not in self._last:
            self._last.clear()
            if self._original is None:
                self._last[name] = _unchanged(gathered(view))
            else:
                self._last[name], self.errors[name] = _change(
                    view, self._before(name), self._matrices(name), self.ranks[name]
                )
        return self._of_layer(alias, self._last[name], view.shape)[key]

    def _of_layer(self, name: str, pair: Pair, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the tensors of PEFT's layer by their keys in the file."""
        if name in self.parameters:
            stem, (up, down) = stem_of(self._model, name, self.parameters), in_file(self._model, name, pair)
            return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        down, up = reversed(as_layer(self._model, name, pair, shape))
        kind, layer = kind_of_layer(self._model, name), PREFIX + name.rpartition(".")[0]
        if kind == "embedding":
            return {f"{layer}.lora_embedding_A": down, f"{layer}.lora_embedding_B": up}
        if kind == "convolution":
            up = up.reshape(*up.shape, *(1 for _ in down.shape[2:]))
        return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def without_product(param: LowRank) -> LowRank:
    """Return a low-rank weight with zeros in `b`, so that it equals its base."""
    return param._replace(factors=param.factors._replace(b=torch.zeros_like(param.factors.b)))


def _check_original(view: View, before: Tensor | None) -> None:
    if before is None or tuple(before.shape) != view.shape:
        found = "nothing" if before is None else f"shape {tuple(before.shape)}"
        raise ValueError(
            f"`original` has {found} for {view.name!r} of shape {view.shape}; pass the state dict of this model"
        )


def _unchanged(view: View) -> Pair:
    """Return the factors of a weight in float32 or float64, with their bits unchanged.

    The rank of a fused weight is the sum of the ranks of its parts.
    """
    ups, downs = (
        [side.to(widest(side.dtype)) for side in sides]
        for sides in zip(*((part.factors.b, part.factors.a) for part in view.parts), strict=True)
    )
    if view.axis == ROWS:
        return Pair(_block_diagonal(ups), torch.cat(downs, dim=-2))
    return Pair(torch.cat(ups, dim=-1), _block_diagonal(downs))


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    if blocks[0].ndim > 2:
        return torch.stack([_block_diagonal(members) for members in zip(*blocks, strict=True)])
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def _change(view: View, before: Tensor, shape: tuple[int, ...], rank: int) -> tuple[Pair, float]:
    """Return the change of a weight as two factors, and the relative error of the cut.

    Differences that rounding can explain count as no change.

    Args:
        view: The trained weight.
        before: The original weight.
        shape: The shape of the change as a matrix, or as a stack of matrices.
        rank: The rank to cut it to.
    """
    size, change = before.double().norm(), dense(view).double()
    change -= before.to(change.device)
    change = change.reshape(shape)
    norm = change.norm()
    if not norm.isfinite():
        raise ValueError(
            f"`params` or `original` has {view.name!r} with entries that are not finite; use weights of a step before"
        )
    if norm <= _ROUNDING * torch.finfo(widest(view.dtype, torch.float32)).eps * size:
        *stack, rows, columns = shape
        shapes = (*stack, rows, rank), (*stack, rank, columns)
        return Pair(*(torch.zeros(sizes, dtype=torch.float32) for sizes in shapes)), 0.0
    factors = [_cut(matrix, rank) for matrix in change.reshape(-1, *shape[-2:]).unbind()]
    up, down = (torch.stack(side).reshape(*shape[:-2], *side[0].shape) for side in zip(*factors, strict=True))
    return Pair(up, down), (change.norm() / norm).item()


def _cut(change: Tensor, rank: int) -> Pair:
    """Return the best factors of a rank, and subtract their product from the change."""
    u, s, vh = truncated_svd(change, rank)
    change.addmm_(u * s, vh, alpha=-1)
    root = s.sqrt()
    return Pair((u * root).float(), (root[:, None] * vh).float())

"""`dense`: turn low-rank weights into full-rank tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynlora_fn._core._patterns import match
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Param, Params
from dynlora_fn.bases._base import as_base
from dynlora_fn.nn._view import dense as dense_view
from dynlora_fn.nn._view import view_of
from dynlora_fn.switching._weight import materialize


def dense(params: Params, names: Sequence[str], *, model: nn.Module | None = None) -> dict[str, Param]:
    """Return the parameters with some weights as full-rank tensors.

    The weights do not change, except for one rounding. Use this for weights in operations without a rule, for which
    `call` would form the dense weight each time. The full-rank tensors are trainable in `partition`, and `switch` and
    `merge` do not change them.

    Args:
        params: The parameters by name.
        names: Names or globs of the weights. Tensors that are full-rank already are returned unchanged.
        model: The model, needed only for weights that have another shape in it: convolutions and fused weights. Only
            its names and shapes are read. Default None returns each weight in the shape of its `LowRank`.

    Returns:
        All parameters by name.

    Raises:
        TypeError: If `names` is not a list of strings.
        ValueError: If a pattern matches no name, or if a weight does not fit the model.

    Numerics: The weight is formed in the wider dtype of base and factors, at least float32. Then it is rounded once, to
    the dtype that full-rank training would store.

    Example:
        >>> import dynlora_fn as dl
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> params = dl.init(model, rank=2, seed=0, targets=["*.weight"])
        >>> params = dl.nn.dense(params, ["1.weight"])
        >>> type(params["0.weight"]).__name__, params["1.weight"].shape
        ('LowRank', torch.Size([2, 4]))
    """
    chosen = set(match(params, names, "names"))
    shapes = (
        {} if model is None else {name: leaf.shape for name, leaf in model.named_parameters(remove_duplicate=False)}
    )
    return {
        name: _dense(name, param, shapes) if name in chosen and isinstance(param, LowRank) else param
        for name, param in params.items()
    }


def _dense(name: str, param: LowRank, shapes: dict[str, torch.Size]) -> Tensor:
    dtype = as_base(param.base).weight_dtype
    if not shapes:
        return materialize(param).to(dtype)
    members = {key: member for key, member in unstack({name: param}).items() if isinstance(member, LowRank)}
    missing = [key for key in members if key not in shapes]
    if missing:
        raise ValueError(
            f"`params` has {missing[0]!r}, which the model does not have; pass the model of these `params`"
        )
    weights = [dense_view(view_of(key, member, shapes[key])).to(dtype) for key, member in members.items()]
    stack = param.shape[: len(param.shape) - len(next(iter(members.values())).shape)]
    return torch.stack(weights).reshape(*stack, *weights[0].shape)

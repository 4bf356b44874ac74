"""Parameters as the state dict of the model that they belong to."""

from torch import Tensor, nn

from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.nn._view import dense, view_of


def state_dict(model: nn.Module, params: Params) -> dict[str, Tensor]:
    """What ``model.load_state_dict`` takes: each weight dense, in the model's shape and dtype, under all of its names.

    Buffers are the model's own, and tied weights are one tensor.

    Args:
        model: looked at for names, shapes, dtypes and buffers; it may be on the meta device, its buffers apart.
        params: as for `call`.

    Raises:
        ValueError: if a parameter is missing, unknown to the model or of another shape; it names it and both shapes.

    Numerics: formed in the wider dtype of base and factors, float32 at least, and rounded once to the model's.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    singles = unstack(params)
    weights: dict[int, Tensor] = {}
    for name, param in singles.items():
        if name not in own:
            raise ValueError(f"`params` must be the model's, got {name!r}, which it does not have")
        shape, dtype = tuple(own[name].shape), own[name].dtype
        weight = dense(view_of(name, param, shape)) if isinstance(param, LowRank) else param
        if weight.shape != shape:
            raise ValueError(f"`params` must fit the model, got {name!r} of shape {tuple(weight.shape)} for {shape}")
        weights[id(own[name])] = weight.to(dtype)
    for name, parameter in own.items():
        if id(parameter) not in weights:
            wanted = f"{name!r} of shape {tuple(parameter.shape)}"
            raise ValueError(f"`params` must hold every parameter of the model, got none for {wanted}")
    kept = model.state_dict(keep_vars=True)
    return {name: weights.get(id(leaf), leaf.detach()) for name, leaf in kept.items()}

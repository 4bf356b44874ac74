"""Convert parameters to the state dict of their model."""

from torch import Tensor, nn

from dynlora_fn._core._check import check_module
from dynlora_fn._core._stacking import unstack
from dynlora_fn._core._tree import tensor_of
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.nn._view import dense, view_of


def state_dict(model: nn.Module, params: Params) -> dict[str, Tensor]:
    """Return the state dict that ``model.load_state_dict`` takes.

    Every weight is dense, in the shape and dtype of the model, and under all of its names. Tied weights are one tensor.
    Buffers are taken from the model.

    Args:
        model: The model. Only names, shapes, dtypes and buffers are read. It may be on the meta device, except its
            buffers.
        params: The parameters, as for `call`.

    Returns:
        The tensors by name.

    Raises:
        TypeError: If a parameter is integer, real or complex where that of the model is not.
        ValueError: If a parameter is missing, unknown to the model, or of another shape. The message gives the name and
            both shapes.

    Numerics: A weight is formed in the wider dtype of base and factors, float32 at least, and rounded once to the dtype
    of the model.

    Example:
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(6, 4)
        >>> params = dl.init(model, rank=2, seed=0, targets=["weight"])
        >>> state_dict(model, params)["weight"].shape
        torch.Size([4, 6])
    """
    check_module("model", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    singles = unstack(params)
    weights: dict[int, Tensor] = {}
    for name, param in singles.items():
        if name not in parameters:
            raise ValueError(f"`params` has {name!r}, which the model does not have; make `params` from this model")
        shape, dtype = tuple(parameters[name].shape), parameters[name].dtype
        weight = dense(view_of(name, param, shape)) if isinstance(param, LowRank) else tensor_of(param)
        if weight.shape != shape:
            raise ValueError(
                f"`params` has shape {tuple(weight.shape)} for {name!r}, but the model has {shape}; "
                "make `params` from this model"
            )
        if weight.is_complex() != dtype.is_complex or weight.is_floating_point() != dtype.is_floating_point:
            raise TypeError(
                f"`params` has dtype {weight.dtype} for {name!r}, but the model has {dtype}; convert it first"
            )
        weights[id(parameters[name])] = weight.to(dtype)
    for name, parameter in parameters.items():
        if id(parameter) not in weights:
            raise ValueError(
                f"`params` has no {name!r} of shape {tuple(parameter.shape)}; pass every parameter of the model"
            )
    leaves = model.state_dict(keep_vars=True)
    return {name: weights.get(id(leaf), leaf.detach()) for name, leaf in leaves.items()}

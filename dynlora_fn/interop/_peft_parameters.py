"""Parameters that PEFT adapts by their names (`target_parameters`).

They are experts and the fused weight of attention. PEFT wraps the module once for each adapted parameter. The first
parameter has the innermost wrapper::

    base_model.model.experts.base_layer.lora_A.weight     the first of two adapted parameters of `experts`
    base_model.model.experts.lora_A.weight                the second one
"""

from collections.abc import Collection

from torch import nn

from dynlora_fn.interop._peft_layers import PREFIX, Pair, is_transposed
from dynlora_fn.interop._peft_names import ends_of
from dynlora_fn.nn._view import View


def is_adapted_by_name(model: nn.Module, view: View) -> bool:
    """Return whether PEFT adapts a parameter by its name, and not its layer.

    PEFT does this for stacks of matrices, such as experts, and for `in_proj_weight` of `nn.MultiheadAttention`.
    """
    path, _, leaf_name = view.name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, nn.MultiheadAttention):
        return leaf_name == "in_proj_weight"
    if len(view.shape) != 3 or view.kernel or not path:
        return False
    return view.shape[0] > 1 or not is_transposed(model, view.name)  # PEFT transposes a single expert wrongly


def check_names(model: nn.Module, adapted: Collection[str]) -> None:
    """Raise ValueError if PEFT would adapt other parameters too.

    An entry of `target_parameters` also selects every longer name that ends with it after a dot.
    """
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in adapted and (taken := [end for end in ends_of(name) if end in adapted]):
            raise ValueError(
                f"`params` has a low-rank {taken[0]!r}, for which PEFT would take {name!r} too; make that one low-rank,"
                " or write the model with `save_merged`"
            )


def stem_of(model: nn.Module, name: str, adapted: Collection[str]) -> str:
    """Return the path of a parameter's wrapper in a file.

    `adapted` has the names of all parameters that PEFT adapts by name.
    """
    path, _, leaf_name = name.rpartition(".")
    names = [other for other, _ in model.get_submodule(path).named_parameters(recurse=False)]
    outer = [other for other in names[names.index(leaf_name) + 1 :] if f"{path}.{other}" in adapted]
    return PREFIX + path + ".base_layer" * len(outer)


def in_file(model: nn.Module, name: str, pair: Pair) -> Pair:
    """Return the factors of a parameter in PEFT's layout.

    For a stack they are B (out, rank * stack) and A (stack * rank, in).
    """
    up, down = pair
    if up.ndim == 2:
        return pair
    if is_transposed(model, name):
        up, down = down.mT, up.mT
    return Pair(up.permute(1, 2, 0).reshape(up.shape[1], -1), down.reshape(-1, down.shape[-1]))

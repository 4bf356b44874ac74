"""Compare the outputs of PEFT's model with the outputs of `call`."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynlora_fn._core._torch import tree_leaves, tree_map
from dynlora_fn._core._types import LowRank, Params
from dynlora_fn.nn._call import call

_TOLERANCE = 1000  # times the rounding of the largest output
_MOST = 1 / 16  # of the largest output, if it has 16 bits
_SHORT = (torch.float16, torch.bfloat16)  # their roundings would hide a different output


@torch.no_grad()
def check_outputs(model: nn.Module, params: Params, folder: Path, inputs: Sequence[Any] | Mapping[str, Any]) -> None:
    """Raise ValueError if the outputs of PEFT's model differ from `call`.

    Both outputs are computed in evaluation mode, from a copy of the model. A model with 16 bits is copied in float32.

    Raises:
        TypeError: If `inputs` is not a sequence or a dict of arguments.
        ValueError: If outputs differ by more than roundings, or no output is a floating tensor. The message gives the
            difference.
        ImportError: If PEFT is not installed.
    """
    if not isinstance(inputs, Sequence | Mapping) or isinstance(inputs, str | Tensor):
        raise TypeError(f"`check` is a {type(inputs).__name__}; pass a tuple or a dict of arguments of the model")
    try:
        import peft  # noqa: PLC0415, takes seconds
    except ImportError as error:
        raise ImportError("`check` needs PEFT; run `pip install peft`") from error
    model = copy.deepcopy(model).eval()
    if all(isinstance(param.base, Tensor) for param in params.values() if isinstance(param, LowRank)):
        params, inputs = tree_map(_lengthened, dict(params)), tree_map(_lengthened, inputs)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = _lengthened(tensor.data)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    ours = _outputs(call(model, params, *args, **kwargs))
    if not ours:
        raise ValueError("`check` gives no floating tensors to compare; let the model return some, or leave it out")
    theirs = _outputs(peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()(*args, **kwargs))
    for left, right in zip(ours, theirs, strict=True):
        # Equal infinities do not differ, such as those of masked logits.
        difference = torch.where(left == right, 0, left - right).abs().max().item()
        largest = torch.where(right.isfinite(), right, 0).abs().max().item()
        if not difference <= min(_TOLERANCE * torch.finfo(right.dtype).eps, _MOST) * largest:
            raise ValueError(
                f"`check` gives outputs that differ from PEFT's by {difference:.2e}, the largest being {largest:.2e}; "
                "the model uses an adapted weight in another way than by calling its layer, so merge the adapter into "
                "it with PEFT"
            )


def _lengthened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _SHORT else leaf


def _outputs(outputs: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]

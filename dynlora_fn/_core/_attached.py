"""Detect tensors that are being differentiated.

A function without a derivative refuses such tensors instead of dropping their gradients.
"""

from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import is_tracked, tree_leaves


def is_attached(tree: Any) -> bool:
    """Return whether a tensor in `tree` requires a gradient or has a tangent.

    All levels of nested transforms are checked. A tensor that passes through `torch.func.grad` but is not
    differentiated is not attached. Under `torch.no_grad` no tensor requires a gradient.

    While Dynamo traces, only the innermost level is checked, because Dynamo cannot trace the full check. Call this in a
    function marked with `torch.compiler.allow_in_graph` to check all levels in a compiled function too.
    """
    return any(is_tracked(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

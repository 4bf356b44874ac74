"""Tell whether derivatives by tensors are tracked, so that no step loses them."""

from typing import Any

from torch import Tensor

from dynlora_fn._core._torch import is_tracked, tree_leaves


def is_attached(tree: Any) -> bool:
    """Return whether a tensor in `tree` requires a gradient or has a tangent.

    Every level of every transform counts. A tensor that `torch.func.grad` passes on without differentiating by it is
    not attached. Under `torch.no_grad` no tensor requires a gradient.

    Dynamo cannot trace the whole question. While it traces, the answer is about the innermost level. In a function
    that `torch.compiler.allow_in_graph` marks, the answer is complete.
    """
    return any(is_tracked(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))

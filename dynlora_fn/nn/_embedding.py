"""Rules that read rows of a low-rank weight as plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import cast, widest, without_autocast
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._view import View, dense_base, expect_weight, refuse, scaled, single


def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return ``base[input] + alpha / rank * b[input] @ a``.

    The row `padding_idx` gets no gradient and no tangent, and does not contribute to the gradient of `a`. Gradients are
    dense even if `sparse` is True.
    """
    view = expect_weight("embedding", weight, input=input)
    part = single(view, "embedding")
    if max_norm is not None or scale_grad_by_freq:
        refuse(view, "embedding", "`max_norm` or `scale_grad_by_freq`")
    if part.factors.b.ndim != 2:
        refuse(view, "embedding", f"a weight of shape {view.shape}")
    rows = rows_of(view, part, input)
    if padding_idx is not None:
        is_padding = input == padding_idx % view.shape[0]
        rows = torch.where(is_padding[..., None], rows.detach(), rows)
    return rows


def rows_of(view: View, part: LowRank, index: Any) -> Tensor:
    """Return rows of a weight, in the dtype and scale of its view."""
    b, a = whole_factors(part)
    dtype = widest(b.dtype, a.dtype)
    with without_autocast(b.device.type):
        low_rank_rows = b[index].to(dtype) @ a.to(dtype) / part.divisor
    dtype = torch.promote_types(b.dtype, view.dtype)
    rows = dense_base(part)[index].to(dtype) + low_rank_rows.to(b.dtype).to(dtype)
    return scaled(cast(rows, view.dtype), view)


def embedding_bag(
    input: Any,
    weight: Any,
    offsets: Any = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Return sums or means of rows of the weight.

    They are ``embedding_bag(base) + alpha / rank * embedding_bag(b) @ a``.
    """
    view = expect_weight("embedding_bag", weight, input=input, per_sample_weights=per_sample_weights)
    part = single(view, "embedding_bag")
    if max_norm is not None or scale_grad_by_freq or mode not in ("sum", "mean"):
        refuse(view, "embedding_bag", f"`max_norm`, `scale_grad_by_freq` or mode {mode!r}")
    b, a = whole_factors(part)

    def bags(rows: Tensor) -> Tensor:
        return functional.embedding_bag(
            input,
            rows,
            offsets,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )

    rows = bags(dense_base(part).to(b.dtype)) + bags(b) @ a.to(b.dtype) / part.divisor
    return scaled(cast(rows, view.dtype), view)


EMBEDDING_RULES: dict[Any, Callable[..., Any]] = {
    functional.embedding: embedding,
    functional.embedding_bag: embedding_bag,
}

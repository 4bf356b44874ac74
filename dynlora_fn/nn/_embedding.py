"""Rules for rows of a low-rank weight, which become plain tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dynlora_fn._core._dtypes import widest, without_autocast
from dynlora_fn._core._tree import whole_factors
from dynlora_fn._core._types import LowRank
from dynlora_fn.nn._view import dense_base, expect_weight, refuse, single


def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Return ``base[input] + b[input] @ a / rank``.

    The row `padding_idx` gets no gradient, no tangent, and contributes none to `a`.
    """
    view = expect_weight("embedding", weight, input=input)
    part = single(view, "embedding")
    if max_norm is not None or scale_grad_by_freq or sparse:
        refuse(view, "embedding", "`max_norm`, `scale_grad_by_freq` or `sparse`")
    if part.factors.b.ndim != 2:
        refuse(view, "embedding", f"a weight of shape {view.shape}")
    low_rank_rows, base_rows = rows_of(part, input)
    rows = base_rows + low_rank_rows
    if padding_idx is not None:
        is_padding = input == padding_idx % view.shape[0]
        rows = torch.where(is_padding[..., None], rows.detach(), rows)
    return rows


def rows_of(part: LowRank, index: Any) -> tuple[Tensor, Tensor]:
    """Return the indexed rows of ``b @ a / rank`` and of the base."""
    b, a = whole_factors(part)
    dtype = widest(b.dtype, a.dtype)
    with without_autocast(b.device.type):
        low_rank_rows = b[index].to(dtype) @ a.to(dtype) / a.shape[-2]
    return low_rank_rows.to(b.dtype), dense_base(part)[index].to(b.dtype)


EMBEDDING_RULES: dict[Any, Callable[..., Any]] = {functional.embedding: embedding}

"""Skip what an older torch cannot do."""

import pytest

from dynlora_fn._core._torch import is_older_than
from dynlora_fn.testing import Storage


def skip_without_views_of_dtypes(storage: Storage) -> None:
    """Skip a test that rounds a residual at random under `torch.vmap`."""
    if storage.residual == "bfloat16" and is_older_than(2, 13):
        pytest.skip("`torch.vmap` has no rule for views of other dtypes before torch 2.13")


def skip_compiled_jacfwd() -> None:
    """Skip a test that compiles `torch.func.jacfwd`."""
    if is_older_than(2, 13):
        pytest.skip("`torch.func.jacfwd` does not compile in some functions before torch 2.13")

"""What autocast is set to."""

import torch

from dynlora_fn._core._dtypes import autocast_now, without_autocast
from dynlora_fn.testing import normal


def test_what_autocast_is_set_to_is_known():
    assert autocast_now("cpu") == ("cpu", torch.get_autocast_dtype("cpu"), False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_now("cpu") == ("cpu", torch.bfloat16, True)
        with without_autocast("cpu"):
            assert (normal(0, 2, 2) @ normal(1, 2, 2)).dtype == torch.float64
            assert not torch.is_autocast_enabled("cpu")

"""Long work reports the bytes that are done."""

import pytest
import torch
from torch import nn

from dynlora_fn import init
from dynlora_fn.bases import quantize
from dynlora_fn.testing import normal

MODEL = {**{f"layers.{at}.w": normal(at, 8, 6) for at in range(3)}, "head": normal(3, 9, 6), "scale": normal(4, 6)}
BYTES = 8 * (3 * 8 * 6 + 9 * 6 + 6)


def check_reports(reports, total):
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert {of for _, of in reports} == {total}


@pytest.mark.parametrize("options", [{}, {"stack": False}, {"start": "lora", "copy": False}, {"base": "int8"}])
def test_init_reports_the_bytes_of_the_model(options):
    reports = []
    init(MODEL, rank=2, seed=0, targets=["layers.*"], progress=lambda *bytes_: reports.append(bytes_), **options)
    check_reports(reports, BYTES)


def test_quantize_reports_the_bytes_of_weights():
    reports = []
    params = init(MODEL, rank=2, seed=0, targets=["layers.*", "head"])
    quantize(params, "int8", progress=lambda *bytes_: reports.append(bytes_))
    check_reports(reports, 8 * (3 * 8 * 6 + 9 * 6))
    one = quantize(params["head"], "int8", progress=lambda *bytes_: reports.append(bytes_))
    assert one.shape == (9, 6)
    assert reports[-1] == (8 * 9 * 6, 8 * 9 * 6)


def test_an_error_of_the_callers_function_stops_the_work():
    def stop(done, total):
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        init(MODEL, rank=2, seed=0, targets=["head"], progress=stop)


def test_a_value_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="`progress` is True; pass a function of the bytes done and in total, or None"):
        init(nn.Linear(2, 2), rank=1, seed=0, targets=["weight"], progress=True)
    with pytest.raises(TypeError, match="`progress` is 'bar'"):
        quantize(init({"w": torch.ones(4, 4)}, rank=1, seed=0, targets=["w"]), "int8", progress="bar")

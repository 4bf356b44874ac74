"""Numbers, choices and flags: what is taken, and what the error for anything else says."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynlora_fn._core._check import (
    check_by_name,
    check_callable,
    check_choice,
    check_device,
    check_dtype,
    check_flag,
    check_integer,
    check_module,
    check_number,
    check_path,
    check_patterns,
    check_rate,
    check_step,
    described,
)


@pytest.mark.parametrize("value", [3, np.int64(3), np.int8(3), np.uint16(3)])
def test_integers_of_numpy_become_those_of_python(value):
    assert type(check_integer("rank", value, least=3)) is int
    assert check_integer("rank", value) == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), 3.0, np.float64(3), "3", None, torch.tensor(3), 3j, [3]])
def test_anything_else_is_no_integer(value):
    with pytest.raises(TypeError, match=r"`rank` is .*, which is not an integer; use an integer of at least 1"):
        check_integer("rank", value, least=1)


def test_small_integers_are_refused_with_the_least_and_the_weight():
    with pytest.raises(ValueError, match="`rank` is 0 for 'head'; use an integer of at least 1"):
        check_integer("rank", np.int64(0), least=1, of="head")


@pytest.mark.parametrize("value", [1, 0.5, np.float32(0.5), np.float16(1), np.int32(1), Fraction(1, 2)])
def test_real_numbers_of_any_kind_become_those_of_python(value):
    number = check_number("eps", value, least=0, most=1)
    assert type(number) in (int, float) or isinstance(number, float)
    assert number == value


@pytest.mark.parametrize("value", [True, "0.5", None, 1j, np.complex64(1), torch.tensor(0.5), [0.5]])
def test_anything_else_is_no_number(value):
    with pytest.raises(TypeError, match=r"`eps` is .*, which is not a real number; use a number above 0"):
        check_number("eps", value, above=0)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, np.float32(math.nan), np.float64(-math.inf)])
def test_numbers_outside_are_refused(value):
    with pytest.raises(ValueError, match=r"`eps` is .*; use a number of at least 0"):
        check_number("eps", value, least=0)


def test_ends_of_intervals_count_where_they_say():
    limits = {"least": 0, "most": 1}
    assert [check_number("x", end, **limits) for end in (0, 1)] == [0, 1]
    for open_end, value in (({"least": 0, "below": 1}, 1), ({"above": 0, "most": 1}, 0)):
        with pytest.raises(ValueError, match=rf"`x` is {value}; use a number in [\[(]0, 1[\])]"):
            check_number("x", value, **open_end)
    assert check_number("max_norm", math.inf, least=0, finite=False) == math.inf
    with pytest.raises(ValueError, match="`max_norm` is nan"):
        check_number("max_norm", math.nan, least=0, finite=False)


@pytest.mark.parametrize("value", [0.0, 1e-3, np.float32(0.1), torch.tensor(0.1), torch.tensor(1), torch.tensor(-1.0)])
def test_rates_are_numbers_or_tensors_whose_values_are_not_read(value):
    check_rate("lr", value)


@pytest.mark.parametrize(
    "value", [torch.tensor([0.1]), torch.tensor(True), torch.tensor(0.1j), -1e-3, "0.1", None, math.nan]
)
def test_other_rates_are_refused(value):
    with pytest.raises((TypeError, ValueError), match=r"`lr` .*use a (real )?number"):
        check_rate("lr", value)


@pytest.mark.parametrize("value", ["c", "A", "", None, False, ["a"], torch.ones(2), b"a"])
def test_other_words_are_refused_with_all_that_are_right(value):
    with pytest.raises(ValueError, match="`mode` must be 'a' or 'b', got "):
        check_choice("mode", value, ("a", "b"))


def test_none_is_a_word_where_it_may_be():
    check_choice("mode", None, ("a", "b"), or_none=True)
    with pytest.raises(ValueError, match="`mode` must be 'a', 'b' or None, got 'none'"):
        check_choice("mode", "none", ("a", "b"), or_none=True)


@pytest.mark.parametrize("value", [0, 1, "yes", None, np.True_, torch.tensor(True)])
def test_flags_are_true_or_false(value):
    with pytest.raises(TypeError, match=r"`stack` is .*; use True or False"):
        check_flag("stack", value)


@pytest.mark.parametrize("value", ["float32", torch.int32, torch.complex64, torch.float8_e4m3fn, np.float32, None])
def test_dtypes_that_cannot_be_summed_in_are_refused(value):
    with pytest.raises(TypeError, match=r"`dtype` is .*; use a floating dtype of at least 16 bits"):
        check_dtype("dtype", value)


@pytest.mark.parametrize(
    ("value", "error"), [("gpu:x", ValueError), (3.5, TypeError), (["cpu"], TypeError), (None, TypeError)]
)
def test_devices_that_do_not_exist_are_refused(value, error):
    with pytest.raises(error, match="`device` is "):
        check_device("device", value)


def test_devices_are_devices_or_their_names():
    for value in ("cpu", "cuda:0", torch.device("cpu"), torch.device("meta")):
        check_device("device", value)
    check_device("device", None, or_none=True)


@pytest.mark.parametrize("value", [-1, 0.5, "1", True, torch.tensor(0.5), torch.tensor([1]), torch.tensor(False)])
def test_steps_count_from_zero(value):
    with pytest.raises((TypeError, ValueError), match="`step` "):
        check_step("step", value)
    assert check_step("step", np.int64(4)) == 4


def test_a_single_text_is_no_list_of_patterns():
    with pytest.raises(TypeError, match=r"`frozen` is 'bias'; pass a list of names or globs"):
        check_patterns("frozen", "bias")


@pytest.mark.parametrize("value", [None, 3, {"a": 1}, nn.Linear(2, 2)])
def test_what_is_no_list_of_texts_is_refused(value):
    with pytest.raises(TypeError, match=r"`frozen` is .*; pass a list of names or globs"):
        check_patterns("frozen", value)
    with pytest.raises(TypeError, match=r"`frozen` contains .*; use names or globs"):
        check_patterns("frozen", ["bias", value])
    check_patterns("frozen", {"bias"})


@pytest.mark.parametrize("value", [None, 3, b"folder", ["folder"]])
def test_paths_modules_and_functions_are_told_from_other_values(value):
    for check, wanted in ((check_path, "a path"), (check_module, "an nn.Module"), (check_callable, "a function")):
        with pytest.raises(TypeError, match=f"`x` is .*; pass {wanted}"):
            check("x", value)
    check_path("x", "folder")
    check_path("x", Path("folder"))
    check_module("x", nn.Linear(2, 2))
    check_callable("x", nn.Linear(2, 2))


def test_what_is_not_by_name_is_described():
    with pytest.raises(ValueError, match="`params` must be by parameter name, got None; pass a dict of parameters"):
        check_by_name("params", None, of="parameters")
    with pytest.raises(ValueError, match="`params` has the key 3, which is not a name"):
        check_by_name("params", {3: torch.ones(2)}, of="parameters")


def test_long_values_are_cut():
    assert described(torch.ones(2, 3)) == "a tensor of shape (2, 3) and dtype torch.float32"
    assert len(described(nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]))) < 90

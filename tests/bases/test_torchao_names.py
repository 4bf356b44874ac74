"""Every name of torchao that the library uses is still where `bases/_torchao.py` looks for it."""

import logging
from importlib import import_module

import pytest

from dynlora_fn.bases import _torchao


@pytest.mark.parametrize("name", _torchao.NAMES)
def test_a_name_is_in_its_module(name: str):
    module = _torchao.NAMES[name]
    try:
        found = getattr(import_module(module), name)
    except (AttributeError, ModuleNotFoundError) as error:
        pytest.fail(f"torchao has moved {module}.{name}, which `bases/_torchao.py` imports: {error}")
    assert getattr(_torchao, name) is found


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _torchao.no_such_name  # noqa: B018


def test_only_what_torchao_logs_at_its_import_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The library does not hide what other code logs."""
    torchao, pytree = (logging.getLogger(name) for name in _torchao.MESSAGES)
    for logger in (torchao, pytree):  # a program that ran in this process leaves its filters
        monkeypatch.setattr(logger, "filters", [])
    with _torchao.without_messages():
        torchao.warning(f"Failed to load {'kernels.so'}")
        pytree.warning("%s is an Enum subclass and is now natively supported", "<enum 'KernelPreference'>")
        torchao.warning("other")
        logging.getLogger("torchao.quantization").warning("Failed to load weights")
    torchao.warning("Failed to load later")
    assert [record.getMessage() for record in caplog.records] == [
        "other",
        "Failed to load weights",
        "Failed to load later",
    ]

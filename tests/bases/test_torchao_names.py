"""Every name of torchao that the library uses is still where `bases/_torchao.py` looks for it."""

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

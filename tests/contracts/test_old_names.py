"""Old names of what is public work, say what the new ones are, and are not shown."""

import importlib

import pytest

import jaxsparse as js
from jaxsparse._renamed import RENAMED


@pytest.mark.parametrize("module", RENAMED)
def test_each_gives_what_has_the_new_name_and_warns(module):
    for old, new in RENAMED[module].items():
        package, name = new.split(".")
        home = importlib.import_module(f"jaxsparse.{package}")
        with pytest.warns(
            DeprecationWarning, match=rf"is now jaxsparse\.{new}; the old"
        ):
            found = getattr(importlib.import_module(module), old)
        assert found is getattr(home, name)
        assert old not in dir(importlib.import_module(module))


def test_they_can_be_imported_by_name():
    with pytest.warns(DeprecationWarning, match=r"jaxsparse\.coupling\.groups"):
        from jaxsparse.structured import groups
    assert groups is js.coupling.groups
    assert "structured" not in dir(js)


def test_other_names_are_not_there():
    with pytest.raises(
        AttributeError, match=r"jaxsparse\.structured.*no attribute 'x'"
    ):
        _ = js.structured.x

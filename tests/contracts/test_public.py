"""What all public names have in common: docstrings, signatures, a place."""

import ast
import inspect
import pathlib
import pkgutil
import pydoc
import re
import tomllib
import types

import pytest

import jaxsparse as js

# Found, not listed: a new package cannot be forgotten.
PLUMBING = {"linalg", "primitives", "program", "ranking"}  # of the library's own use
OLD = {"structured"}  # names that are elsewhere now, see test_old_names.py
PACKAGES = [
    js,
    *(
        getattr(js, found.name)
        for found in pkgutil.iter_modules(js.__path__)
        if not found.name.startswith("_") and found.name not in PLUMBING | OLD
    ),
]
PUBLIC = {
    f"{package.__name__}.{name}": value
    for package in PACKAGES
    for name, value in vars(package).items()
    if not name.startswith("_")
    and not isinstance(value, types.ModuleType)
    and getattr(value, "__module__", "").startswith("jaxsparse")
}
FUNCTIONS = {k: f for k, f in PUBLIC.items() if inspect.isfunction(f)}
CLASSES = {k: c for k, c in PUBLIC.items() if inspect.isclass(c)}


def test_every_package_is_there_and_has_names():
    names = {package.__name__ for package in PACKAGES}
    assert {"jaxsparse", "jaxsparse.transforms", "jaxsparse.checkpoint"} <= names
    for package in PACKAGES:
        assert any(name.startswith(f"{package.__name__}.") for name in PUBLIC)
        assert inspect.getdoc(package)


def test_dir_has_public_names_alone():
    names = dir(js)
    assert not [name for name in names if name.startswith("_")]
    assert {"prune", "trace", "report", "checkpoint", "NM"} <= set(names)
    for name in names:  # what is imported for the package's own use is not there
        value = getattr(js, name)
        where = getattr(value, "__module__", getattr(value, "__name__", ""))
        assert where.startswith("jaxsparse"), name


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_help_lists_the_public_names(package):
    """What a package imports `as` itself is public; `help` knows only `__all__`."""
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    exported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name and not alias.name.startswith("_")
    }
    assert len(package.__all__) == len(set(package.__all__))
    assert set(package.__all__) == exported
    text = pydoc.plain(pydoc.render_doc(package))
    short = [name.rpartition(".")[2] for name in FUNCTIONS if _place(name) == package]
    for name in short:
        assert re.search(rf"^    {name}\(", text, flags=re.MULTILINE), name


def _place(name):
    """The package of a public name."""
    return next(p for p in PACKAGES if p.__name__ == name.rpartition(".")[0])


def test_help_says_what_is_faster():
    text = " ".join(inspect.getdoc(js.prune).split())
    assert "a masked dense layer is neither faster nor smaller" in text
    assert "`js.narrowing.narrow`" in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_has_an_example(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    assert doc
    assert "Example:" in doc
    assert ">>>" in doc or "Example: see `" in doc


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_says_what_it_is(name):
    assert (CLASSES[name].__doc__ or "").strip()
    assert not CLASSES[name].__doc__.startswith(f"{CLASSES[name].__name__}(")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_a_default_is_passed_by_name(name):
    # Those that are the subject of the call, and read well without their names.
    positional = {
        *("sparsity", "where", "labels", "weight", "drop", "coactivation"),
        *("params", "masks"),  # of what is looked at: check, table
    }
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if (
            parameter.default is not parameter.empty
            and parameter.name not in positional
        ):
            assert parameter.kind == parameter.KEYWORD_ONLY, parameter


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_key_is_required_and_passed_by_name(name):
    key = inspect.signature(FUNCTIONS[name]).parameters.get("key")
    if key is not None:
        assert key.default is key.empty
        if name != "jaxsparse.tree.keys_like":  # there it is what the call is about
            assert key.kind == key.KEYWORD_ONLY


def test_the_version_has_one_source():
    root = pathlib.Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    assert "version" in settings["project"]["dynamic"]
    source = root / settings["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{js.__version__}"' in source.read_text()

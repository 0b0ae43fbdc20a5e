"""Every public name stands on exactly one page of the API, and no page has another."""

import ast
import collections
import importlib
import pathlib
import re

import pytest
from contracts.test_public import PACKAGES

ROOT = pathlib.Path(__file__).parents[2]
API = ROOT / "docs" / "api"
PAGES = {page.stem: page.read_text() for page in API.glob("*.md")}
ENTRIES = {
    page: re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    for page, text in PAGES.items()
}


def public(package) -> list[str]:
    """The names that a package exports: by `import name as name`."""
    tree = ast.parse(pathlib.Path(package.__file__).read_text())
    imports = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    return [
        alias.name
        for node in imports
        for alias in node.names
        if alias.asname == alias.name and not alias.name.startswith("_")
    ]


def value(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_each_package_has_a_page():
    packages = {package.__name__.removeprefix("jaxsparse.") for package in PACKAGES}
    assert set(PAGES) == packages - {"jaxsparse"} | {"index"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.__name__)
def test_every_public_name_is_on_one_page(package):
    places = collections.Counter(
        id(value(entry)) for entries in ENTRIES.values() for entry in entries
    )
    packages = {other.__name__ for other in PACKAGES}
    for name in public(package):
        if f"{package.__name__}.{name}" not in packages:
            found = places[id(getattr(package, name))]
            assert found == 1, f"{package.__name__}.{name} is on {found} pages"


def test_every_entry_is_a_public_name():
    names = {f"{p.__name__}.{name}" for p in PACKAGES for name in public(p)}
    for page, entries in ENTRIES.items():
        for entry in entries:
            assert entry in names
            assert entry.startswith(f"jaxsparse.{page}.")


def test_the_top_level_names_are_listed():
    table = PAGES["index"]
    for name in public(PACKAGES[0]):
        assert f"`js.{name}`" in table, name


def test_each_page_of_the_site_is_in_its_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    docs = ROOT / "docs"
    for page in (*docs.rglob("*.md"), *docs.glob("tutorials/*.py")):
        assert f" {page.relative_to(docs)}\n" in menu, page


@pytest.mark.parametrize("script", sorted((ROOT / "docs/tutorials").glob("*.py")))
def test_tutorials_are_short(script):
    lines = [line.strip() for line in script.read_text().splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= 80
    assert lines[:2] == ["# %% [markdown]", lines[1]]
    assert lines[1].startswith("# # ")

"""What READMEs and pages say is so: their code runs, and lists are whole.

The blocks of a page run in order in one namespace. All pages but those that stand alone
begin with the model of `docs/concepts/index.md`. A block of text that follows one of
code is what it printed.
"""

import contextlib
import functools
import importlib.util
import io
import pathlib
import re
import textwrap

import pytest

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
LISTED = (TESTS / "README.md").read_text().split("What only `make test-all` runs")[1]
MARK = "mark." + "exhaustive"
FILES = [p for p in TESTS.rglob("test_*.py") if MARK in p.read_text()]
MODEL = ROOT / "docs" / "concepts" / "index.md"
STAND_ALONE = {MODEL, ROOT / "docs" / "getting_started.md"}
FENCE = re.compile(r"^( *)```(python|text)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in page.read_text()
]
OPTIONAL = ("equinox", "keras")


def test_there_are_such_files():
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_exhaustive_tests_are_listed(path):
    row = next((r for r in LISTED.splitlines() if f"`{path.parent.name}/" in r), "")
    assert f"{path.name}`" in LISTED, f"{path.name} has no row in tests/README.md"
    assert row, f"{path.parent.name}/ has no row in tests/README.md"


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 900


def test_all_code_of_pages_is_found():
    """A fence that is spelled otherwise would not run."""
    for page in PAGES:
        text = page.read_text()
        found = sum(match[2] == "python" for match in FENCE.finditer(text))
        assert found == text.count("```py"), page
    assert len(PAGES) >= 10


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_runs(page, tmp_path, monkeypatch):
    names = {} if page in STAND_ALONE else dict(model())
    monkeypatch.chdir(tmp_path)
    run(page, names)


@functools.cache
def model() -> dict:
    names = {}
    run(MODEL, names)
    return names


def run(page: pathlib.Path, names: dict) -> None:
    """Runs the blocks of a page, and compares what they print with what it shows."""
    text = page.read_text()
    said = None
    for match in FENCE.finditer(text):
        code = textwrap.dedent(match[3])
        if match[2] == "text":
            if said is not None:
                assert said.split() == code.split()
            said = None
        elif all(importlib.util.find_spec(name) for name in needed(code)):
            line = text[: match.start()].count("\n") + 1
            compiled = compile("\n" * line + code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compiled, names)
            said = out.getvalue()


def needed(code: str) -> list[str]:
    return [name for name in OPTIONAL if f"import {name}" in code]

"""What `make test` leaves out is said, with its reason, in `tests/README.md`."""

import pathlib

import pytest

TESTS = pathlib.Path(__file__).parent
LISTED = (TESTS / "README.md").read_text().split("What only `make test-all` runs")[1]
MARK = "mark." + "exhaustive"
FILES = [p for p in TESTS.rglob("test_*.py") if MARK in p.read_text()]


def test_there_are_such_files():
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(TESTS)))
def test_exhaustive_tests_are_listed(path):
    row = next((r for r in LISTED.splitlines() if f"`{path.parent.name}/" in r), "")
    assert f"{path.name}`" in LISTED, f"{path.name} has no row in tests/README.md"
    assert row, f"{path.parent.name}/ has no row in tests/README.md"
